"""Finished plans: a plan's student is built without weights, by which it is possible, and its MACs are counted."""

from __future__ import annotations

from typing import Any

import torch

from asdm.compensation.folding import fold_projections
from asdm.errors import AsdmError
from asdm.families import Denoiser, macs_of_call
from asdm.pipelines.shapes import denoiser_of_config
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan
from asdm.student.surgery import model_without_weights


def finished(redundancy: RedundancyMap, plan: PruningPlan, preset: str | None = None) -> PruningPlan:
    """Return the plan once its student is built without weights, with the speed-up by the student's MACs where the
    profile has no latencies to predict it by.

    Args:
        preset: the preset that the plan is of.

    Raises:
        AsdmError: the profile's model allows no such student.
    """
    student = _empty_student(redundancy, plan, preset)
    if plan.metrics is None or redundancy.has_reliable_latencies:
        return plan
    speedup = redundancy.gmacs * 1e9 / max(_macs_of(student), 1)
    metrics = plan.metrics.model_copy(update={"predicted_speedup": speedup})
    return plan.model_copy(update={"metrics": metrics})


def empty_teacher(redundancy: RedundancyMap) -> Denoiser:
    """Build the denoiser of a profile without weights (on the meta device)."""
    return denoiser_of_config(redundancy.family, redundancy.unet_config, redundancy.model or "the profile's model")


def _empty_student(redundancy: RedundancyMap, plan: PruningPlan, preset: str | None) -> Any:
    try:
        return model_without_weights(empty_teacher(redundancy), plan.edits).to("meta")
    except AsdmError as error:
        if preset is None:
            raise
        raise not_for_this_model(preset, error) from error


@torch.no_grad()
def _macs_of(student: Denoiser) -> int:
    """Count the MACs of a call of a student without weights, its projections folded."""
    fold_projections(student)
    return macs_of_call(student.eval()).below()


def not_for_this_model(preset: str, error: AsdmError) -> AsdmError:
    """Return the error of a preset whose edits a model does not allow."""
    return AsdmError(f"{preset}: a preset for models of another shape ({error}); give a budget instead")
