"""Shortened students are stock UNets: what they inherit, how they load, what they cannot be."""

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from asdm import AsdmError, PruningPlan, Stage, build_student, distill, save_pipeline, with_unet
from asdm.families.unet_shorter import dropped, teacher_key
from asdm.families.unet_structure import removable_units
from asdm.training.log import read_log
from conftest import predict, tiny_pipeline, tiny_sdxl_unet, tiny_unet

TINY = {"edit": "drop_layers", "layers_per_block": 1, "mid_block": False, "levels": 3}


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def shorter(unet, **fields):
    return build_student(unet, PruningPlan.for_unet(unet, [{**TINY, **fields}]))


def test_nothing_shortened_is_bit_identical(unet):
    same = shorter(unet, layers_per_block=2, mid_block=True, levels=None)
    assert type(same) is UNet2DConditionModel
    assert torch.equal(predict(same), predict(unet))


@pytest.mark.parametrize("fields", [{}, {"mid_block": True}, {"levels": 4}, {"layers_per_block": 2}])
def test_what_stays_computes_what_it_computed(unet, fields):
    """A reference by hand: the dropped parts of the original taken out of its module lists."""
    student, reference = shorter(unet, **fields), tiny_unet()
    settings = {**TINY, **fields}
    for block in reference.down_blocks:
        block.resnets = block.resnets[: settings["layers_per_block"]]
    for block in reference.up_blocks:
        if settings["layers_per_block"] == 1:
            block.resnets = nn.ModuleList([block.resnets[0], block.resnets[2]])
    for block in [*reference.down_blocks, *reference.up_blocks]:
        if getattr(block, "attentions", None) and settings["layers_per_block"] == 1:
            block.attentions = nn.ModuleList([block.attentions[0], block.attentions[-1]][: len(block.resnets)])
    if not settings["mid_block"]:
        reference.mid_block = None
    if settings["levels"] == 3:
        reference.down_blocks, reference.up_blocks = reference.down_blocks[:3], reference.up_blocks[1:]
        reference.down_blocks[-1].downsamplers = None
        reference.num_upsamplers -= 1
    assert torch.equal(predict(student), predict(reference))


def test_sdxl_is_shortened_too():
    unet = tiny_sdxl_unet()
    student = shorter(unet, levels=None)
    assert predict(student).shape == predict(unet).shape
    assert student.config.transformer_layers_per_block == (1, 2, 2)
    with pytest.raises(AsdmError, match="levels=2: what enters"):
        shorter(unet, levels=2)


def test_layers_of_different_depths_keep_their_own_blocks():
    depths = {
        "transformer_layers_per_block": [1, [2, 2], [3, 3]],
        "reverse_transformer_layers_per_block": [[3, 3, 5], [2, 1, 1], 1],
    }
    unet = tiny_unet(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        **depths,
    )
    for levels, expected in ((None, [[3, 5], [2, 1]]), (2, [[2, 1]])):
        student = shorter(unet, mid_block=True, levels=levels)
        found = [
            [len(layer.transformer_blocks) for layer in block.attentions]
            for block in student.up_blocks
            if getattr(block, "attentions", None)
        ]
        assert found == expected
        predict(student)


def test_it_loads_with_diffusers_alone(tmp_path):
    pipeline = tiny_pipeline()
    student = shorter(pipeline.unet)
    save_pipeline(with_unet(pipeline, student), tmp_path / "short")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "short").unet
    assert type(loaded) is UNet2DConditionModel
    assert torch.equal(predict(loaded), predict(student))
    assert "asdm" not in (tmp_path / "short" / "unet" / "config.json").read_text()


def test_it_is_distilled_on_the_blocks_that_its_own_were(data_folder, tmp_path):
    teacher = tiny_pipeline()
    stage = Stage(name="joint", steps=1, batch_size=2)
    distill(
        teacher, shorter(teacher.unet, layers_per_block=2, levels=4), data_folder, tmp_path / "same", stages=[stage]
    )
    distill(teacher, shorter(teacher.unet), data_folder, tmp_path / "tiny", stages=[stage])
    (row,) = read_log(tmp_path / "tiny" / "00-joint" / "log.jsonl")
    blocks = {name for name in row if name.startswith("feature/")}
    # The innermost of the levels that stay has lost its downsampler, so its output has another size.
    assert blocks == {
        f"feature/{name}" for name in ("down_blocks.0", "down_blocks.1", *(f"up_blocks.{i}" for i in range(3)))
    }


def test_names_in_the_original(unet):
    student = shorter(unet)
    assert teacher_key("up_blocks.0.resnets.1.conv1.weight", student, unet) == "up_blocks.1.resnets.2.conv1.weight"
    assert teacher_key("up_blocks.2", student, unet) == "up_blocks.3"
    assert teacher_key("down_blocks.2.resnets.0", student, unet) == "down_blocks.2.resnets.0"
    same = tiny_unet()
    assert all(teacher_key(name, same, unet) == name for name in same.state_dict())


def test_dropped_units_are_those_that_the_student_lacks(unet):
    names = [unit.name for unit in removable_units(unet)]
    plan = PruningPlan.for_unet(unet, [TINY])
    student = build_student(unet, plan)
    kept = {teacher_key(unit.name, student, unet) for unit in removable_units(student) if unit.parent is None}
    whole = {unit.name for unit in removable_units(unet) if unit.parent is None}
    assert set(dropped(plan.edits[0], names)) == whole - kept


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{**TINY, "layers_per_block": 3}], "layers_per_block=3: this UNet has 2"),
        ([{**TINY, "levels": 5}], "levels=5: this UNet has 4"),
        ([{**TINY, "levels": 1}], "levels"),
        ([TINY, {"edit": "remove", "unit": "mid_block"}], "goes with no other edit"),
        ([{**TINY, "blocks": 1}], "blocks"),
    ],
)
def test_what_cannot_be_is_said(unet, edits, message):
    with pytest.raises(AsdmError, match=message):
        PruningPlan.for_unet(unet, edits)


def test_a_student_with_edits_is_not_shortened(unet):
    student = build_student(unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block"}]))
    with pytest.raises(AsdmError, match="start from the original"):
        PruningPlan.for_unet(student, [TINY])


def test_a_plan_saved_under_the_old_name_loads(unet, tmp_path):
    plan = PruningPlan.for_unet(unet, [TINY])
    old = plan.to_json().replace('"drop_layers"', '"shorten"')
    (tmp_path / "plan.json").write_text(old, "utf-8")
    assert PruningPlan.load(tmp_path / "plan.json").edits == plan.edits
