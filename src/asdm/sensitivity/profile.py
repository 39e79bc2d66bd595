"""Which units of a UNet are redundant: what each costs, and how far the prediction moves without it; and the same of
the other edits that a plan can choose, global-regional attention and the removal of whole stages.

Changes no model: edits are made for the length of one call and taken back.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from pydantic import Field, ValidationError
from torch import Tensor

from asdm import checks
from asdm.choices import CompensationKind
from asdm.compensation.fitting import Map, compensating, unit_maps
from asdm.data.calibration import CalibrationCall, calibration_calls, require_calibration
from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.kinds import is_random
from asdm.edits import GriAttention, Remove, UnitEdit
from asdm.edits.surgery import edited, replaced_paths, swapped
from asdm.errors import AsdmError, one_line
from asdm.families import family_of
from asdm.families.tensors import fingerprint
from asdm.families.unet_calls import unet_call
from asdm.families.unet_structure import (
    TRANSFORMER_BRANCHES,
    Unit,
    UnitKind,
    block_of,
    execution_order,
    is_covered_by,
    layers,
    removable_units,
)
from asdm.files import write_text
from asdm.measure.hooks import CachedOutput, outputs_of, preserve_module_state, tensor_of
from asdm.measure.latency import Latency, seconds_of
from asdm.measure.macs import MacCount, counting_macs
from asdm.measure.modules import disagreement, module_latencies
from asdm.records import Record, first_fault
from asdm.sensitivity.taylor import taylor_sensitivity

Progress = Callable[[int, int, str], None]
Sensitivity = Literal["ablation", "taylor"]
TAYLOR_PROBES = 2
RELIABLE = 0.1  # doubt about the units' latencies up to which a plan goes by them
MANY_TOKENS = 256  # from here on global-regional attention can pay
EVEN_MORE_TOKENS = 4096  # from here on with smaller regions and coarser global tokens


class UnitRecord(Record):
    """One unit's cost and sensitivity.

    `gmacs` counts attention products, `gmacs_without_attention` does not; both per sample. `latency_ms`
    is what removal saves of one UNet call (its kept shortcut subtracted), `latency_share` its part of
    that call. `channels` of its hidden states and `positions` (pixels) of a sample tell what a map in its
    place would cost, which is nothing where `has_shortcut`. `sensitivity` is
    |prediction without it - prediction|^2 / |prediction|^2, averaged over time steps and prompts (inferred), with the
    map in its place that the redundancy map's `compensate` names.
    """

    name: str
    kind: UnitKind
    parent: str | None
    parameters: int
    gmacs: float
    gmacs_without_attention: float
    latency_ms: float
    latency_share: float
    channels: int = 0
    positions: int = 0
    has_shortcut: bool = False
    sensitivity: float
    sensitivity_by_timestep: dict[int, float]

    @property
    def block(self) -> str:
        return block_of(self.name)


class EditRecord(Record):
    """What an edit other than a unit's removal saves and costs; fields as a UnitRecord's, `sensitivity` without a map
    in its place.

    `covers`: the units that it takes away or changes, so that no other edit of a plan can.
    """

    edit: dict[str, Any]
    covers: list[str]
    parameters: int
    gmacs: float
    gmacs_without_attention: float
    latency_ms: float
    channels: int = 0
    positions: int = 0
    sensitivity: float
    sensitivity_by_timestep: dict[int, float]


class RedundancyMap(Record):
    """Every removable unit of a UNet with what it costs and what it is worth, as a table.

    `estimator` is None where there are neither sensitivities nor latencies. `latency_doubt`: half the intervals of all
    units' latencies together, relative to these, and what other processes took of the cores; `other_cores`: how many
    they kept busy. `unet_forwards` is how many UNet calls' worth of time the sensitivities took, `necessary_forwards`
    the least that an exact ablation needs when no prefix is computed twice.
    """

    model: str
    fingerprint: str
    denoiser_class: str = "UNet2DConditionModel"  # of maps that were saved before it was noted
    unet_config: dict[str, Any]
    parameters: int = Field(gt=0)
    gmacs: float = Field(gt=0)
    gmacs_without_attention: float
    latency_ms: float = Field(ge=0)
    latency_doubt: float = 0.0
    other_cores: float | None = None
    latency_batch_size: int
    dtype: str
    threads: int
    timesteps: list[int]
    prompts: int
    seed: int
    estimator: Sensitivity | None = "ablation"
    compensate: CompensationKind = "none"
    unet_forwards: float
    necessary_forwards: float
    seconds: float
    units: list[UnitRecord]
    others: list[EditRecord] = []

    @property
    def has_reliable_latencies(self) -> bool:
        """Whether the machine was quiet enough to tell what each unit takes."""
        return self.latency_doubt <= RELIABLE

    def save(self, path: str | Path) -> None:
        write_text(Path(path), json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RedundancyMap:
        """Read a map.

        Raises:
            AsdmError: no such file, or not a map.
        """
        path = Path(path)
        if not path.is_file():
            raise AsdmError(f"{path}: no such redundancy map; make one with `asdm analyze`")
        try:
            return cls.model_validate_json(path.read_text("utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            told = first_fault(error) if isinstance(error, ValidationError) else one_line(error)
            raise AsdmError(f"{path}: not a redundancy map: {told}; make one with `asdm analyze`") from None


@checks.arguments(
    pipeline=checks.PIPELINE,
    data=checks.path,
    prompts=checks.PROMPTS,
    timesteps=checks.TIMESTEPS,
    samples=checks.SAMPLES,
    sensitivity=checks.literal(Sensitivity),
    compensate=checks.literal(CompensationKind),
    latency_rounds=checks.ROUNDS,
    seed=checks.SEED,
    progress=checks.function,
)
@torch.no_grad()
def analyze(
    pipeline: DiffusionPipeline,
    *,
    data: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    sensitivity: Sensitivity | None = None,
    compensate: CompensationKind | None = None,
    timesteps: int | None = None,
    samples: int | None = None,
    latency_rounds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> RedundancyMap:
    """Cost and sensitivity of every removable unit of the pipeline's UNet.

    Args:
        data: images with captions to calibrate on (as for `open_data`); without it, latents that the
            pipeline itself makes from `prompts` (pure noise where its weights are random).
        prompts: captions; `DEFAULT_PROMPTS` where neither they nor `data` are given.
        sensitivity: "ablation", the default, removes each unit and compares, exactly; "taylor" estimates all units from
            a few forward and backward passes, for UNets that are large or many, and by default where the weights are
            random.
        compensate: what a plan will fit in the place of the removed branches, by default linear maps, and nothing where
            the weights are random: an ablation then tries each unit with the map that stands best in its place.
            Taylor's estimate is of plain removal.
        timesteps: at how many time steps, the middles of equal parts of the schedule; by default 4, at more than
            32x32 latents 2.
        samples: how many images or prompts; by default 16 at up to 32x32 latents, else 1.
        latency_rounds: the least number of timed UNet calls at batch 2 (one image with guidance); more follow on a
            busy machine.
        progress: called with units done, units in all, and the unit's name.

    Returns:
        The map, with `unet_forwards` and `necessary_forwards` to judge its own cost by.

    Raises:
        AsdmError: the data folder cannot be used.
    """
    require_calibration(pipeline, data)
    started = time.perf_counter()
    sensitivity = sensitivity or ("taylor" if is_random(pipeline) else "ablation")
    compensate = compensate or ("none" if is_random(pipeline) else "linear")
    unet: UNet2DConditionModel = pipeline.unet
    units = removable_units(unet)
    with preserve_module_state(unet):
        unet.eval()
        if progress is not None:
            progress(0, len(units), "measuring what each unit costs")
        costs = _measure_costs(unet, units, latency_rounds)
        regional, level_removals = _regional_attentions(unet, units, costs), _level_removals(unet)
        other_edits: list[GriAttention | Remove] = [*regional, *level_removals]
        others = _measure_others(unet, other_edits, costs, latency_rounds)
        other_trials = trials_of(unet, other_edits)
        everything = [*trials_of(unet, [Remove(unit=unit.name) for unit in units]), *other_trials]
        timesteps = timesteps or (2 if latent_shape(pipeline)[1] > 32 else 4)
        calls = calibration_calls(pipeline, data, prompts, timesteps, samples, seed)
        if sensitivity == "taylor":
            forward = _record(unet, [], calls[0].arguments)[2]
            # What a whole stage does is not of the first order, and there are two of them.
            level_trials = other_trials[len(regional) :]
            of_levels: dict[str, dict[int, float]] = {trial.name: {} for trial in level_trials}

            def levels_too(call: CalibrationCall, outputs: dict[str, Any], prediction: Tensor) -> None:
                for name, error in _ablated(unet, level_trials, call, outputs, prediction).items():
                    of_levels[name][call.timestep] = error

            before = time.perf_counter()
            errors = taylor_sensitivity(
                unet,
                units,
                calls,
                regional=regional,
                probes=TAYLOR_PROBES,
                seed=seed,
                progress=progress,
                recording=execution_order(unet),
                recorded=levels_too,
            )
            forwards = (time.perf_counter() - before) / forward
            errors |= of_levels
        else:
            forwards = 0.0
            if compensate != "none":
                others_seen = calibration_calls(pipeline, data, prompts, timesteps, samples, seed + 1)
                maps, forwards = unit_maps(unet, units, others_seen, compensate), float(len(calls))
                removals = [Remove(unit=unit.name, compensate=compensate) for unit in units]
                everything = [*trials_of(unet, removals, maps), *other_trials]
            errors, more = ablate(unet, everything, calls, progress)
            forwards += more
    records = _unit_records(unet, units, costs, errors)
    return RedundancyMap(
        model=str(pipeline.config.get("_name_or_path") or ""),
        fingerprint=fingerprint(unet),
        denoiser_class=family_of(unet).model_class.__name__,
        unet_config=plain_config(unet),
        parameters=sum(p.numel() for p in unet.parameters()),
        gmacs=costs.count.below() / 1e9,
        gmacs_without_attention=costs.count.below(with_attention=False) / 1e9,
        latency_ms=costs.latency_ms,
        latency_doubt=costs.latency_doubt,
        other_cores=costs.other_cores,
        latency_batch_size=2,
        dtype=str(unet.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        timesteps=[call.timestep for call in calls],
        prompts=len(calls[0].arguments["sample"]),
        seed=seed,
        estimator=sensitivity,
        compensate=compensate if sensitivity == "ablation" else "none",
        unet_forwards=forwards,
        necessary_forwards=len(calls) * (1 + sum(costs.forwards_after[trial.layer] for trial in everything)),
        seconds=time.perf_counter() - started,
        units=records,
        others=[
            other.model_copy(
                update={
                    "sensitivity": _mean(errors[trial.name]),
                    "sensitivity_by_timestep": errors[trial.name],
                }
            )
            for other, trial in zip(others, other_trials, strict=True)
        ],
    )


@torch.no_grad()
def structure_map(unet: UNet2DConditionModel, model: str = "") -> RedundancyMap:
    """The parameters and MACs of every unit, without latencies and sensitivities: enough for a preset.

    It takes a second, and needs no weights: the UNet may be on the meta device.

    Args:
        model: the name that the map gives the UNet.
    """
    started = time.perf_counter()
    with preserve_module_state(unet):
        unet.eval()
        units = removable_units(unet)
        costs = _measure_costs(unet, units, 0)
        edits: list[GriAttention | Remove] = [*_regional_attentions(unet, units, costs), *_level_removals(unet)]
        others = _measure_others(unet, edits, costs, 0)
    return RedundancyMap(
        model=model,
        fingerprint=fingerprint(unet),
        denoiser_class=family_of(unet).model_class.__name__,
        unet_config=plain_config(unet),
        parameters=costs.parameters,
        gmacs=costs.count.below() / 1e9,
        gmacs_without_attention=costs.count.below(with_attention=False) / 1e9,
        latency_ms=0.0,
        latency_doubt=1.0,
        latency_batch_size=2,
        dtype=str(unet.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        timesteps=[],
        prompts=0,
        seed=0,
        estimator=None,
        unet_forwards=0.0,
        necessary_forwards=0.0,
        seconds=time.perf_counter() - started,
        units=_unit_records(unet, units, costs, {unit.name: {} for unit in units}),
        others=others,
    )


def _unit_records(
    unet: UNet2DConditionModel, units: list[Unit], costs: _Costs, errors: Mapping[str, dict[int, float]]
) -> list[UnitRecord]:
    return [
        UnitRecord(
            name=unit.name,
            kind=unit.kind,
            parent=unit.parent,
            parameters=costs.removed_parameters[unit.name],
            gmacs=costs.removed_macs[unit.name] / 1e9,
            gmacs_without_attention=costs.removed_plain_macs[unit.name] / 1e9,
            latency_ms=costs.removed_ms[unit.name],
            latency_share=costs.removed_ms[unit.name] / costs.latency_ms if costs.latency_ms else 0.0,
            channels=_channels(unet, unit),
            positions=costs.positions[unit.layer],
            has_shortcut=unit.kind == "resnet" and unet.get_submodule(unit.name).conv_shortcut is not None,
            sensitivity=_mean(errors[unit.name]),
            sensitivity_by_timestep=errors[unit.name],
        )
        for unit in units
    ]


def _mean(by_timestep: Mapping[int, float]) -> float:
    return sum(by_timestep.values()) / max(len(by_timestep), 1)


def plain_config(unet: UNet2DConditionModel) -> dict[str, Any]:
    """A UNet's config as JSON has it: without private entries, lists for tuples."""
    return json.loads(json.dumps({key: value for key, value in unet.config.items() if not key.startswith("_")}))


# -- costs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Costs:
    parameters: int
    count: MacCount
    latency_ms: float
    latency_doubt: float
    other_cores: float
    forwards_after: dict[str, float]
    removed_parameters: dict[str, int]
    removed_macs: dict[str, int]
    removed_plain_macs: dict[str, int]
    removed_ms: dict[str, float]
    positions: dict[str, int]


def _measure_costs(unet: UNet2DConditionModel, units: list[Unit], rounds: int) -> _Costs:
    """What removal of each unit saves: its own cost and its norm's, less its shortcut's, which stays.

    Args:
        rounds: the least number of timed calls; 0 for no latencies.
    """
    with counting_macs(unet) as count, outputs_of(unet, layers(unet)) as outputs:
        unet_call(unet, batch_size=1)()
    parts = {unit.name: _parts(unet, unit) for unit in units}
    timed = sorted({path for gone, kept in parts.values() for path in [*gone, *kept]})
    latencies, timing = module_latencies(unet, unet_call(unet), timed, device=unet.device, rounds=rounds)
    total_ms = timing["model"].ms if rounds else 0.0

    def saved(measure: Callable[[str], float], unit: Unit) -> float:
        gone, kept = parts[unit.name]
        return sum(map(measure, gone)) - sum(map(measure, kept))

    def parameters(path: str) -> int:
        return sum(p.numel() for p in unet.get_submodule(path).parameters())

    removed_ms = {unit.name: max(0.0, saved(lambda path: latencies[path].ms, unit)) for unit in units}
    # An exact ablation computes, for each edit, all that comes after the first layer that it changes.
    elapsed, after = 0.0, {}
    for layer in layers(unet):
        elapsed += latencies[layer].ms if layer in latencies else 0.0
        after[layer] = max(0.0, total_ms - elapsed)
    return _Costs(
        parameters=sum(p.numel() for p in unet.parameters()),
        count=count,
        latency_ms=total_ms,
        latency_doubt=disagreement(latencies[path] for gone, _ in parts.values() for path in gone)
        + timing.contention_of("model"),
        other_cores=timing.other_cores,
        forwards_after={layer: time / total_ms if total_ms else 0.0 for layer, time in after.items()},
        removed_parameters={unit.name: int(saved(parameters, unit)) for unit in units},
        removed_macs={unit.name: int(saved(count.below, unit)) for unit in units},
        removed_plain_macs={
            unit.name: int(saved(lambda path: count.below(path, with_attention=False), unit)) for unit in units
        },
        removed_ms=removed_ms,
        positions={layer: tensor_of(output).shape[2:].numel() for layer, output in outputs.items()},
    )


def gri_kinds(tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Regions and pooling of GRI for a map of so many tokens: a nearer and a faster kind."""
    return ((4, 4), (8, 8)) if tokens >= EVEN_MORE_TOKENS else ((4, 2), (4, 4))


def _regional_attentions(unet: UNet2DConditionModel, units: list[Unit], costs: _Costs) -> list[GriAttention]:
    """GRI, a nearer and a faster kind, for the self-attentions that meet many tokens, where the edit is allowed."""
    edits = []
    for unit in units:
        if unit.kind == "self_attention" and costs.positions[unit.layer] >= MANY_TOKENS:
            for regions, pool in gri_kinds(costs.positions[unit.layer]):
                edit = GriAttention(unit=unit.name, regions=regions, pool=pool, weighted=True)
                with suppress(AsdmError), edited(unet, edit):
                    edits.append(edit)
    return edits


def _level_removals(unet: UNet2DConditionModel) -> list[Remove]:
    """The mid block and the innermost stage, where they can go."""
    edits = []
    for name in ("mid_block", f"down_blocks.{len(unet.down_blocks) - 1}"):
        edit = Remove(unit=name)
        if any(layer.startswith(f"{name}.") for layer in layers(unet)):
            with suppress(AsdmError), edited(unet, edit):
                edits.append(edit)
    return edits


def _measure_others(
    unet: UNet2DConditionModel, edits: Sequence[GriAttention | Remove], costs: _Costs, rounds: int
) -> list[EditRecord]:
    """What the edits save; their sensitivity is filled in later.

    Regional attentions of one kind are looked at together, as each changes its own unit alone.
    """
    paths = {edit: [edit.unit] if isinstance(edit, GriAttention) else replaced_paths(unet, edit) for edit in edits}
    everything = sorted({path for each in paths.values() for path in each})
    call, before = unet_call(unet), dict[str, Latency]()
    if edits:
        before, _ = module_latencies(unet, call, everything, device=unet.device, rounds=rounds)
    kinds: dict[tuple[int, int], list[GriAttention]] = defaultdict(list)
    for edit in edits:
        if isinstance(edit, GriAttention):
            kinds[edit.regions, edit.pool].append(edit)
    records: dict[GriAttention | Remove, EditRecord] = {}
    for regional in kinds.values():
        with ExitStack() as stack:
            for edit in regional:
                stack.enter_context(edited(unet, edit))
            after = _counted(unet)
            times, _ = module_latencies(unet, call, [e.unit for e in regional], device=unet.device, rounds=rounds)
        for edit in regional:
            saved = _saved_macs(costs.count, after, edit.unit)
            saved_ms = before[edit.unit].ms - times[edit.unit].ms
            records[edit] = EditRecord(edit=edit.to_dict(), **_saving(unet, edit, 0, saved, saved_ms))
    for edit in edits:
        if isinstance(edit, Remove):
            with edited(unet, edit):
                after = _counted(unet)
                parameters = costs.parameters - sum(p.numel() for p in unet.parameters())
            saved = _saved_macs(costs.count, after)
            saved_ms = sum(before[path].ms for path in paths[edit])
            middle = edit.unit == "mid_block"
            records[edit] = EditRecord(
                edit=edit.to_dict(),
                channels=unet.config.block_out_channels[-1] if middle else 0,
                positions=costs.positions[first_layer(unet, edit)] if middle else 0,
                **_saving(unet, edit, parameters, saved, saved_ms),
            )
    return [records[edit] for edit in edits]


def _saved_macs(before: MacCount, after: MacCount, name: str = "") -> list[int]:
    """With attention products, and without them."""
    return [before.below(name, with_attention=each) - after.below(name, with_attention=each) for each in (True, False)]


def _saving(
    unet: UNet2DConditionModel, edit: GriAttention | Remove, parameters: int, macs: list[int], milliseconds: float
) -> dict[str, Any]:
    """The fields of an edit's record that say what it saves, its sensitivity still unknown."""
    return {
        "covers": [unit.name for unit in removable_units(unet) if is_covered_by(unit.name, [edit.unit])],
        "parameters": parameters,
        "gmacs": macs[0] / 1e9,
        "gmacs_without_attention": macs[1] / 1e9,
        "latency_ms": milliseconds,
        "sensitivity": 0.0,
        "sensitivity_by_timestep": {},
    }


def _counted(unet: UNet2DConditionModel) -> MacCount:
    with counting_macs(unet) as count:
        unet_call(unet, batch_size=1)()
    return count


def first_layer(unet: UNet2DConditionModel, edit: UnitEdit) -> str:
    """The first layer, in order of execution, that an edit changes."""
    unit = f"{edit.unit}."
    return next(name for name in layers(unet) if unit.startswith(f"{name}.") or name.startswith(unit))


def _channels(unet: UNet2DConditionModel, unit: Unit) -> int:
    """Channels of the hidden states that a unit's branch is added to, as it receives them."""
    if unit.kind in ("resnet", "attention"):
        return unet.get_submodule(unit.name).in_channels
    return unet.get_submodule(unit.name.rpartition(".")[0]).dim


def _parts(unet: UNet2DConditionModel, unit: Unit) -> tuple[list[str], list[str]]:
    """Module paths that go with a unit, and those below them that stay."""
    if unit.kind == "resnet":
        shortcut = unet.get_submodule(unit.name).conv_shortcut
        return [unit.name], [] if shortcut is None else [f"{unit.name}.conv_shortcut"]
    if unit.kind == "attention":
        return [unit.name], []
    block, _, branch = unit.name.rpartition(".")
    return [unit.name, f"{block}.{TRANSFORMER_BRANCHES[branch][1]}"], []


# -- sensitivity ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A change of a UNet to be tried for the length of a block, and the first layer that it changes."""

    name: str
    layer: str
    applied: Callable[[], AbstractContextManager[None]]


def trials_of(
    unet: UNet2DConditionModel, edits: Sequence[UnitEdit], maps: Mapping[str, Map] | None = None
) -> list[Trial]:
    """Trials of edits, each named as its edit's unit or, beside such a one, as the edit; removals with the map in
    their place that `maps` has for the unit, or plain."""
    trials = []
    for edit in edits:
        name = edit.unit if isinstance(edit, Remove) else str(edit)
        applied: Any = partial(edited, unet, edit)
        if isinstance(edit, Remove):
            fitted = (maps or {}).get(edit.unit)
            if fitted is not None:
                applied = partial(compensating, unet, edit, fitted)
            else:
                applied = partial(edited, unet, Remove(unit=edit.unit))
        trials.append(Trial(name, first_layer(unet, edit), applied))
    return trials


def ablate(
    unet: UNet2DConditionModel,
    trials: Sequence[Trial],
    calls: Sequence[CalibrationCall],
    progress: Progress | None,
    references: Sequence[Tensor] | None = None,
) -> tuple[dict[str, dict[int, float]], float]:
    """Relative squared error of the prediction with each edit, by time step; and the cost in forwards.

    Layers before the first one changed are replayed from the whole UNet's call, not computed again. The error is that
    against the UNet's own prediction, or against `references`, one for each call.
    """
    errors: dict[str, dict[int, float]] = {trial.name: {} for trial in trials}
    done, spent, whole = 0, 0.0, 0.0

    def tried(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(trials) * len(calls), name)

    for index, call in enumerate(calls):
        outputs, reference, seconds = _record(unet, execution_order(unet), call.arguments)
        whole += seconds
        if references is not None:
            reference = references[index]
        start = time.perf_counter()
        for name, error in _ablated(unet, trials, call, outputs, reference, tried).items():
            errors[name][call.timestep] = error
        spent += time.perf_counter() - start
    return errors, (spent + whole) / (whole / len(calls))


def _ablated(
    unet: UNet2DConditionModel,
    trials: Sequence[Trial],
    call: CalibrationCall,
    outputs: dict[str, Any],
    reference: Tensor,
    tried: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Each trial's error in one call, of which `outputs` are the layers' (used up)."""
    errors: dict[str, float] = {}
    power = reference.float().square().sum()
    with ExitStack() as replayed:
        for name in execution_order(unet):
            for trial in [trial for trial in trials if trial.layer == name]:
                with trial.applied():
                    moved = unet(**call.arguments, return_dict=False)[0]
                errors[trial.name] = float((moved.float() - reference.float()).square().sum() / power)
                tried(trial.name)
            if name in outputs:  # all but a placeholder that is never called
                replayed.enter_context(swapped(unet, {name: CachedOutput(outputs.pop(name))}))
    return errors


def _record(
    unet: UNet2DConditionModel, names: list[str], arguments: dict[str, Any]
) -> tuple[dict[str, Any], Tensor, float]:
    """Every named module's output in one call, the prediction, and the seconds that the call took."""
    with outputs_of(unet, names) as outputs:
        answers: list[Tensor] = []
        seconds = seconds_of(lambda: answers.append(unet(**arguments, return_dict=False)[0]), unet.device)
        return outputs, answers[0], seconds
