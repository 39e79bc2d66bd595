"""What edits save: parameters, MACs and milliseconds of the removal of each unit and of other edits."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from torch import nn

from asdm.edits import Edit, UnitEdit, edited
from asdm.families import Branch, Denoiser, Unit, denoiser_call, family_of
from asdm.measure.hooks import outputs_of
from asdm.measure.latency import Latency
from asdm.measure.macs import MacCount, counting_macs
from asdm.measure.modules import disagreement, module_latencies


@dataclass(frozen=True)
class Cost:
    """What modules cost: parameters, MACs per sample, and milliseconds of one call of the denoiser."""

    parameters: int
    macs: int
    macs_without_attention: int
    ms: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters - other.parameters,
            self.macs - other.macs,
            self.macs_without_attention - other.macs_without_attention,
            self.ms - other.ms,
        )


@dataclass(frozen=True)
class EditSaving(Cost):
    """What an edit saves.

    `enlarges`: how many times as many MACs other removals save beside the edit, by their names: of what then runs at a
    higher resolution.
    """

    enlarges: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Costs:
    """The cost of a whole denoiser, and what the removal of each unit saves.

    `positions`: pixels or tokens of a sample in each layer. `forwards_after`: the fraction of a call that comes after
    each layer. `latency_doubt`, `other_cores`: as in `RedundancyMap`.
    """

    model: Cost
    count: MacCount
    latency_doubt: float
    other_cores: float
    forwards_after: dict[str, float]
    positions: dict[str, int]
    savings: dict[str, Cost]


def measure_costs(model: Denoiser, units: Sequence[Unit], rounds: int) -> Costs:
    """Measure what the removal of each unit saves: its own cost and its norm's, less that of the shortcut that stays.

    Args:
        rounds: the least number of timed calls; 0 for no latencies.
    """
    family = family_of(model)
    layers = family.layers(model)
    with counting_macs(model) as count, outputs_of(model, layers) as outputs:
        denoiser_call(model, batch_size=1)()
    branches = {unit.name: family.branch(model, unit.name) for unit in units}
    timed = sorted({path for branch in branches.values() for path in [*_removed(branch), *_kept(branch)]})
    latencies, timing = module_latencies(model, denoiser_call(model), timed, device=model.device, rounds=rounds)
    total_ms = timing["model"].ms if rounds else 0.0
    doubt = disagreement(latencies[path] for branch in branches.values() for path in _removed(branch))
    positions = {}
    for layer, output in outputs.items():
        states = family.block_io(model, layer).image_states(output)
        positions[layer] = states.shape[2:].numel() if states.ndim == 4 else states.shape[1]
    savings = {}
    for name, branch in branches.items():
        removed, kept = (_cost_of(model, paths, count, latencies) for paths in (_removed(branch), _kept(branch)))
        savings[name] = replace(removed - kept, ms=max(0.0, removed.ms - kept.ms))
    return Costs(
        model=replace(_cost_of(model, [""], count, {}), ms=total_ms),
        count=count,
        latency_doubt=doubt + timing.contention_of("model"),
        other_cores=timing.other_cores,
        forwards_after=_forwards_after(layers, latencies, total_ms),
        positions=positions,
        savings=savings,
    )


def _removed(branch: Branch) -> list[str]:
    """Module paths that go with a unit. A gated branch leaves its norm, which stays in use outside it."""
    return [branch.path] if branch.norm is None or branch.is_gated else [branch.path, branch.norm]


def _kept(branch: Branch) -> list[str]:
    """Module paths inside those of `_removed` that stay."""
    return [] if branch.folds_into is None else [branch.folds_into]


def _cost_of(model: Denoiser, paths: Sequence[str], count: MacCount, latencies: Mapping[str, Latency]) -> Cost:
    """Return the cost of the modules at these paths; "" is the whole model. Modules without a latency count as 0 ms."""
    return Cost(
        parameters=sum(p.numel() for path in paths for p in model.get_submodule(path).parameters()),
        macs=sum(map(count.below, paths)),
        macs_without_attention=sum(count.below(path, with_attention=False) for path in paths),
        ms=sum(latencies[path].ms for path in paths if path in latencies),
    )


def _forwards_after(layers: Sequence[str], latencies: Mapping[str, Latency], total_ms: float) -> dict[str, float]:
    """Return the fraction of a call that comes after each layer: what an exact ablation of that layer must compute."""
    elapsed, after = 0.0, {}
    for layer in layers:
        elapsed += latencies[layer].ms if layer in latencies else 0.0
        after[layer] = max(0.0, total_ms - elapsed) / total_ms if total_ms else 0.0
    return after


def measure_edits(model: Denoiser, edits: Sequence[Edit], costs: Costs, rounds: int) -> list[EditSaving]:
    """Measure what each of these edits saves.

    Edits that are measured together are made at once, and each counts its own modules alone. Where an edit is measured
    alone, its parameters and MACs are those of the whole model. What it enlarges takes longer in proportion to its MACs
    (inferred).

    Args:
        rounds: the least number of timed calls; 0 for no latencies.
    """
    if not edits:
        return []
    family = family_of(model)
    layers = [unit.name for unit in family.units(model) if unit.parent is None]
    changed = {edit: _called(model, edit.changed_paths(model, family)) for edit in edits}
    counted = {edit: [""] if edit.measured_with is None else changed[edit] for edit in edits}
    everything = sorted({path for paths in changed.values() for path in paths})
    before_ms, _ = module_latencies(model, denoiser_call(model), everything, device=model.device, rounds=rounds)
    before = {edit: _cost_of(model, counted[edit], costs.count, {}) for edit in edits}
    removals = _paths_of_removals(model, edits)
    savings: dict[Edit, EditSaving] = {}
    for group in groups_measured_together(edits):
        after_ms: dict[str, Latency] = {}
        with ExitStack() as stack:
            for edit in group:
                stack.enter_context(edited(model, edit, family))
            with counting_macs(model) as count:
                denoiser_call(model, batch_size=1)()
            computed = [path for edit in group if not edit.is_removal for path in changed[edit]]
            if computed:
                call = denoiser_call(model)
                after_ms, _ = module_latencies(model, call, computed, device=model.device, rounds=rounds)
            after = {edit: _cost_of(model, counted[edit], count, {}) for edit in group}
        for edit in group:
            saved_ms = sum(
                before_ms[path].ms - (after_ms[path].ms if path in after_ms else 0.0) for path in changed[edit]
            )
            saved = before[edit] - after[edit]
            enlarges = _enlarged(removals, costs.count, count) if edit.measured_with is None else {}
            slower = sum(costs.savings[unit].ms * (enlarges[unit] - 1) for unit in layers if unit in enlarges)
            savings[edit] = EditSaving(**vars(replace(saved, ms=saved_ms - slower)), enlarges=enlarges)
    return [savings[edit] for edit in edits]


def _called(model: Denoiser, paths: Sequence[str]) -> list[str]:
    """Return the paths with those of a list's modules in the place of the list's, which is never called."""
    found = []
    for path in paths:
        module = model.get_submodule(path)
        is_list = isinstance(module, nn.ModuleList)
        found += [f"{path}.{name}" for name, _ in module.named_children()] if is_list else [path]
    return found


def _paths_of_removals(model: Denoiser, edits: Sequence[Edit]) -> dict[str, list[str]]:
    """Return the modules that go with each unit, and with each larger part that these edits remove."""
    family = family_of(model)
    units = {unit.name: [family.branch(model, unit.name).path] for unit in family.units(model)}
    parts = {
        edit.unit: edit.changed_paths(model, family) for edit in edits if isinstance(edit, UnitEdit) and edit.is_removal
    }
    return units | parts


def _enlarged(removals: Mapping[str, Sequence[str]], before: MacCount, after: MacCount) -> dict[str, float]:
    """Return how many times as many MACs the modules of each removal take after an edit, where they take more."""
    ratios = {
        name: sum(map(after.below, paths)) / max(sum(map(before.below, paths)), 1) for name, paths in removals.items()
    }
    return {name: ratio for name, ratio in ratios.items() if ratio > 1}


def groups_measured_together(edits: Sequence[Edit]) -> list[list[Edit]]:
    """Return the edits in groups that are measured together."""
    groups: dict[Hashable, list[Edit]] = {}
    for edit in edits:
        groups.setdefault(edit if edit.measured_with is None else ("together", edit.measured_with), []).append(edit)
    return list(groups.values())
