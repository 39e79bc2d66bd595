"""The student's transformer: a PixArtTransformer2DModel with edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import PixArtTransformer2DModel

from asdm.families.transformer_architecture import PixArtArchitecture
from asdm.student.edited_model import EditedModel, register_student, signature_with_edits

MODULE_NAME = "asdm_transformer"  # of the module file beside the weights


@register_student
class AsdmPixArtTransformer2DModel(EditedModel, PixArtTransformer2DModel):
    """A PixArtTransformer2DModel with a list of edits applied; `forward` and module names are the stock ones.

    Args:
        edits: records of `asdm.edits`, or the same as dicts.
        transformer_config: the arguments of `PixArtTransformer2DModel`.

    Raises:
        AsdmError: an edit that this transformer does not allow.
    """

    architecture = PixArtArchitecture()
    module_name = MODULE_NAME
    home = "asdm.student.transformer"
    disguised_fields = ("norm_type",)
    _repeated_blocks: ClassVar = ["BasicTransformerBlock"]  # for compile_repeated_blocks; the stock class has none

    def __init__(self, edits: Sequence[Any] = (), **transformer_config: Any):
        super().__init__(**transformer_config)
        self.apply_edits(edits)

    __init__.__signature__ = signature_with_edits(PixArtTransformer2DModel)  # type: ignore[attr-defined]


# By this name a pipeline's index finds the class: in the file beside the weights, or in this package.
AsdmPixArtTransformer2DModel.__module__ = MODULE_NAME
