"""The student's model class of each family."""

from __future__ import annotations

from typing import Any

from asdm.families import ModelFamily
from asdm.student.unet import AsdmUNet2DConditionModel

STUDENT_CLASSES: tuple[Any, ...] = (AsdmUNet2DConditionModel,)


def student_class_of(family: ModelFamily) -> Any:
    """Return the class of a family's students."""
    return next(each for each in STUDENT_CLASSES if issubclass(each, family.model_class))
