"""The classes of students, one for each family of models."""

from __future__ import annotations

from typing import Any

from asdm.families import ModelFamily
from asdm.student.transformer import AsdmPixArtTransformer2DModel
from asdm.student.unet import AsdmUNet2DConditionModel

STUDENT_CLASSES: tuple[type[Any], ...] = (AsdmUNet2DConditionModel, AsdmPixArtTransformer2DModel)


def student_class(name: str | None) -> type[Any] | None:
    """Return the class of students of that name, as a model's config has it; None where it is not a student's."""
    return next((kind for kind in STUDENT_CLASSES if kind.__name__ == name), None)


def student_class_of(family: ModelFamily) -> Any:
    """Return the class of a family's students."""
    return next(kind for kind in STUDENT_CLASSES if issubclass(kind, family.model_class))
