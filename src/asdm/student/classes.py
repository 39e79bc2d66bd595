"""The classes of students, one for each family of models; importing this module registers those of this package."""

from __future__ import annotations

from typing import Any

from asdm.errors import AsdmError
from asdm.families import ModelFamily
from asdm.student.edited_model import STUDENT_CLASSES
from asdm.student.transformer import AsdmPixArtTransformer2DModel as AsdmPixArtTransformer2DModel
from asdm.student.unet import AsdmUNet2DConditionModel as AsdmUNet2DConditionModel


def student_class(name: str | None) -> type[Any] | None:
    """Return the class of students of that name, as a model's config has it; None where it is not a student's."""
    return next((kind for kind in STUDENT_CLASSES if kind.__name__ == name), None)


def student_class_of(family: ModelFamily) -> Any:
    """Return the class of a family's students.

    Raises:
        AsdmError: none is registered.
    """
    for kind in STUDENT_CLASSES:
        if issubclass(kind, family.model_class):
            return kind
    known = ", ".join(kind.__name__ for kind in STUDENT_CLASSES)
    raise AsdmError(
        f"{family.model_class.__name__}: no class of students is registered for it; there are {known}; add one by "
        "asdm.student.edited_model.register_student"
    )
