"""A family of models is registered by another package, as docs/extend.md says: here DiT's transformers."""

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from asdm import AsdmError, PruningPlan, build_student
from asdm.families.records import Unit
from asdm.families.registry import _FAMILIES, family_named, family_of, register_family
from asdm.families.transformer_architecture import PixArtArchitecture
from asdm.families.transformers import PixArtFamily
from asdm.families.unet import UNetFamily
from asdm.student.edited_model import STUDENT_CLASSES, EditedModel, register_student, signature_with_edits

FEED_FORWARD = "transformer_blocks.1.ff"


class DiTArchitecture(PixArtArchitecture):
    """DiT's blocks are PixArt's without cross-attention."""

    model_class = DiTTransformer2DModel

    def units(self, model: Any) -> list[Unit]:
        return [unit for unit in super().units(model) if unit.kind != "cross_attention"]


class DiTFamily(DiTArchitecture, PixArtFamily):
    """DiT's transformers."""


class AsdmDiTTransformer2DModel(EditedModel, DiTTransformer2DModel):
    """A DiTTransformer2DModel with a list of edits applied."""

    architecture = DiTArchitecture()
    module_name = home = "my_package_dit"
    disguised_fields = ("norm_type",)

    def __init__(self, edits=(), **config):
        super().__init__(**config)
        self.apply_edits(edits)

    __init__.__signature__ = signature_with_edits(DiTTransformer2DModel)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def family():
    register_family(DiTFamily)
    yield
    _FAMILIES.pop()


def test_a_class_that_is_derived_from_a_known_one_has_a_family_of_its_own(unet):
    class WiderUNet2DConditionModel(UNet2DConditionModel):
        """Another architecture that builds on diffusers' UNet."""

    class WiderFamily(UNetFamily):
        model_class = WiderUNet2DConditionModel

    register_family(WiderFamily)
    try:
        wider = WiderUNet2DConditionModel.from_config(unet.config)
        assert type(family_of(wider)) is type(family_named("AsdmWiderUNet2DConditionModel")) is WiderFamily
        assert type(family_of(unet)) is type(family_named("AsdmUNet2DConditionModel")) is UNetFamily
    finally:
        _FAMILIES.pop()


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8}
    return DiTTransformer2DModel(**sizes, norm_num_groups=1, num_embeds_ada_norm=10).eval()


def predict(model):
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(inputs, timestep=torch.tensor([3, 3]), class_labels=torch.tensor([1, 2]), return_dict=False)[0]


def plan_of(model):
    return PruningPlan.for_unet(model, [{"edit": "remove", "unit": FEED_FORWARD}])


def test_its_students_are_of_the_class_that_is_registered_for_it(model):
    register_student(AsdmDiTTransformer2DModel)
    try:
        student = build_student(model, plan_of(model))
    finally:
        STUDENT_CLASSES.remove(AsdmDiTTransformer2DModel)
    assert type(student) is AsdmDiTTransformer2DModel and student.config.edits[0]["unit"] == FEED_FORWARD
    plain = predict(model)
    with torch.no_grad():
        for parameter in model.get_submodule(FEED_FORWARD).parameters():
            parameter.zero_()
    assert torch.allclose(predict(student), predict(model), atol=1e-6)
    assert not torch.allclose(predict(student), plain, atol=1e-4)


def test_without_a_class_of_students_its_plans_are_refused_in_one_line(model):
    with pytest.raises(AsdmError, match=r"DiTTransformer2DModel: no class of students is regist.*register_student$"):
        build_student(model, plan_of(model))
