"""A denoiser and a plan: the student, with the teacher's weights."""

from __future__ import annotations

from typing import Any

from asdm import checks
from asdm.families import Denoiser
from asdm.families.tensors import require_plain
from asdm.student.plan import PruningPlan
from asdm.student.surgery import inherit_weights, model_without_weights


def empty_student(unet: Denoiser, plan: PruningPlan) -> Any:
    """Return the student's modules without weights (on the meta device)."""
    plan.require_for(unet)
    return model_without_weights(unet, plan.edits)


def student_like(unet: Denoiser, plan: PruningPlan) -> Denoiser:
    """Build a student in evaluation mode whose modules keep the teacher's names, even where it could be a stock
    model."""
    student = model_without_weights(unet, plan.edits, may_be_stock=False)
    inherit_weights(student, unet)
    return student.eval()


@checks.arguments(unet=checks.UNET, plan=checks.a(PruningPlan, "asdm.make_plan makes one"))
def build_student(unet: Denoiser, plan: PruningPlan) -> Denoiser:
    """Build a student: the teacher's architecture with the plan's edits, and a copy of the teacher's weights.

    The student is of the family's student class, such as `AsdmUNet2DConditionModel`, or of the stock class where the
    edits amount to a stock model. A plan without edits gives bit-identical outputs. The teacher is not changed; device,
    dtype and mode are the teacher's.

    Args:
        unet: the teacher: a UNet or another denoiser.

    Raises:
        AsdmError: a plan for another architecture, or with an edit that this model does not allow; or a LoRA or an
            IP-Adapter is loaded, the model compiled or its weights offloaded.
    """
    require_plain(unet)
    student = empty_student(unet, plan)
    inherit_weights(student, unet)
    return student.train(unet.training)
