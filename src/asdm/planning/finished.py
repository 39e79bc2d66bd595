"""Finished plans: whether a plan's student can be built, by building it without weights."""

from __future__ import annotations

from typing import Any

from asdm.errors import AsdmError
from asdm.pipelines.shapes import denoiser_of_config
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan
from asdm.student.surgery import model_without_weights


def finished(redundancy: RedundancyMap, plan: PruningPlan, preset: str | None = None) -> PruningPlan:
    """Return the plan once its student is built without weights.

    Args:
        preset: the preset that the plan is of.

    Raises:
        AsdmError: the profile's model allows no such student.
    """
    empty_student_of(redundancy, plan, preset)
    return plan


def empty_student_of(redundancy: RedundancyMap, plan: PruningPlan, preset: str | None = None) -> Any:
    """Build the student of a plan without weights (on the meta device), by the profile alone."""
    model = denoiser_of_config(redundancy.family, redundancy.unet_config, redundancy.model or "the profile's model")
    try:
        return model_without_weights(model, plan.edits)
    except AsdmError as error:
        if preset is None:
            raise
        raise not_for_this_model(preset, error) from error


def not_for_this_model(preset: str, error: AsdmError) -> AsdmError:
    """Return the error of a preset whose edits a model does not allow."""
    return AsdmError(f"{preset}: a preset for models of another shape ({error}); give a budget instead")
