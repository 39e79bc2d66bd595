"""The integer programme of planning: the least sensitive edits that save enough."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from asdm.planning.possible_edits import PossibleEdit

EDIT_PRICE = 1e-9  # added to each edit's sensitivity: of equally good plans, the one with fewer edits
TIME_LIMIT = 60  # seconds


def least_sensitive(
    choices: Sequence[PossibleEdit],
    savings: Sequence[float],
    needed: float,
    near: tuple[Collection[PossibleEdit], int] | None = None,
) -> list[PossibleEdit] | None:
    """Return the edits that save at least `needed` at the least total sensitivity; None if none do.

    An integer programme: minimise s.x subject to savings.x >= needed, with at most one of the edits that cover a unit.

    Args:
        near: edits, and the most edits by which the solution may differ from them.
    """
    if needed <= 0:
        return []
    if not choices:
        return None
    scale = max(savings) or 1.0
    constraints = [LinearConstraint(np.array(savings)[None] / scale, needed / scale, np.inf)]
    if near is not None:
        start, changes = near
        chosen = np.array([choice in start for choice in choices])
        constraints.append(LinearConstraint(np.where(chosen, -1.0, 1.0)[None], -np.inf, changes - chosen.sum()))
    price = np.array([choice.sensitivity for choice in choices]) + EDIT_PRICE
    return _solve(choices, price, constraints)


def most_saved(choices: Sequence[PossibleEdit], savings: Sequence[float]) -> float:
    """Return the most that any plan can save."""
    best = (_solve(choices, -np.array(savings, dtype=float), []) if choices else None) or []
    return sum(saved for choice, saved in zip(choices, savings, strict=True) if choice in best)


def _solve(
    choices: Sequence[PossibleEdit], price: np.ndarray, constraints: list[LinearConstraint]
) -> list[PossibleEdit] | None:
    units = sorted({unit for choice in choices for unit in choice.covers})
    covering = np.array([[float(unit in choice.covers) for choice in choices] for unit in units])
    solution = milp(
        price,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[*constraints, LinearConstraint(covering, -np.inf, 1.0)],
        options={"time_limit": TIME_LIMIT, "mip_rel_gap": 1e-4},
    )
    if solution.x is None:
        return None
    return [choice for choice, taken in zip(choices, solution.x, strict=True) if taken > 0.5]
