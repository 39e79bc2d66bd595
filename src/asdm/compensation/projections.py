"""Projections in the place of single branches: each is fitted alone, with the rest of the denoiser unchanged.

What a projection reads, and what it is fitted to, follows from the family's `Branch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from asdm.choices import CompensationKind
from asdm.compensation.regression import RidgeRegression
from asdm.data.calibration import CalibrationCall, squared_norm
from asdm.edits import UnitEdit, edited
from asdm.families import Branch, Denoiser, Unit, family_of
from asdm.measure.hooks import swapped

ProjectionTensors = tuple[Tensor, Tensor]  # weight (out, in) or (channels,), bias (out,)
FLOAT64 = 8  # bytes
SUMS_BYTES = 4 * 2**30  # about the most that the sums of units take that are fitted together


def fitted_together(channels: Mapping[str, int], kind: CompensationKind) -> list[list[str]]:
    """Return units, given with their channels, in groups whose sums take at most `SUMS_BYTES`: each group is fitted in
    one call of the model for each calibration call."""
    groups: list[list[str]] = []
    taken = 0
    for name, count in channels.items():
        size = 2 * FLOAT64 * 2 * (count**2 if kind == "linear" else count)  # two halves, of two products each
        if not groups or taken + size > SUMS_BYTES:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += size
    return groups


def unit_projections(
    model: Denoiser,
    units: Sequence[Unit],
    calls: Sequence[CalibrationCall],
    kind: CompensationKind,
    ridge: float | None = None,
) -> dict[str, ProjectionTensors]:
    """Fit, for each unit alone, the projection that best replaces its branch."""
    branches = {unit.name: family_of(model).branch(model, unit.name) for unit in units}
    channels = {name: branch.channels for name, branch in branches.items()}
    fitted: dict[str, ProjectionTensors] = {}
    for names in fitted_together(channels, kind):
        fitted |= _group_projections(model, {name: branches[name] for name in names}, calls, kind, ridge)
    return fitted


@torch.no_grad()
def _group_projections(
    model: Denoiser,
    branches: Mapping[str, Branch],
    calls: Sequence[CalibrationCall],
    kind: CompensationKind,
    ridge: float | None,
) -> dict[str, ProjectionTensors]:
    """Fit the projections of some branches: one call of the model for each of `calls`."""
    family = family_of(model)
    regressions = {name: RidgeRegression(is_diagonal=kind == "diagonal") for name in branches}
    before_norm: dict[str, Tensor] = {}

    def record_input(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before_norm[name] = family.block_io(model, name).image_input(args, kwargs)

        return hook

    def accumulate(name: str, branch: Branch) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            io = family.block_io(model, name)
            states, behind = io.image_input(args, kwargs), io.image_states(output)
            kept = behind.new_zeros(()) if branch.kept is None else branch.kept(states)
            missing = by_position(behind - kept) * branch.scale
            read = before_norm.pop(name, states)
            regressions[name].add(projection_features(kind, branch, read, kept), missing)

        return hook

    with ExitStack() as hooks:
        for name, branch in branches.items():
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(accumulate(name, branch), with_kwargs=True))
            if branch.norm is not None and not branch.is_gated:  # the norm goes with the branch
                norm = model.get_submodule(branch.norm)
                hooks.enter_context(norm.register_forward_pre_hook(record_input(name), with_kwargs=True))
        for call in calls:
            squared_norm(family.predict(model, call.arguments), call)  # what overflows cannot be fitted to
    return {name: regression.solve(ridge)[:2] for name, regression in regressions.items()}


def projection_features(kind: CompensationKind, branch: Branch, read: Tensor, kept: Tensor) -> Tensor:
    """Return the features (samples, positions, channels) that a projection is regressed on.

    Args:
        read: the hidden states that the branch reads.
        kept: what stays of the unit's output without the branch; a diagonal projection that folds into the shortcut
            scales the shortcut's output.
    """
    if kind == "linear":
        return by_position(read)
    if kind == "diagonal":
        return by_position(kept * branch.scale if branch.folds_into is not None else read)
    return by_position(read)[..., :0]


def by_position(hidden_states: Tensor) -> Tensor:
    """(batch, channels, height, width) or (batch, tokens, channels) as (batch, positions, channels)."""
    return hidden_states.flatten(2).mT if hidden_states.ndim == 4 else hidden_states


@contextmanager
def compensating(model: Denoiser, edit: UnitEdit, projection: ProjectionTensors) -> Iterator[None]:
    """Apply a compensated removal with a fitted projection within the block; restore the original modules after it."""
    family = family_of(model)
    folds_into = family.branch(model, edit.unit).folds_into
    with edited(model, edit, family), ExitStack() as stack:
        if folds_into is not None:  # the original's own layer stays as it is
            stack.enter_context(swapped(model, {folds_into: deepcopy(model.get_submodule(folds_into))}))
        module = model.get_submodule(edit.unit)
        like = next(model.parameters())
        module.to(like.device, like.dtype)
        add_projection(module, *projection)
        yield


def add_projection(removed: Any, weight: Tensor, bias: Tensor) -> None:
    """Add a fitted projection to the module that stands in a removed branch's place."""
    like = next(removed.parameters())
    removed.add_projection(weight.to(like.device, like.dtype), bias.to(like.device, like.dtype))
