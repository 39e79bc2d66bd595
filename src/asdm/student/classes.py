"""The classes of students, one for each family of models."""

from __future__ import annotations

from typing import Any

from asdm.student.unet import AsdmUNet2DConditionModel

STUDENT_CLASSES: tuple[type[Any], ...] = (AsdmUNet2DConditionModel,)


def student_class(name: str | None) -> type[Any] | None:
    """The class of students of that name, as a model's config has it; None where it is not a student's."""
    return next((kind for kind in STUDENT_CLASSES if kind.__name__ == name), None)
