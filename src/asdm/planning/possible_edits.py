"""The edits that a plan can choose, with what each saves and costs; and the plan of a choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from asdm.choices import CompensationKind
from asdm.edits import Remove, UnitEdit, parse_edits
from asdm.errors import AsdmError
from asdm.planning.finished import empty_teacher
from asdm.sensitivity.profile import EditRecord, RedundancyMap, UnitRecord
from asdm.student.plan import PlanBase, PlanMetrics, PruningPlan, SpeedupBasis

Resource = Literal["parameters", "macs", "ms"]
Pair = tuple[int, int, float]  # places of two edits in a list, and what they save together beyond the sum


@dataclass(frozen=True)
class PossibleEdit:
    """An edit that a plan can choose.

    `covers`: units that no other edit of the plan may then change. `parameters`, `macs` (per sample) and `ms` (of a
    call) are what it saves; `sensitivity` is what it costs. `enlarges`: how many times as much the removal of other
    parts saves beside it, by their names.
    """

    edit: UnitEdit
    covers: frozenset[str]
    parameters: float
    macs: float
    ms: float
    sensitivity: float
    enlarges: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("parameters", "macs", "ms", "sensitivity"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise AsdmError(f"{self.edit}: {name}={value}: must be finite; make the profile again")


def possible_edits(redundancy: RedundancyMap, compensate: CompensationKind) -> list[PossibleEdit]:
    """Return all edits of a profile: the removals of its units first, in their order, with this compensation."""
    names = [unit.name for unit in redundancy.units]
    choices = []
    for unit in redundancy.units:
        removal = Remove(unit=unit.name, compensate=compensate)
        covers = removal.covers(names, redundancy.family)
        choices.append(_possible(redundancy, unit, removal, covers, "none" if unit.projection_folds else compensate))
    for other in redundancy.others:
        (edit,) = parse_edits([other.edit])
        if other.channels:
            edit = edit.with_compensation(compensate)
        if not isinstance(edit, UnitEdit):
            raise AsdmError(f"{edit}: in a profile, and not an edit of one unit; make the profile again")
        choices.append(_possible(redundancy, other, edit, other.covers, edit.compensation))
    return choices


def whole_layers(redundancy: RedundancyMap) -> list[PossibleEdit]:
    """Return all removals of a profile as they are where whole layers are dropped: a layer's shortcut goes too."""
    model, family = empty_teacher(redundancy), redundancy.family
    shortcuts = {unit.name: family.branch(model, unit.name).folds_into for unit in family.units(model)}
    positions = {unit.name: unit.positions for unit in redundancy.units}
    found = []
    for choice in possible_edits(redundancy, "none"):
        shortcut = shortcuts.get(choice.edit.unit)
        if shortcut is not None:
            layer: Any = model.get_submodule(shortcut)
            macs = choice.macs + layer.weight.numel() * positions[choice.edit.unit]
            parameters = choice.parameters + sum(p.numel() for p in layer.parameters())
            choice = replace(choice, parameters=parameters, macs=macs, ms=choice.ms * macs / max(choice.macs, 1))
        if choice.edit.is_removal:
            found.append(choice)
    return found


def _possible(
    redundancy: RedundancyMap,
    record: UnitRecord | EditRecord,
    edit: UnitEdit,
    covers: Sequence[str],
    projection: CompensationKind,
) -> PossibleEdit:
    """Return the edit with the cost of a new projection subtracted. The projection takes as long per MAC as the
    branch."""
    channels = record.channels
    new_parameters = {"none": 0, "bias": 1, "diagonal": 2, "linear": channels + 1}[projection] * channels
    new_macs = {"none": 0, "bias": 0, "diagonal": 1, "linear": channels}[projection] * channels * record.positions
    macs = record.gmacs * 1e9
    # Without reliable latencies a unit's share of the time is its share of the MACs.
    reliable = redundancy.has_reliable_latencies
    latency_ms = record.latency_ms if reliable else redundancy.latency_ms * record.gmacs / redundancy.gmacs
    return PossibleEdit(
        edit=edit,
        covers=frozenset(covers),
        parameters=record.parameters - new_parameters,
        macs=macs - new_macs,
        ms=latency_ms * (1 - min(1.0, new_macs / macs)) if macs else latency_ms,
        sensitivity=record.sensitivity,
        enlarges=record.enlarges if isinstance(record, EditRecord) else {},
    )


def joint_savings(choices: Sequence[PossibleEdit], resource: Resource) -> list[Pair]:
    """Return the pairs of edits that save more together than their sum: one removes what the other enlarges."""
    if resource == "parameters":
        return []
    places = {choice.edit.unit: place for place, choice in enumerate(choices) if choice.edit.is_removal}
    return [
        (place, places[name], (ratio - 1) * getattr(choices[places[name]], resource))
        for place, choice in enumerate(choices)
        for name, ratio in choice.enlarges.items()
        if name in places
    ]


def saved_by(chosen: Sequence[PossibleEdit], resource: Resource) -> float:
    """Return what edits save together."""
    together = sum(more for _, _, more in joint_savings(chosen, resource))
    return sum(getattr(choice, resource) for choice in chosen) + together


def plan_of(
    redundancy: RedundancyMap,
    chosen: Sequence[PossibleEdit],
    target: dict[str, float],
    basis: SpeedupBasis | None = None,
) -> PruningPlan:
    """Return the plan with these edits and its predicted metrics.

    Args:
        target: the budget, by the name of its resource.
        basis: what the speed-up was determined by.
    """
    sensitivity = sum(choice.sensitivity for choice in chosen)
    return PruningPlan(
        base=PlanBase.of(redundancy.fingerprint, redundancy.denoiser_class),
        edits=[choice.edit for choice in chosen],
        metrics=PlanMetrics(
            model=redundancy.model or None,
            target=target,
            predicted_sensitivity=None if redundancy.estimator is None else sensitivity,
            predicted_speedup=predicted_speedup(redundancy, chosen),
            speedup_basis=basis if redundancy.latency_ms else "macs",
        ),
    )


def time_or_macs(redundancy: RedundancyMap) -> tuple[Resource, float]:
    """Return what speed-ups are predicted by and how much of it the model takes: milliseconds, or MACs where no latency
    is known."""
    return ("ms", redundancy.latency_ms) if redundancy.latency_ms > 0 else ("macs", redundancy.gmacs * 1e9)


def predicted_speedup(redundancy: RedundancyMap, chosen: Sequence[PossibleEdit]) -> float:
    """Return the speed-up that these edits give by the profile's latencies, or its MACs where it has no latencies."""
    resource, total = time_or_macs(redundancy)
    return total / max(total - saved_by(chosen, resource), 1e-9)
