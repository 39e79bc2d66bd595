"""`analyze`: measure the cost and the sensitivity of every removable unit, and of every other edit a plan can choose.

Changes no model: edits are made for the length of one call and taken back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm import checks
from asdm.choices import CompensationKind, Sensitivity
from asdm.compensation.fitting import samples_to_fit_trials
from asdm.compensation.projections import ProjectionTensors, fitted_together, unit_projections
from asdm.data.calibration import CalibrationCall, calibration_calls, calibration_samples, require_calibration
from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.kinds import is_random
from asdm.edits import Remove, UnitEdit, candidate_edits
from asdm.families import Denoiser, Unit, denoiser_of, family_of
from asdm.measure.hooks import preserve_module_state
from asdm.sensitivity.ablation import Trial, ablate, record_call, trial_errors, trials_of
from asdm.sensitivity.costs import Cost, Costs, EditSaving, measure_costs, measure_edits
from asdm.sensitivity.profile import EditRecord, RedundancyMap, UnitRecord
from asdm.sensitivity.taylor import taylor_sensitivity

Progress = Callable[[int, int, str], None]
Errors = Mapping[str, dict[int, float]]  # by the trial's name and the time step
LATENCY_BATCH_SIZE = 2  # one image with guidance
TAYLOR_PROBES = 2


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
    """Measure the cost and the sensitivity of every removable unit of the pipeline's denoiser.

    Args:
        data: images with captions to calibrate on, from any source that `--data` takes; without it, latents that the
            pipeline itself makes from `prompts` (pure noise where its weights are random).
        prompts: captions; eight general ones where neither they nor `data` are given.
        sensitivity: "ablation", the default, removes each unit and compares, exactly; "taylor" estimates all units from
            a few forward and backward passes, for large denoisers, and by default where the weights are random.
        compensate: what a plan will fit in place of the removed branches, by default linear projections, and nothing
            where the weights are random: an ablation then tries each unit with the projection that best replaces it.
            Taylor's estimate is of plain removal.
        timesteps: at how many time steps, the middles of equal parts of the schedule; by default 4, at more than
            32x32 latents 2.
        samples: how many images or prompts; by default 16 at up to 32x32 latents, else 1. Projections are fitted to as
            many others, but a single one is too few: then to as many as `fit_compensation` takes.
        latency_rounds: the least number of timed denoiser calls at batch 2 (one image with guidance); more follow on a
            busy machine.
        progress: called with units done, units in all, and the unit's name.

    Returns:
        The profile, with `unet_forwards` and `necessary_forwards` to judge its own cost by.

    Raises:
        AsdmError: the data cannot be used, or the denoiser's prediction is zero or not finite.
    """
    require_calibration(pipeline, data)
    started = time.perf_counter()
    sensitivity = sensitivity or ("taylor" if is_random(pipeline) else "ablation")
    compensate = compensate or ("none" if is_random(pipeline) else "linear")
    if sensitivity == "taylor":
        compensate = "none"
    timesteps = timesteps or (2 if latent_shape(pipeline)[1] > 32 else 4)
    samples = samples or calibration_samples(pipeline)
    model = denoiser_of(pipeline)
    calibration = partial(calibration_calls, pipeline, data, prompts, timesteps)
    with preserve_module_state(model):
        model.eval()
        subject = _measure(model, latency_rounds, progress)
        calls = calibration(samples, seed)
        if sensitivity == "taylor":
            errors, forwards = _estimate(subject, calls, seed, progress)
        else:
            fit_calls = []
            if compensate != "none":  # other noise than they are tried on
                fit_calls = calibration(samples_to_fit_trials(pipeline, samples), seed + 1)
            errors, forwards = _ablate(subject, calls, fit_calls, compensate, progress)
    return _map(
        subject,
        errors,
        model=str(pipeline.config.get("_name_or_path") or ""),
        timesteps=[call.timestep for call in calls],
        prompts=_samples(model, calls[0]),
        seed=seed,
        estimator=sensitivity,
        compensate=compensate,
        unet_forwards=forwards,
        necessary_forwards=len(calls) * subject.necessary_forwards,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def structure_map(unet: Denoiser, model: str = "") -> RedundancyMap:
    """Return the parameters and MACs of every unit, without latencies and sensitivities: enough for a preset.

    It takes a second, and needs no weights: the denoiser may be on the meta device.

    Args:
        model: the name that the profile gives the denoiser.
    """
    started = time.perf_counter()
    with preserve_module_state(unet):
        unet.eval()
        subject = _measure(unet, 0)
    return _map(
        subject,
        {},
        model=model,
        latency_doubt=1.0,
        other_cores=None,
        timesteps=[],
        prompts=0,
        seed=0,
        estimator=None,
        unet_forwards=0.0,
        necessary_forwards=0.0,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Subject:
    """A denoiser with its units and the other edits that a plan can choose, and what each of them costs."""

    model: Denoiser
    units: Sequence[Unit]
    others: Sequence[UnitEdit]
    costs: Costs
    other_savings: Sequence[EditSaving]

    def trials(
        self, compensate: CompensationKind = "none", projections: Mapping[str, ProjectionTensors] | None = None
    ) -> list[Trial]:
        """Return the removal of each unit, then the other edits."""
        removals = [Remove(unit=unit.name, compensate=compensate) for unit in self.units]
        return [*trials_of(self.model, removals, projections), *trials_of(self.model, self.others)]

    @property
    def channels(self) -> dict[str, int]:
        """The channels of each unit's hidden states."""
        return {unit.name: family_of(self.model).branch(self.model, unit.name).channels for unit in self.units}

    @property
    def necessary_forwards(self) -> float:
        """The least number of calls that an exact ablation takes for each calibration call."""
        return 1 + sum(self.costs.forwards_after[trial.layer] for trial in self.trials())


def _measure(model: Denoiser, rounds: int, progress: Progress | None = None) -> _Subject:
    """Measure what each unit and each other edit saves."""
    family = family_of(model)
    units = family.units(model)
    if progress is not None:
        progress(0, len(units), "measuring what each unit costs")
    costs = measure_costs(model, units, rounds)
    others = candidate_edits(model, family, costs.positions)
    return _Subject(model, units, others, costs, measure_edits(model, others, costs, rounds))


def _ablate(
    subject: _Subject,
    calls: Sequence[CalibrationCall],
    fit_calls: Sequence[CalibrationCall],
    compensate: CompensationKind,
    progress: Progress | None,
) -> tuple[Errors, float]:
    """Try each edit; return the errors and what that took in denoiser calls."""
    projections = unit_projections(subject.model, subject.units, fit_calls, compensate) if fit_calls else {}
    errors, forwards = ablate(subject.model, subject.trials(compensate, projections), calls, progress)
    passes = len(fitted_together(subject.channels, compensate))
    fitted = passes * sum(_samples(subject.model, call) for call in fit_calls)
    return errors, forwards + fitted / _samples(subject.model, calls[0])


def _samples(model: Denoiser, call: CalibrationCall) -> int:
    return len(call.arguments[family_of(model).sample_argument])


def _estimate(
    subject: _Subject, calls: Sequence[CalibrationCall], seed: int, progress: Progress | None
) -> tuple[Errors, float]:
    """Estimate the errors to first order; return them and what that took in denoiser calls.

    Edits without a first-order estimate, such as the removal of a whole level, are tried instead: they are few.
    """
    model = subject.model
    forward_seconds = record_call(model, [], calls[0])[2]
    estimated = [edit for edit in subject.others if edit.has_first_order_estimate]
    trials = trials_of(model, [edit for edit in subject.others if not edit.has_first_order_estimate])
    tried: dict[str, dict[int, float]] = {trial.name: {} for trial in trials}

    def try_others(call: CalibrationCall, outputs: dict[str, Any], prediction: Tensor) -> None:
        for name, error in trial_errors(model, trials, call, outputs, prediction).items():
            tried[name][call.timestep] = error

    before = time.perf_counter()
    errors = taylor_sensitivity(
        model,
        subject.units,
        calls,
        probes=TAYLOR_PROBES,
        edits=estimated,
        seed=seed,
        progress=progress,
        recorded=family_of(model).execution_order(model),
        on_call=try_others,
    )
    return errors | tried, (time.perf_counter() - before) / forward_seconds


def _map(subject: _Subject, errors: Errors, **fields: Any) -> RedundancyMap:
    """Return the profile of what was measured; `fields` are those that the measurements do not determine."""
    model, costs = subject.model, subject.costs
    measured = {"latency_doubt": costs.latency_doubt, "other_cores": costs.other_cores}
    return RedundancyMap(
        **{**measured, **fields},
        denoiser_class=family_of(model).model_class.__name__,
        fingerprint=family_of(model).fingerprint(model),
        unet_config=plain_config(model),
        parameters=costs.model.parameters,
        gmacs=costs.model.macs / 1e9,
        gmacs_without_attention=costs.model.macs_without_attention / 1e9,
        latency_ms=costs.model.ms,
        latency_batch_size=LATENCY_BATCH_SIZE,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        units=[_unit_record(subject, unit, errors.get(unit.name, {})) for unit in subject.units],
        others=[
            _edit_record(subject, edit, saving, errors.get(edit.trial_name, {}))
            for edit, saving in zip(subject.others, subject.other_savings, strict=True)
        ],
    )


def _unit_record(subject: _Subject, unit: Unit, errors: dict[int, float]) -> UnitRecord:
    family = family_of(subject.model)
    costs = subject.costs
    saving = costs.savings[unit.name]
    return UnitRecord(
        name=unit.name,
        kind=unit.kind,
        parent=unit.parent,
        latency_share=saving.ms / costs.model.ms if costs.model.ms else 0.0,
        channels=family.branch(subject.model, unit.name).channels,
        positions=costs.positions[unit.layer],
        projection_folds=family.projection_folds(subject.model, unit.name),
        **_saved(saving),
        **_sensitivity(errors),
    )


def _edit_record(subject: _Subject, edit: UnitEdit, saving: EditSaving, errors: dict[int, float]) -> EditRecord:
    model, family = subject.model, family_of(subject.model)
    channels = edit.projection_channels(model, family)
    return EditRecord(
        edit=edit.to_dict(),
        covers=edit.covers([unit.name for unit in subject.units], family),
        channels=channels,
        positions=subject.costs.positions[edit.changed_layer(family.layers(model))] if channels else 0,
        enlarges=saving.enlarges,
        **_saved(saving),
        **_sensitivity(errors),
    )


def _saved(saving: Cost) -> dict[str, Any]:
    return {
        "parameters": saving.parameters,
        "gmacs": saving.macs / 1e9,
        "gmacs_without_attention": saving.macs_without_attention / 1e9,
        "latency_ms": saving.ms,
    }


def _sensitivity(errors: dict[int, float]) -> dict[str, Any]:
    mean = sum(errors.values()) / max(len(errors), 1)
    return {"sensitivity": mean, "sensitivity_by_timestep": errors}


def plain_config(model: Denoiser) -> dict[str, Any]:
    """Return a model's config as JSON has it: without private entries, lists for tuples."""
    return json.loads(json.dumps({key: value for key, value in model.config.items() if not key.startswith("_")}))
