"""The student's model class of each family."""

from __future__ import annotations

from typing import Any

from asdm.families import ModelFamily
from asdm.student.unet import AsdmUNet2DConditionModel

STUDENT_CLASSES: tuple[Any, ...] = (AsdmUNet2DConditionModel,)


def student_class_of(family: ModelFamily) -> Any:
    """Return the class of a family's students."""
    return next(each for each in STUDENT_CLASSES if issubclass(each, family.model_class))


def student_class_named(name: str | None) -> Any | None:
    """Return the class of students of that name, as a config has it; None where it is a stock model's."""
    return next((each for each in STUDENT_CLASSES if each.__name__ == name), None)
