"""Fitted projections folded into a student's other weights: the same outputs, without the projections' cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asdm import checks
from asdm.choices import CompensationKind
from asdm.edits import compensated
from asdm.edits.remove import RemovedUnit
from asdm.families import Denoiser, family_of
from asdm.families.folding import Affine
from asdm.families.tensors import require_plain
from asdm.student.edited_model import edits_of
from asdm.student.surgery import inherit_weights, model_without_weights


@checks.arguments(student=checks.UNET, within_blocks=checks.flag)
def fold_compensation(student: Denoiser, *, within_blocks: bool = False) -> Denoiser:
    """Fold the compensations of `student` into its other weights, in place; its output changes by rounding alone.

    A projection in the place of the first `attn1` of a UNet's transformer folds into its `proj_in`, in the place of the
    last `ff` into its `proj_out`, and in the place of an attention into the resnet before it where that has a
    `conv_shortcut`. Projections behind each other become one. A projection that changes nothing goes. The edits of what
    folds then have no `compensate`.

    Args:
        within_blocks: fold only what changes no block's output, and leave projections that change nothing: for a
            student that is trained, which needs both.

    Returns:
        `student`, or the stock model that it equals now where there is one.

    Raises:
        AsdmError: a LoRA is loaded, the model compiled or its weights offloaded.
    """
    require_plain(student)
    model: Any = student
    if not edits_of(model):
        return model
    fold_projections(model, within_blocks)
    if within_blocks:
        return model
    _set_kinds(model, {edit.unit: "none" for edit in compensated(edits_of(model)) if _drop_identity(model, edit.unit)})
    return _as_stock(model)


@torch.no_grad()
def fold_projections(student: Any, within_blocks: bool = False) -> None:
    """Fold in place what folds whatever its weights are, so that an unfitted student can be measured, too."""
    _set_kinds(student, family_of(student).fold_projections(student, within_blocks))


def _set_kinds(student: Any, kinds: Mapping[str, CompensationKind]) -> None:
    """Write to the config which kinds of projections units have now."""
    if kinds:
        edits = [edit.with_compensation(kinds.get(edit.unit, edit.compensation)) for edit in edits_of(student)]
        student.register_to_config(edits=[edit.to_dict() for edit in edits])


def _drop_identity(student: Any, unit: str) -> bool:
    """Drop the projection in a unit's place if it changes nothing; return whether it does."""
    removed = student.get_submodule(unit)
    if not isinstance(removed, RemovedUnit) or removed.compensation is None:
        return False
    if getattr(removed, "time_compensation", None) is not None or not Affine.of(removed.compensation).is_identity:
        return False
    removed.compensation = None
    return True


def _as_stock(student: Any) -> Denoiser:
    """Return the stock model that a student equals, with its weights; the student where there is none."""
    edits, original = edits_of(student), student.original()
    if family_of(student).stock_config(original, edits) is None:
        return student
    stock = model_without_weights(original, edits)
    inherit_weights(stock, student)
    return stock.train(student.training)
