"""Fit what stands in the place of removed branches, in closed form: ridge least squares, no gradient.

Beyond the paper. A removed branch f(x) is predicted in part by a linear map of x. Units are fitted in order
of execution, each on the hidden states that the student, already fitted up to there, feeds it, and towards
those that the teacher had behind the branch: so a later fit also mends what earlier ones left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from asdm import checks
from asdm.choices import CompensationKind
from asdm.data.calibration import CalibrationCall, calibration_calls
from asdm.diffusion.conditioning import latent_shape
from asdm.edits import Remove, compensated
from asdm.edits.projections import Projection
from asdm.edits.surgery import edited, swapped
from asdm.errors import AsdmError
from asdm.families.unet_removed import RemovedBranch, RemovedResnet
from asdm.families.unet_structure import TRANSFORMER_BRANCHES, Unit, execution_order, removable_units, shortcut_of
from asdm.measure.hooks import CachedOutput, outputs_of, preserve_module_state, tensor_of
from asdm.records import Record
from asdm.student.edited_model import edits_of

Progress = Callable[[int, int, str], None]
RIDGE = 1e-3
RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, math.inf)
KEPT_BYTES = 2**30  # of a UNet's features at most


class CompensationReport(Record):
    """What a fit was worth: |student - teacher|^2 / |teacher|^2 of the prediction on noise that the fit did
    not see, before and after; and of the fitted units, the part of the branch's power that the map leaves."""

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
    student: UNet2DConditionModel,
    *,
    data: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    timesteps: int = 8,
    samples: int | None = None,
    ridge: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompensationReport:
    """Fit every compensation of `student` to the UNet of `pipeline`, in place.

    Memory does not grow with the time steps: sums of products of channels are kept, and features up to `KEPT_BYTES`.

    Args:
        student: from `build_student` of the pipeline's UNet, before any training.
        data, prompts, timesteps, samples: the calibration, as for `analyze`; by default 32 samples at up to 32x32
            latents, else 4.
        ridge: added to the inputs' covariance, as a part of its mean diagonal; by default the one, for each unit,
            with which one half of the samples tells the other best.
        progress: called with units done, units in all, and the unit's name.

    Raises:
        AsdmError: the data folder cannot be used, or the fit gives numbers that are not finite.
    """
    teacher: UNet2DConditionModel = pipeline.unet
    with preserve_module_state(teacher, student):
        teacher.eval()
        student.eval()
        samples = samples or samples_to_fit(pipeline)
        seen = calibration_calls(pipeline, data, prompts, timesteps, samples, seed)
        unseen = calibration_calls(pipeline, data, prompts, timesteps, samples, seed + 1)
        wanted = predictions(teacher, unseen)
        before = prediction_error(student, unseen, wanted)
        left = fit_to_calls(teacher, student, seen, ridge, progress)
        after = prediction_error(student, unseen, wanted) if left else before
    return CompensationReport(error_before=before, error_after=after, left_by_unit=left)


def samples_to_fit(pipeline: DiffusionPipeline) -> int:
    """How many samples a fit reads by default: the innermost level has few positions in each."""
    return 32 if latent_shape(pipeline)[1] <= 32 else 4


@torch.no_grad()
def fit_to_calls(
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    calls: Sequence[CalibrationCall],
    ridge: float | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Fit every compensation of `student` in place, and nothing more: for each unit, the part of the missing power that
    is left. Both UNets are in evaluation mode."""
    edits = _to_fit(teacher, student)
    left = {}
    wanted, found = _Runs(teacher, calls), _Runs(student, calls)
    for index, edit in enumerate(edits):
        left[edit.unit] = _fit(wanted, found, edit, ridge)
        if progress is not None:
            progress(index + 1, len(edits), edit.unit)
    return left


@torch.no_grad()
def predictions(unet: UNet2DConditionModel, calls: Sequence[CalibrationCall]) -> list[Tensor]:
    """What a UNet predicts in each call; the sample is given by its place, which what others patch into it rely on."""
    found = []
    for call in calls:
        arguments = dict(call.arguments)
        sample = arguments.pop("sample")
        found.append(unet(sample, **arguments, return_dict=False)[0])
    return found


def prediction_error(
    student: UNet2DConditionModel, calls: Sequence[CalibrationCall], wanted: Sequence[Tensor]
) -> float:
    """|student - teacher|^2 / |teacher|^2 of the prediction, the mean over the calls; `wanted` is the teacher's."""
    errors = []
    for found, right in zip(predictions(student, calls), wanted, strict=True):
        errors.append(float((found.float() - right.float()).square().sum() / right.float().square().sum()))
    return sum(errors) / len(errors)


def fitted_tensors(student: UNet2DConditionModel) -> dict[str, Tensor]:
    """The tensors of `student` that a fit changes, by name."""
    units = [edit.unit for edit in compensated(edits_of(student))]
    state = student.state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith(tuple(f"{unit}." for unit in units))}


def _to_fit(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> list[Remove]:
    """The edits of `student`, not the teacher's own, that have a compensation, in order of execution."""
    units = [unit.name for unit in removable_units(teacher)]
    earlier = {edit.unit for edit in edits_of(teacher)}
    edits = [edit for edit in compensated(edits_of(student)) if edit.unit not in earlier]

    def position(edit: Remove) -> int:
        return next(i for i, name in enumerate(units) if f"{name}.".startswith(f"{edit.unit}."))

    return sorted(edits, key=position)


Map = tuple[Tensor, Tensor]  # weight (out, in) or (channels,), bias (out,)


@torch.no_grad()
def unit_maps(
    unet: UNet2DConditionModel,
    units: Sequence[Unit],
    calls: Sequence[CalibrationCall],
    kind: CompensationKind,
    ridge: float | None = None,
) -> dict[str, Map]:
    """For each unit alone, the map that stands best in its branch's place where all else stays: from one call of the
    UNet for each of `calls`."""
    regressions = {unit.name: _Regression(diagonal=kind == "diagonal") for unit in units}
    # A transformer's branch goes with its norm, so that the map reads what enters the norm.
    before_norm: dict[str, Tensor] = {}

    def read(unit: Unit) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            before_norm[unit.name] = args[0]

        return hook

    def note(unit: Unit) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            hidden_states = before_norm.pop(unit.name, args[0])
            behind = tensor_of(output)
            kept = behind.new_zeros(()) + shortcut_of(unit, module, args)
            scale = module.output_scale_factor if unit.kind == "resnet" else 1.0
            folds = unit.kind == "resnet" and module.conv_shortcut is not None
            missing = _positions(behind - kept) * scale
            if kind == "diagonal":
                features = _positions(kept * scale if folds else hidden_states)
            else:
                features = _positions(hidden_states) if kind == "linear" else missing.new_zeros(*missing.shape[:2], 0)
            regressions[unit.name].add(features, missing)

        return hook

    handles = [unet.get_submodule(unit.name).register_forward_hook(note(unit)) for unit in units]
    for unit in units:
        block, _, branch = unit.name.rpartition(".")
        if branch in TRANSFORMER_BRANCHES:
            norm = unet.get_submodule(f"{block}.{TRANSFORMER_BRANCHES[branch][1]}")
            handles.append(norm.register_forward_pre_hook(read(unit)))
    try:
        for call in calls:
            unet(**call.arguments, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: regression.solve(ridge)[:2] for name, regression in regressions.items()}


@contextmanager
def compensating(unet: UNet2DConditionModel, edit: Remove, fitted: Map) -> Iterator[None]:
    """Apply a compensated removal with a fitted map for the length of the block, then put the original back."""
    with edited(unet, edit):
        module = unet.get_submodule(edit.unit)
        if isinstance(module, RemovedResnet) and module.conv_shortcut is not None:
            module.conv_shortcut = deepcopy(module.conv_shortcut)  # the original's own, in which the map folds
        like = next(unet.parameters())
        module.to(like.device, like.dtype)
        _add_map(module, *fitted)
        yield


def _add_map(module: Any, weight: Tensor, bias: Tensor) -> None:
    holder = module if isinstance(module, RemovedResnet) else module.compensation
    assert isinstance(holder, RemovedResnet | Projection)
    like = next(holder.parameters())
    holder.add_projection(weight.to(like.device, like.dtype), bias.to(like.device, like.dtype))


# -- one unit ------------------------------------------------------------------------------------------


def _fit(teacher: _Runs, student: _Runs, edit: Remove, ridge: float | None) -> float:
    """Fit one unit's compensation; returns the part of the missing power that is left."""
    module = student.unet.get_submodule(edit.unit)
    scale, folds = 1.0, False
    if isinstance(module, RemovedResnet):
        scale, folds = module.output_scale_factor, module.conv_shortcut is not None
    regression = _Regression(diagonal=edit.compensate == "diagonal")
    for index in range(len(student.calls)):
        wanted = _hidden_states_behind(teacher, edit.unit, index)
        (hidden_states, *others), found = student.until([edit.unit], index)[edit.unit]
        missing = wanted - (hidden_states + found if isinstance(module, RemovedBranch) else found)
        missing = _positions(missing) * scale
        samples, positions = missing.shape[:2]
        if edit.compensate == "diagonal":
            regression.add(_positions(found if folds else hidden_states), missing)
            continue
        none = missing.new_zeros(samples, positions, 0)
        features = [_positions(hidden_states) if edit.compensate == "linear" else none]
        if edit.compensate_time:
            activated = F.silu(others[0]).expand(samples, -1)
            features.append(activated[:, None].expand(-1, positions, -1))
        regression.add(torch.cat(features, dim=2), missing)
    weight, bias, left = regression.solve(ridge)
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise AsdmError(f"{edit.unit}: its compensation is not finite; raise ridge (now {ridge})")
    _add_map(module, weight, bias)
    return left


class _Regression:
    """Least squares of targets (samples, positions, out) on features (samples, positions, in) and a constant, from
    sums alone.

    With `diagonal`, each target on the feature of its own channel. The sums are kept for the samples of even and odd
    number apart, and the ridge is the one with which each half is told best by the other's fit: inner levels have few
    positions, and a map that is fitted to them too closely does harm elsewhere.
    """

    def __init__(self, diagonal: bool):
        self.diagonal = diagonal
        self.halves = [_Sums(), _Sums()]

    def add(self, features: Tensor, targets: Tensor) -> None:
        if features.device.type == "mps":  # which has no float64
            features, targets = features.cpu(), targets.cpu()
        features, targets = features.double(), targets.double()
        for number, half in enumerate(self.halves):
            x, y = features[number::2].flatten(0, 1), targets[number::2].flatten(0, 1)
            products = [x.square().sum(0), (x * y).sum(0)] if self.diagonal else [x.mT @ x, x.mT @ y]
            half.add(len(x), float(y.square().sum()), [x.sum(0), y.sum(0), *products])

    def solve(self, ridge: float | None = None) -> tuple[Tensor, Tensor, float]:
        """Weight (out, in) or (channels,), bias (out,), and the part of the targets' power that is left where the map
        was not fitted."""
        even, odd = self.halves
        if not odd.count or not even.count:  # a single sample
            whole = even if even.count else odd
            weight, bias = self._fit(whole, RIDGE if ridge is None else ridge)
            return weight.float(), bias.float(), self._left(whole, weight, bias) / max(whole.power, 1e-30)
        chosen = math.inf
        least = math.inf
        for candidate in RIDGES if ridge is None else (ridge,):
            left = self._left(odd, *self._fit(even, candidate)) + self._left(even, *self._fit(odd, candidate))
            if left < least or not math.isfinite(left):
                chosen, least = candidate, left
        whole = even.together(odd)
        weight, bias = self._fit(whole, chosen)
        if least > whole.power:  # not even a constant serves
            weight, bias, least = torch.zeros_like(weight), torch.zeros_like(bias), whole.power
        return weight.float(), bias.float(), least / max(whole.power, 1e-30)

    def _fit(self, sums: _Sums, ridge: float) -> tuple[Tensor, Tensor]:
        mean, target_mean, square, cross = (value / sums.count for value in sums.values)
        if self.diagonal:
            square, cross = square - mean.square(), cross - mean * target_mean
            weight = cross / (square + ridge * square.mean()).clamp_min(1e-30)
            return weight, target_mean - weight * mean
        square, cross = square - mean.outer(mean), cross - mean.outer(target_mean)
        if math.isinf(ridge) or not len(mean):
            return torch.zeros_like(cross.mT), target_mean
        eye = torch.eye(len(mean), dtype=square.dtype, device=square.device)
        # Features that never vary have no covariance at all.
        strength = (ridge * square.diagonal().mean()).clamp_min(1e-12)
        weight = torch.linalg.solve(square + strength * eye, cross).mT
        return weight, target_mean - weight @ mean

    def _left(self, sums: _Sums, weight: Tensor, bias: Tensor) -> float:
        """Sum of |targets - map of features|^2 over the samples of `sums`."""
        x, y, square, cross = sums.values
        if self.diagonal:
            left = (weight.square() * square).sum() + 2 * (weight * bias * x).sum() - 2 * (weight * cross).sum()
        else:
            left = ((weight @ square) * weight).sum() + 2 * (bias @ (weight @ x)) - 2 * (weight.mT * cross).sum()
        return float(left + sums.count * bias.square().sum() - 2 * (bias * y).sum()) + sums.power


class _Sums:
    """Of rows: how many, the targets' power, and sums of features, of targets and of their products."""

    def __init__(self, count: int = 0, power: float = 0.0, values: Sequence[Tensor] = ()):
        self.count, self.power, self.values = count, power, list(values)

    def add(self, count: int, power: float, values: Sequence[Tensor]) -> None:
        if count:
            both = self.together(_Sums(count, power, values))
            self.count, self.power, self.values = both.count, both.power, both.values

    def together(self, other: _Sums) -> _Sums:
        if not self.count:
            return other
        values = [a + b for a, b in zip(self.values, other.values, strict=True)]
        return _Sums(self.count + other.count, self.power + other.power, values)


# -- what flows through a UNet -------------------------------------------------------------------------


class _ReachedError(Exception):
    """Stops a UNet's call once everything wanted of it has been seen."""


class _Runs:
    """Calls of a UNet up to one module after another, in order of execution; what lies behind the UNet's call so far
    is kept, up to `KEPT_BYTES`, and not computed again."""

    def __init__(self, unet: UNet2DConditionModel, calls: Sequence[CalibrationCall]):
        self.unet, self.calls = unet, calls
        self.order = execution_order(unet)
        self.kept: list[dict[str, CachedOutput]] = [{} for _ in calls]
        self.bytes = 0

    def until(self, paths: Sequence[str], index: int) -> dict[str, Any]:
        """Inputs and output of the named modules in one of the calls, which ends with the last of them."""
        seen: dict[str, Any] = {}
        kept = self.kept[index]
        wanted = paths[-1]

        def keep(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
                seen[path] = args, tensor_of(output)
                if path == wanted:
                    raise _ReachedError

            return hook

        new = [name for name in self.order if name not in kept and not wanted.startswith(name)]
        with swapped(self.unet, kept), outputs_of(self.unet, new) as outputs:
            handles = [self.unet.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
            try:
                self.unet(**self.calls[index].arguments, return_dict=False)
            except _ReachedError:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        for name, output in outputs.items():
            size = tensor_of(output).nbytes
            if self.bytes + size <= KEPT_BYTES:
                kept[name] = CachedOutput(output)
                self.bytes += size
        return seen


def _hidden_states_behind(teacher: _Runs, unit: str, index: int) -> Tensor:
    """What the teacher has behind a unit: its output, or for a transformer's branch the sum it enters."""
    block, _, branch = unit.rpartition(".")
    if branch not in TRANSFORMER_BRANCHES:
        return teacher.until([unit], index)[unit][1]
    norm = f"{block}.{TRANSFORMER_BRANCHES[branch][1]}"
    seen = teacher.until([norm, unit], index)
    return seen[norm][0][0] + seen[unit][1]


def _positions(hidden_states: Tensor) -> Tensor:
    """(batch, channels, h, w) or (batch, tokens, channels) as (batch, positions, channels)."""
    return hidden_states.flatten(2).mT if hidden_states.ndim == 4 else hidden_states
