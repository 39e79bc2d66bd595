"""Portable plans: the least sensitive student that is a stock UNet of a shape which every program reads.

The shapes are few enough to try each. Which transformer blocks stay in a shape is chosen by their sensitivities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from asdm.errors import AsdmError
from asdm.families import Denoiser
from asdm.families.records import PortableShape
from asdm.measure.latency import Ratio
from asdm.planning.possible_edits import PossibleEdit, Resource, plan_of, saved_by, whole_layers
from asdm.planning.program import EDIT_PRICE
from asdm.planning.speedup import CORRECTIONS, MEASUREMENT_MARGIN, is_precise, measured_speedup, with_measured
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan, SpeedupBasis

_ATTEMPTS = 3  # of plans for a measured speed-up


def portable_plan(
    redundancy: RedundancyMap,
    budget: Mapping[str, float],
    *,
    unet: Denoiser | None = None,
    fitted: bool = True,
    rounds: int = 5,
    note: Callable[[str], None] | None = None,
) -> PruningPlan:
    """Return the plan of least total sensitivity within a budget whose student is a stock UNet that programs read.

    Sensitivities and savings are sums over the layers and transformer blocks that go.

    Args:
        budget: one of speedup, params and macs, as for `make_plan`.
        unet: to measure a speed-up with; without it the profile's latencies or MACs decide.
        fitted: fit projections in the place of attentions and transformer blocks that go, where they fold.

    Raises:
        AsdmError: no such student reaches the budget, or no program reads a student of this model.
    """
    ((name, value),) = budget.items()
    choices = {choice.edit.unit: choice for choice in whole_layers(redundancy)}
    shapes = redundancy.family.portable_shapes(redundancy.unet_config, [unit.name for unit in redundancy.units])
    search = _Search(redundancy, choices, shapes, dict(budget), fitted)
    if name != "speedup":
        total = redundancy.parameters if name == "params" else redundancy.gmacs * 1e9
        kept = value if value <= 1 else value / total
        return search.plan("parameters" if name == "params" else "macs", total * (1 - kept), total)
    by_latency = redundancy.has_reliable_latencies
    total = redundancy.latency_ms if by_latency else redundancy.gmacs * 1e9
    aim = value * (MEASUREMENT_MARGIN if unet is not None else CORRECTIONS["latency" if by_latency else "macs"])
    return _measured(search, "ms" if by_latency else "macs", total, aim, value, unet, rounds, note)


def _measured(
    search: _Search,
    resource: Resource,
    total: float,
    aim: float,
    target: float,
    unet: Denoiser | None,
    rounds: int,
    note: Callable[[str], None] | None,
) -> PruningPlan:
    """Return the first plan whose measured speed-up reaches the target; where none can be measured, the first.

    Raises:
        AsdmError: no plan reaches it.
    """
    fastest = 0.0
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            plan = search.plan(resource, total * (1 - 1 / aim), total)
        except AsdmError:
            if not fastest:
                raise
            break
        if unet is None:
            return plan
        measured: Ratio = measured_speedup(unet, plan, rounds)
        if note is not None:
            note(f"attempt {attempt}; measured: {measured}; requested: {target:g}x")
        if not is_precise(measured):
            return plan
        if measured.value >= target:
            return with_measured(plan, measured)
        fastest = max(fastest, measured.value)
        aim *= MEASUREMENT_MARGIN * target / measured.value
    raise AsdmError(
        f"portable: speedup={target:g}: out of reach of students that every program reads; measured {fastest:.2f}x at "
        "most; ask for less, or plan without --portable"
    )


@dataclass(frozen=True)
class _Student:
    """A shape with its transformer blocks chosen, and what that costs and saves."""

    shape: PortableShape
    blocks: tuple[str, ...]  # transformer blocks that go, beside those of the shape
    removed: tuple[PossibleEdit, ...]

    @property
    def sensitivity(self) -> float:
        return sum(choice.sensitivity for choice in self.removed) + EDIT_PRICE * len(self.removed)


@dataclass(frozen=True)
class _Search:
    redundancy: RedundancyMap
    choices: Mapping[str, PossibleEdit]
    shapes: list[PortableShape]
    target: dict[str, float]
    fitted: bool

    def plan(self, resource: Resource, needed: float, total: float) -> PruningPlan:
        """Return the plan of the least sensitive student that saves this much.

        Raises:
            AsdmError: none does; the message says what remains at least.
        """
        best, most = None, 0.0
        for shape in self.shapes:
            fixed = self._removed(shape.gone) + self._cheapest(shape)
            saved = saved_by(fixed, resource)
            floor = sum(choice.sensitivity for choice in fixed)
            most = max(most, saved + self._most_free(shape, resource))
            if best is not None and floor >= best.sensitivity:
                continue
            student = self._filled(shape, fixed, resource, needed - saved)
            if student is not None and (best is None or student.sensitivity < best.sensitivity):
                best = student
        if best is None:
            raise AsdmError(
                f"portable: the budget {self.target} is out of reach of students that every program reads; at least "
                f"{1 - most / total:.3f} of the original remains; ask for less, or plan without --portable"
            )
        blocks = sorted({*best.shape.edit.transformer_blocks, *best.blocks})
        fitted = self.fitted and bool(blocks or not best.shape.edit.mid_attention)
        edit = replace(best.shape.edit, transformer_blocks=blocks, fitted=fitted)
        basis: SpeedupBasis = "latency" if resource == "ms" else "macs"
        plan = plan_of(self.redundancy, best.removed, self.target, basis if "speedup" in self.target else None)
        return plan.model_copy(update={"edits": [edit]})

    def _removed(self, names: list[str]) -> list[PossibleEdit]:
        """Return the records of what goes; a part without one of its own by its units."""
        found = []
        for name in names:
            if name in self.choices:
                found.append(self.choices[name])
            else:
                inside = [unit for unit in self.choices if unit.startswith(f"{name}.") and unit.count(".") <= 3]
                found += [self.choices[unit] for unit in inside]
        return found

    def _blocks(self, attention: str) -> list[list[PossibleEdit]]:
        """Return the branches of each transformer block of an attention."""
        found: dict[int, list[PossibleEdit]] = {}
        for name, choice in self.choices.items():
            owner, _, rest = name.partition(".transformer_blocks.")
            if owner == attention and rest:
                found.setdefault(int(rest.partition(".")[0]), []).append(choice)
        return [found[number] for number in sorted(found)]

    def _by_sensitivity(self, attention: str) -> list[list[PossibleEdit]]:
        return sorted(self._blocks(attention), key=lambda block: sum(choice.sensitivity for choice in block))

    def _cheapest(self, shape: PortableShape) -> list[PossibleEdit]:
        """Return the branches that go where a shape fixes the number of transformer blocks."""
        found: list[PossibleEdit] = []
        for attention, kept in shape.depths.items():
            blocks = self._by_sensitivity(attention)
            found += [choice for block in blocks[: len(blocks) - kept] for choice in block]
        return found

    def _most_free(self, shape: PortableShape, resource: Resource) -> float:
        return sum(
            getattr(choice, resource)
            for attention in shape.free
            for block in self._by_sensitivity(attention)[:-1]
            for choice in block
        )

    def _filled(
        self, shape: PortableShape, fixed: list[PossibleEdit], resource: Resource, needed: float
    ) -> _Student | None:
        """Choose the transformer blocks that also go, so that enough is saved; one stays in each attention."""
        free = [block for attention in shape.free for block in self._by_sensitivity(attention)[:-1]]
        chosen = _least_sensitive(free, resource, needed)
        if chosen is None:
            return None
        removed = [*fixed, *(choice for block in chosen for choice in block)]
        blocks = {name.rpartition(".")[0] for choice in removed if ".transformer_blocks." in (name := choice.edit.unit)}
        return _Student(shape, tuple(sorted(blocks)), tuple(removed))


def _least_sensitive(
    blocks: list[list[PossibleEdit]], resource: Resource, needed: float
) -> list[list[PossibleEdit]] | None:
    """Return the blocks of least total sensitivity that save enough together; None where all do not."""
    if needed <= 0:
        return []
    savings = np.array([sum(getattr(choice, resource) for choice in block) for block in blocks])
    if savings.sum() < needed:
        return None
    price = np.array([sum(choice.sensitivity for choice in block) for block in blocks]) + EDIT_PRICE
    scale = savings.max()
    solution = milp(
        price,
        integrality=np.ones(len(blocks)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(savings[None] / scale, needed / scale, np.inf),
    )
    return None if solution.x is None else [block for block, x in zip(blocks, solution.x, strict=True) if x > 0.5]
