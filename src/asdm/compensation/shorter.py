"""Fits for a smaller stock student, which has no place for projections: only those that fold into weights that stay.

The student's layers with all their attentions and transformer blocks are a model of its own, the trunk. What goes from
the trunk is removed as units, with projections fitted in their place. These fold, and the weights are the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from asdm.choices import CompensationKind
from asdm.data.calibration import CalibrationCall
from asdm.edits.drop_layers import DropLayers
from asdm.edits.remove import Remove
from asdm.families import Denoiser, family_of
from asdm.student.edited_model import all_edits_of
from asdm.student.surgery import inherit_weights, model_without_weights

Fit = Callable[[Denoiser, Denoiser, Sequence[CalibrationCall]], dict[str, float]]


def fitted_edit(student: Denoiser) -> DropLayers | None:
    """Return the edit that made a student a smaller stock model, where projections are to be fitted for it."""
    last = all_edits_of(student)[-1:]
    return next((edit for edit in last if isinstance(edit, DropLayers) and edit.fitted), None)


@torch.no_grad()
def fit_shorter(
    teacher: Denoiser, student: Denoiser, edit: DropLayers, calls: Sequence[CalibrationCall], fit: Fit
) -> dict[str, float]:
    """Fit what folds, in place; return, for each fitted unit of the trunk, the fraction of the missing mean square that
    is left.

    Args:
        edit: the student's (`fitted_edit`).
        fit: fits all projections of its second model to its first (`fit_to_calls`).
    """
    family = family_of(teacher)
    without_layers, runs = family.fitted_removals(teacher, edit)
    trunk = model_without_weights(teacher, [without_layers])
    inherit_weights(trunk, teacher)
    modules = {family.teacher_key(name, trunk, teacher): name for name, _ in trunk.named_modules()}
    runs = [[modules[name] for name in run] for run in runs if run[0] in modules]
    removals = _with_what_folds(trunk, runs)
    if all(edit.compensate == "none" for edit in removals):
        return {}
    fitted = model_without_weights(trunk, removals, may_be_stock=False)
    inherit_weights(fitted, trunk)
    residuals = fit(trunk.eval(), fitted.eval(), calls)
    family.fold_projections(fitted, within_blocks=False)
    tensors = {family.teacher_key(name, trunk, teacher): name for name in trunk.state_dict()}
    state = fitted.state_dict()
    student.load_state_dict(
        {name: state[tensors[family.teacher_key(name, student, teacher)]] for name in student.state_dict()}
    )
    return residuals


def _with_what_folds(trunk: Any, runs: list[list[str]]) -> list[Remove]:
    """Return the removal of all units of the runs, each run with a projection behind its last unit: a linear one, or a
    constant, or none, whichever is the first to fold."""
    kinds: dict[str, CompensationKind] = {run[-1]: "linear" for run in runs}
    simpler: tuple[CompensationKind, ...] = ("bias", "none")
    for next_kind in simpler:
        removals = [Remove(unit=name, compensate=kinds.get(name, "none")) for run in runs for name in run]
        trial = model_without_weights(trunk, removals, may_be_stock=False)
        left = family_of(trunk).fold_projections(trial, within_blocks=False)
        kinds = {
            unit: kind if kind == "none" or left.get(unit) == "none" else next_kind for unit, kind in kinds.items()
        }
    return [Remove(unit=name, compensate=kinds.get(name, "none")) for run in runs for name in run]
