"""Fit the projections in the place of removed branches in closed form: ridge least squares, no gradients.

Beyond the paper. A projection predicts a part of the removed branch f(x) from x. Units are fitted in order of
execution: each on the hidden states of the student as fitted so far, towards those of the teacher behind the branch, so
a later fit also corrects what earlier ones left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from asdm import checks
from asdm.compensation.partial_calls import PartialCalls
from asdm.compensation.projections import add_projection, by_position, projection_features
from asdm.compensation.regression import RidgeRegression
from asdm.compensation.shorter import fit_shorter, fitted_edit
from asdm.data.calibration import CalibrationCall, calibration_calls, relative_error
from asdm.diffusion.conditioning import latent_shape
from asdm.edits import UnitEdit, compensated
from asdm.errors import AsdmError
from asdm.families import Branch, Denoiser, denoiser_of, family_of
from asdm.measure.hooks import preserve_module_state
from asdm.records import Record
from asdm.student.edited_model import edits_of
from asdm.student.surgery import inherit_weights

Progress = Callable[[int, int, str], None]


class CompensationReport(Record):
    """What a fit achieved: |student - teacher|^2 / |teacher|^2 of the prediction, before and after, on noise that the
    fit did not see; and for each fitted unit the fraction of the missing mean square that its projection leaves."""

    error_before: float
    error_after: float
    left_by_unit: dict[str, float]


@checks.arguments(
    pipeline=checks.PIPELINE,
    student=checks.UNET,
    data=checks.path,
    prompts=checks.PROMPTS,
    timesteps=checks.TIMESTEPS,
    samples=checks.SAMPLES,
    ridge=checks.number(0),
    seed=checks.SEED,
    progress=checks.function,
)
@torch.no_grad()
def fit_compensation(
    pipeline: DiffusionPipeline,
    student: Denoiser,
    *,
    data: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    timesteps: int = 8,
    samples: int | None = None,
    ridge: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompensationReport:
    """Fit every compensation of `student` to the pipeline's denoiser, in place.

    A stock student of an edit `drop_layers` with `fitted` gets projections that fold into its weights, if these bring
    it nearer to the teacher.

    Memory does not grow with the time steps: only sums of products of channels and a bounded cache of hidden states are
    stored.

    Args:
        student: from `build_student` of the pipeline's denoiser, before any training.
        data, prompts, timesteps, samples: the calibration, as for `analyze`; by default 32 samples at up to 32x32
            latents, else 4.
        ridge: added to the inputs' covariance, as a fraction of its mean diagonal; by default, for each unit, the ridge
            with which each half of the samples predicts the other best.
        progress: called with units done, units in all, and the unit's name.

    Returns:
        The relative squared error of the prediction before and after (`error_before`, `error_after`), and by unit the
        fraction of the branch's mean square that its projection leaves (`left_by_unit`).

    Raises:
        AsdmError: the data cannot be used, or a fitted projection is not finite.
    """
    teacher = denoiser_of(pipeline)
    with preserve_module_state(teacher, student):
        teacher.eval()
        student.eval()
        samples = samples or samples_to_fit(pipeline)
        seen = calibration_calls(pipeline, data, prompts, timesteps, samples, seed)
        unseen = calibration_calls(pipeline, data, prompts, timesteps, samples, seed + 1)
        expected = predictions(teacher, unseen)
        before = prediction_error(student, unseen, expected)
        shorter = fitted_edit(student)
        if shorter is None:
            residuals = fit_to_calls(teacher, student, seen, ridge, progress)
        else:
            fit = partial(fit_to_calls, ridge=ridge, progress=progress)
            residuals = fit_shorter(teacher, student, shorter, seen, fit)
        after = prediction_error(student, unseen, expected) if residuals else before
        if shorter is not None and after > before:  # what was fitted to is the student with its attentions
            inherit_weights(student, teacher)
            residuals, after = {}, before
    return CompensationReport(error_before=before, error_after=after, left_by_unit=residuals)


def samples_to_fit(pipeline: DiffusionPipeline) -> int:
    """Return how many samples a fit reads by default: the lowest-resolution level has few positions in each."""
    return 32 if latent_shape(pipeline)[1] <= 32 else 4


def samples_to_fit_trials(pipeline: DiffusionPipeline, samples: int) -> int:
    """Return how many samples the projections of trials are fitted to: as many as the trials have, but a single one is
    too few."""
    return samples if samples > 1 else samples_to_fit(pipeline)


@torch.no_grad()
def fit_to_calls(
    teacher: Denoiser,
    student: Denoiser,
    calls: Sequence[CalibrationCall],
    ridge: float | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Fit every compensation of `student` in place; return, for each unit, the fraction of the missing mean square that
    is left. Both denoisers are in evaluation mode."""
    edits = _to_fit(teacher, student)
    residuals = {}
    teacher_calls, student_calls = PartialCalls(teacher, calls), PartialCalls(student, calls)
    for index, edit in enumerate(edits):
        residuals[edit.unit] = _fit_unit(teacher_calls, student_calls, edit, ridge)
        if progress is not None:
            progress(index + 1, len(edits), edit.unit)
    return residuals


@torch.no_grad()
def predictions(unet: Denoiser, calls: Sequence[CalibrationCall]) -> list[Tensor]:
    """Return the prediction of a denoiser in each call."""
    family = family_of(unet)
    return [family.predict(unet, call.arguments) for call in calls]


def prediction_error(student: Denoiser, calls: Sequence[CalibrationCall], expected: Sequence[Tensor]) -> float:
    """|student - teacher|^2 / |teacher|^2 of the prediction, averaged over the calls; `expected` is the teacher's."""
    found = predictions(student, calls)
    return sum(map(relative_error, found, expected, calls)) / len(calls)


def wants_fit(student: Denoiser) -> bool:
    """Return whether `fit_compensation` changes a student."""
    return bool(fitted_tensors(student))


def fitted_tensors(student: Denoiser) -> dict[str, Tensor]:
    """Return the tensors of `student` that a fit may change, by name; all of a smaller stock model that is fitted."""
    state = student.state_dict()
    if fitted_edit(student) is not None:
        return state
    units = [edit.unit for edit in compensated(edits_of(student))]
    return {name: tensor for name, tensor in state.items() if name.startswith(tuple(f"{unit}." for unit in units))}


def _to_fit(teacher: Denoiser, student: Denoiser) -> list[UnitEdit]:
    """Return the edits of `student`, not the teacher's own, that have a compensation, in order of execution."""
    family = family_of(teacher)
    layers, units = family.layers(teacher), [unit.name for unit in family.units(teacher)]
    earlier = {edit.unit for edit in edits_of(teacher)}
    edits = [edit for edit in compensated(edits_of(student)) if edit.unit not in earlier]

    def position(edit: UnitEdit) -> tuple[int, int]:
        inside = units.index(edit.unit) if edit.unit in units else 0  # a larger part is the only edit of its layers
        return layers.index(edit.changed_layer(layers)), inside

    return sorted(edits, key=position)


def _fit_unit(teacher: PartialCalls, student: PartialCalls, edit: UnitEdit, ridge: float | None) -> float:
    """Fit one unit's projection in place; return the fraction of the missing mean square that is left."""
    branch = family_of(teacher.model).branch(teacher.model, edit.unit)
    regression = RidgeRegression(is_diagonal=edit.compensation == "diagonal")
    for index in range(len(student.calls)):
        _, expected = _states_around(teacher, branch, index)
        read, found = _states_around(student, branch, index)
        missing = by_position(_at_resolution_of(found, expected, student.latent_sides(index)) - found) * branch.scale
        features = projection_features(edit.compensation, branch, read, found)
        if edit.compensates_time:
            features = torch.cat([features, _time_features(student, branch, index, features)], dim=2)
        regression.add(features, missing)
    solution = regression.solve(ridge)
    if not solution.is_finite:
        raise AsdmError(f"{edit.unit}: its compensation is not finite; raise ridge (now {ridge})")
    add_projection(student.model.get_submodule(edit.unit), solution.weight, solution.bias)
    return solution.residual


def _states_around(calls: PartialCalls, branch: Branch, index: int) -> tuple[Tensor, Tensor]:
    """Return what the branch reads in one call, and the hidden states behind it that the fit compares.

    Those are the unit's output; or, where the sum is taken outside the module, the sum; or the branch's own output
    where a gate multiplies it outside the module.
    """
    if branch.kept is not None or branch.is_gated:
        call = calls.until([branch.path], index)[branch.path]
        return call.input, call.output
    entry = branch.norm or branch.path
    seen = calls.until(list(dict.fromkeys([entry, branch.path])), index)
    return seen[entry].input, seen[entry].input + seen[branch.path].output


def _at_resolution_of(found: Tensor, expected: Tensor, latent_sides: tuple[int, int]) -> Tensor:
    """Return the teacher's hidden states at the student's resolution, which is higher in the mid block of a UNet whose
    lowest-resolution level is removed."""
    if expected.shape == found.shape:
        return expected
    if expected.ndim == 4:
        return F.interpolate(expected, size=found.shape[2:])
    feature_map = expected.mT.unflatten(2, _map_sides(expected.shape[1], latent_sides))
    return F.interpolate(feature_map, size=_map_sides(found.shape[1], latent_sides)).flatten(2).mT


def _map_sides(tokens: int, latent_sides: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a feature map with so many tokens, in the proportions of the latents."""
    scale = math.sqrt(tokens / math.prod(latent_sides))
    height, width = (round(side * scale) for side in latent_sides)
    return height, width


def _time_features(student: PartialCalls, branch: Branch, index: int, features: Tensor) -> Tensor:
    """Return the activated time embedding at each position (samples, positions, channels)."""
    _, embedding, *_ = student.until([branch.path], index)[branch.path].args
    samples, positions = features.shape[:2]
    return F.silu(embedding).expand(samples, -1)[:, None].expand(-1, positions, -1)
