"""The integer programme of planning: the least sensitive edits that save enough."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from asdm.planning.possible_edits import Pair, PossibleEdit

EDIT_PRICE = 1e-9  # added to each edit's sensitivity: of equally good plans, the one with fewer edits
TIME_LIMIT = 60  # seconds


def least_sensitive(
    choices: Sequence[PossibleEdit],
    savings: Sequence[float],
    needed: float,
    near: tuple[Collection[PossibleEdit], int] | None = None,
    pairs: Sequence[Pair] = (),
) -> list[PossibleEdit] | None:
    """Return the edits that save at least `needed` at the least total sensitivity; None if none do.

    An integer programme: minimise s.x subject to savings.x >= needed, with at most one of the edits that cover a unit.
    A pair's joint saving counts by a variable of its own, the product of both edits' variables.

    Args:
        near: edits, and the most edits by which the solution may differ from them.
        pairs: what pairs of edits save beyond their sum (`joint_savings`).
    """
    if needed <= 0:
        return []
    if not choices:
        return None
    scale = max(savings) or 1.0
    constraints = [LinearConstraint(_row(savings, pairs) / scale, needed / scale, np.inf)]
    if near is not None:
        start, changes = near
        chosen = np.array([choice in start for choice in choices])
        changed = np.pad(np.where(chosen, -1.0, 1.0), (0, len(pairs)))
        constraints.append(LinearConstraint(changed[None], -np.inf, changes - chosen.sum()))
    price = np.array([choice.sensitivity for choice in choices]) + EDIT_PRICE
    found = _solve(choices, np.pad(price, (0, len(pairs))), constraints, pairs)
    return None if found is None else [choices[place] for place in sorted(found)]


def most_saved(choices: Sequence[PossibleEdit], savings: Sequence[float], pairs: Sequence[Pair] = ()) -> float:
    """Return the most that any plan can save."""
    best = (_solve(choices, -_row(savings, pairs)[0], [], pairs) if choices else None) or set()
    together = sum(more for first, second, more in pairs if {first, second} <= best)
    return sum(savings[place] for place in best) + together


def _row(savings: Sequence[float], pairs: Sequence[Pair]) -> np.ndarray:
    """Return the savings of the edits, then of the pairs, as a row of the programme."""
    return np.array([*savings, *(more for _, _, more in pairs)], dtype=float)[None]


def _solve(
    choices: Sequence[PossibleEdit], price: np.ndarray, constraints: list[LinearConstraint], pairs: Sequence[Pair]
) -> set[int] | None:
    """Return the places of the chosen edits. The variables are those of the edits, then those of the pairs."""
    units = sorted({unit for choice in choices for unit in choice.covers})
    covering = np.array([[float(unit in choice.covers) for choice in choices] for unit in units])
    solution = milp(
        price,
        integrality=np.ones(len(choices) + len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[
            *constraints,
            LinearConstraint(np.pad(covering, ((0, 0), (0, len(pairs)))), -np.inf, 1.0),
            *_products(len(choices), pairs),
        ],
        options={"time_limit": TIME_LIMIT, "mip_rel_gap": 1e-4},
    )
    if solution.x is None:
        return None
    return {place for place, taken in enumerate(solution.x[: len(choices)]) if taken > 0.5}


def _products(count: int, pairs: Sequence[Pair]) -> list[LinearConstraint]:
    """Return the constraints by which the variable of each pair is the product of its edits': at most either, and at
    least their sum less 1."""
    rows, least, most = [], [], []
    for place, (first, second, _) in enumerate(pairs):
        for parts, low, high in (((first,), -np.inf, 0.0), ((second,), -np.inf, 0.0), ((first, second), -1.0, np.inf)):
            row = np.zeros(count + len(pairs))
            row[count + place] = 1.0
            row[list(parts)] = -1.0
            rows.append(row)
            least.append(low)
            most.append(high)
    return [LinearConstraint(np.array(rows), least, most)] if rows else []
