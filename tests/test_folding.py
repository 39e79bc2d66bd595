"""Projections fold into the weights around them: the same outputs, fewer modules, files that load everywhere."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from asdm import AsdmError, PruningPlan, build_student, fold_compensation, load_pipeline, with_unet
from asdm.compensation.folding import fold_projections
from asdm.edits.projections import Projection
from asdm.families import denoiser_call, family_of
from asdm.families.folding import Affine
from asdm.measure.macs import counting_macs
from asdm.planning.possible_edits import possible_edits
from asdm.sensitivity.analysis import analyze
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.edited_model import edits_of
from asdm.student.surgery import model_without_weights
from asdm.student.transformer import AsdmPixArtTransformer2DModel
from asdm.student.unet import AsdmUNet2DConditionModel
from conftest import (
    predict,
    student_of_every_kind,
    tiny_pipeline,
    tiny_sdxl_unet,
    tiny_transformer,
    tiny_unet,
    unet_inputs,
    without_asdm,
)

SKIP, RESNET, ATTENTION = "down_blocks.0.resnets.0", "up_blocks.1.resnets.0", "up_blocks.1.attentions.0"
MID = [f"mid_block.{part}" for part in ("resnets.0", "attentions.0", "resnets.1")]
TRANSFORMERS = [f"{place}.attentions.0.transformer_blocks" for place in ("down_blocks.0", "down_blocks.1", "mid_block")]
TRANSFORMERS += [f"up_blocks.{level}.attentions.{index}.transformer_blocks" for level in (0, 1) for index in (0, 1)]


def small_unet(**changes):
    """SD 1.x's topology with two levels of one layer each; the resnets of the second and of the decoder path have a
    shortcut convolution."""
    types = {f"{side}_block_types": (f"CrossAttn{side.title()}Block2D",) * 2 for side in ("down", "up")}
    return tiny_unet(**{"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 4, **types, **changes})


def removal(unit, compensate="linear", **fields):
    return {"edit": "remove", "unit": unit, "compensate": compensate, **fields}


def fitted(model, *edits):
    """Return a student of these edits whose projections are somewhere, as fitted ones are."""
    student = build_student(model, PruningPlan.for_unet(model, edits))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if any(part in name for part in ("compensation", "router", "expert")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return student


def projections(student):
    """Return the units that have a projection, with its kind."""
    found = {}
    for name, module in student.named_modules():
        if isinstance(module, Projection):
            found[name.removesuffix(".compensation")] = Affine.of(module).kind
    return found


def kinds(student):
    """Return the units whose edits have a projection in the config, with its kind."""
    return {edit["unit"]: edit["compensate"] for edit in student.config["edits"] if "compensate" in edit}


def call(model):
    with torch.no_grad():
        return denoiser_call(model)().double()


def assert_folds(student, left):
    """Fold a student: its prediction stays, and these projections, with these kinds, are left."""
    before = call(student)
    folded = fold_compensation(student)
    assert (call(folded) - before).abs().max() < 1e-5 * before.abs().max()
    assert projections(folded) == left
    by_config = model_without_weights(folded.original(), edits_of(folded))
    assert {n: t.shape for n, t in folded.state_dict().items()} == {
        n: t.shape for n, t in by_config.state_dict().items()
    }
    return folded


# What is removed in a transformer of one block, and in one of two; and the projections that are left.
ONE_BLOCK = [
    (["0.attn1"], []),
    (["0.ff"], []),
    (["0.attn1", "0.attn2"], []),
    (["0.attn2", "0.ff"], []),
    (["0.attn1", "0.attn2", "0.ff"], []),
    (["0.attn2"], ["0.attn2"]),
    (["0.attn1", "0.ff"], []),
]
TWO_BLOCKS = [
    (["0.attn1", "1.ff"], []),
    (["0.ff", "1.attn1"], ["0.ff"]),
    (["1.attn1", "1.attn2", "1.ff"], []),
    (["0.attn1", "0.attn2", "0.ff", "1.attn1"], []),
    (["0.attn2", "0.ff", "1.attn1", "1.attn2"], ["0.attn2"]),
    (["1.attn1", "1.ff"], ["1.attn1"]),
    (["0.attn1", "0.attn2", "0.ff", "1.attn1", "1.attn2", "1.ff"], []),
]


@pytest.mark.parametrize("cases", [ONE_BLOCK, TWO_BLOCKS], ids=["one block", "two blocks"])
@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear"])
@pytest.mark.parametrize("kind", ["bias", "diagonal", "linear"])
def test_projections_at_the_ends_of_a_transformer_fold(kind, linear, cases):
    unet = small_unet(use_linear_projection=linear, transformer_layers_per_block=1 if cases is ONE_BLOCK else 2)
    edits, left = [], {}
    for transformer, (branches, staying) in zip(TRANSFORMERS, cases, strict=True):
        edits += [removal(f"{transformer}.{branch}", kind) for branch in branches]
        left |= {f"{transformer}.{branch}": kind for branch in staying if kind != "bias"}
    assert kinds(assert_folds(fitted(unet, *edits), left)) == left


def test_in_sdxl_neighbouring_projections_of_two_kinds_become_one():
    deep = "down_blocks.2.attentions.0.transformer_blocks"
    edits = [removal(f"{deep}.0.ff", "diagonal"), removal(f"{deep}.1.attn1"), removal(f"{deep}.1.attn2", "bias")]
    edits += [removal("down_blocks.1.attentions.0.transformer_blocks.1.ff")]
    assert_folds(fitted(tiny_sdxl_unet(), *edits), {f"{deep}.0.ff": "linear"})


def test_a_branch_removed_without_a_projection_is_passed():
    edits = [removal(f"{TRANSFORMERS[0]}.0.attn1", "none"), removal(f"{TRANSFORMERS[0]}.0.attn2")]
    assert_folds(fitted(small_unet(), *edits), {})


@pytest.mark.parametrize(
    ("edits", "left"),
    [
        ([removal(ATTENTION)], {}),
        ([removal(ATTENTION, "diagonal"), removal(RESNET, "diagonal")], {}),
        ([removal("down_blocks.1.attentions.0", "bias")], {}),
        # The output of a layer of the encoder path is a skip connection, which another layer reads.
        ([removal(SKIP)], {SKIP: "linear"}),
        ([removal("down_blocks.0.attentions.0")], {"down_blocks.0.attentions.0": "linear"}),
        ([removal("down_blocks.0.attentions.0", "bias")], {}),
        ([removal(SKIP, "bias"), removal("down_blocks.0.attentions.0")], {SKIP: "linear"}),
        ([removal("mid_block")], {"mid_block": "linear"}),
        ([removal(name) for name in MID], {MID[0]: "linear"}),
        ([removal(MID[1]), removal(MID[2], "diagonal")], {MID[1]: "linear"}),
        ([removal(MID[2], "bias")], {}),
    ],
)
def test_layers_fold_where_nothing_else_reads_what_is_between(edits, left):
    assert projections(assert_folds(fitted(small_unet(), *edits), left)) == left


@pytest.mark.parametrize(
    ("edits", "left"),
    [
        ([removal(MID[1], "bias")], {}),
        ([removal(MID[0]), removal(MID[1])], {MID[0]: "linear"}),
        ([removal(MID[0], "none"), removal(MID[1])], {MID[1]: "linear"}),
        ([removal(MID[2], "bias")], {MID[2]: "bias"}),  # what it reads is divided, too
    ],
)
def test_a_resnet_that_scales_its_output(edits, left):
    assert_folds(fitted(small_unet(mid_block_scale_factor=2.0), *edits), left)


@pytest.mark.parametrize("resnet", [MID[0], RESNET])
@pytest.mark.parametrize("kind", ["bias", "linear"])
def test_the_term_of_the_time_embedding_is_projected_too(resnet, kind):
    attention = resnet.replace("resnets", "attentions")
    student = fitted(small_unet(), removal(resnet, kind, compensate_time=True), removal(attention))
    folded = assert_folds(student, {resnet: "linear"} if resnet == MID[0] else {})
    edit = next(edit for edit in folded.config["edits"] if edit["unit"] == resnet)
    assert edit["compensate_time"]


def test_a_scale_for_each_channel_does_not_join_a_term_of_the_time_embedding():
    edits = [removal(MID[0], "bias", compensate_time=True), removal(MID[1], "diagonal")]
    assert_folds(fitted(small_unet(), *edits), {MID[0]: "bias", MID[1]: "diagonal"})


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["bias", "linear"])
def test_expert_kernels_before_a_removed_attention_are_projected_too(activation, kind):
    bank = {"edit": "cond_conv", "unit": f"{RESNET}.conv2", "experts": ["up_blocks.1.resnets.1.conv2"]}
    edits = [removal(ATTENTION, kind), removal("up_blocks.1.resnets.1", "none"), {**bank, "activation": activation}]
    assert_folds(fitted(small_unet(), *edits), left={})


def test_a_constant_stays_behind_a_bias_that_is_mixed():
    bank = {"edit": "cond_conv", "unit": f"{SKIP}.conv2", "experts": ["up_blocks.1.resnets.1.conv2"]}
    edits = [removal("down_blocks.0.attentions.0", "bias"), {**bank, "activation": "sigmoid"}]
    assert_folds(fitted(small_unet(), *edits), left={"down_blocks.0.attentions.0": "bias"})


def test_what_boxes_are_read_by_between_attn1_and_attn2_stops_a_fold():
    attn1, attn2 = (f"{TRANSFORMERS[0]}.0.{branch}" for branch in ("attn1", "attn2"))
    student = fitted(small_unet(attention_type="gated"), removal(attn1), removal(attn2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "fuser.alpha" in name:
                parameter.fill_(1.0)
    boxes = {"boxes": torch.rand(2, 3, 4, generator=generator), "masks": torch.ones(2, 3)}
    boxes["positive_embeddings"] = torch.randn(2, 3, 32, generator=generator)

    def with_boxes():
        return predict(student, **unet_inputs(student), cross_attention_kwargs={"gligen": dict(boxes)})

    before = with_boxes()
    assert not torch.allclose(before, predict(student), atol=1e-4)
    fold_compensation(student)
    assert projections(student) == {attn2: "linear"}
    assert torch.allclose(with_boxes(), before, atol=1e-5)


def test_a_layer_of_another_class_is_left_alone():
    class Quantised(nn.Linear):
        pass

    units = [f"{TRANSFORMERS[0]}.0.{branch}" for branch in ("attn1", "ff")]
    student = fitted(small_unet(use_linear_projection=True), *map(removal, units))
    for name in ("proj_in", "proj_out"):
        student.get_submodule("down_blocks.0.attentions.0").get_submodule(name).__class__ = Quantised
    assert_folds(student, left=dict.fromkeys(units, "linear"))


def test_the_planner_knows_which_projections_fold_alone():
    unet = small_unet(transformer_layers_per_block=(1, 2))
    family = family_of(unet)
    names = [unit.name for unit in family.units(unet)]
    for name in [*names, "mid_block"]:
        student = model_without_weights(unet, PruningPlan.for_unet(unet, [removal(name)]).edits).to_empty(device="cpu")
        fold_projections(student)
        assert family.projection_folds(unet, name) == (not projections(student)), name


@pytest.fixture(scope="module")
def redundancy():
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=small_unet())
    return analyze(pipeline, sensitivity="taylor", timesteps=1, samples=1, latency_rounds=1)


def test_the_planner_counts_what_folds_as_free(redundancy):
    unet = small_unet()
    names = ("0.attn1", "0.ff", "0.attn2")
    wanted = [ATTENTION, RESNET, "down_blocks.0.attentions.0", *(f"{TRANSFORMERS[0]}.{name}" for name in names)]
    for choice in possible_edits(redundancy, "linear"):
        if choice.edit.unit in wanted and choice.edit.is_removal:
            wanted.remove(choice.edit.unit)
            student = build_student(unet, PruningPlan.for_unet(unet, [choice.edit]))
            fold_projections(student)
            with counting_macs(student) as count:
                denoiser_call(student, batch_size=1)()
            left = sum(parameter.numel() for parameter in student.parameters())
            assert redundancy.parameters - choice.parameters == left
            assert redundancy.gmacs * 1e9 - choice.macs == pytest.approx(count.below(), rel=1e-6)
    assert not wanted


def test_a_profile_of_an_earlier_version_is_read(redundancy, tmp_path):
    text = redundancy.model_dump_json().replace("projection_folds", "has_shortcut")
    assert "has_shortcut" in text
    (tmp_path / "redundancy.json").write_text(text)
    assert RedundancyMap.load(tmp_path / "redundancy.json") == redundancy


ATTN1, FF = f"{TRANSFORMERS[0]}.0.attn1", f"{TRANSFORMERS[0]}.0.ff"
EDITS = (removal(ATTN1), removal(FF), removal(ATTENTION), removal(SKIP))


@pytest.mark.slow
def test_a_folded_student_is_saved_and_loads_with_and_without_the_package(tmp_path):
    pipeline = tiny_pipeline()
    folded = assert_folds(fitted(small_unet(), *EDITS), {SKIP: "linear"})
    with_unet(pipeline, folded).save_pretrained(tmp_path / "student")
    inputs = unet_inputs(folded)
    loaded = load_pipeline(tmp_path / "student").unet
    assert type(loaded) is AsdmUNet2DConditionModel and torch.equal(
        predict(loaded, **inputs), predict(folded, **inputs)
    )
    torch.save({"inputs": inputs, "noise_pred": predict(folded, **inputs)}, tmp_path / "tensors.pt")
    done = without_asdm(
        f"""
        import torch
        from diffusers import DiffusionPipeline
        tensors = torch.load({str(tmp_path / "tensors.pt")!r})
        pipeline = DiffusionPipeline.from_pretrained({str(tmp_path / "student")!r}, trust_remote_code=True)
        with torch.no_grad():
            noise_pred = pipeline.unet(**tensors["inputs"], return_dict=False)[0]
        torch.testing.assert_close(noise_pred, tensors["noise_pred"], atol=1e-5, rtol=0)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_folded_student_takes_a_lora_and_fuses_it():
    peft = pytest.importorskip("peft")
    folded = fold_compensation(fitted(small_unet(), *EDITS))
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["proj_in", "to_q", "conv2", "compensation"])
    before = predict(folded)
    folded.add_adapter(config)
    beside = predict(folded)
    assert not torch.allclose(beside, before, atol=1e-3)
    with pytest.raises(AsdmError, match="LoRA"):
        fold_compensation(folded)
    folded.fuse_lora()
    assert torch.allclose(predict(folded), beside, atol=1e-4)


def test_an_earlier_student_loads_unfolded_and_can_be_folded(tmp_path):
    student = student_of_every_kind()
    student.save_pretrained(tmp_path)
    loaded = AsdmUNet2DConditionModel.from_pretrained(tmp_path)
    assert projections(loaded) == projections(student) != {}
    assert torch.equal(predict(loaded), predict(student))
    before = predict(loaded)
    folded = fold_compensation(loaded)
    assert len(projections(folded)) < len(projections(student))
    assert torch.allclose(predict(folded), before, atol=1e-4)


def test_a_folded_student_can_be_pruned_further():
    folded = fold_compensation(fitted(small_unet(), removal(ATTN1), removal(ATTENTION)))
    again = build_student(
        folded, PruningPlan.for_unet(folded, [removal("down_blocks.0.attentions.0"), removal(RESNET)])
    )
    assert {edit["unit"] for edit in again.config["edits"]} == {ATTENTION, "down_blocks.0.attentions.0", RESNET}
    assert_folds(again, {})  # a projection that changes nothing goes


def test_half_precision_is_kept():
    student = fitted(small_unet(), *EDITS).bfloat16()
    before = call(student)
    folded = fold_compensation(student)
    assert folded.dtype == torch.bfloat16
    assert (call(folded) - before).square().mean() < 1e-3 * before.square().mean()


def test_a_plain_model_is_returned():
    unet = small_unet()
    assert fold_compensation(unet) is unet


# -- PixArt's transformers -----------------------------------------------------------------------------


def block(index, branch=""):
    return f"transformer_blocks.{index}{branch and '.'}{branch}"


@pytest.mark.parametrize(
    ("edits", "left"),
    [
        ([removal(block(0))], {block(0): "linear"}),
        ([removal(block(4))], {block(4): "linear"}),
        ([removal(block(1)), removal(block(2)), removal(block(3), "diagonal")], {block(1): "linear"}),
        ([removal(block(1)), removal(block(3))], {block(1): "linear", block(3): "linear"}),
        ([removal(block(1, branch)) for branch in ("attn1", "attn2", "ff")],
         {block(1, branch): "linear" for branch in ("attn1", "attn2", "ff")}),
        ([removal(block(1)), removal(block(2, "attn1"), "none"), removal(block(2, "attn2"))], {block(1): "linear"}),
        ([removal(block(1, "ff"), "none"), removal(block(2), "bias")], {}),
        ([removal(block(2), "bias")], {block(2): "bias"}),
    ],
)  # fmt: skip
def test_projections_of_neighbouring_blocks_of_a_transformer_become_one(edits, left):
    assert kinds(assert_folds(fitted(tiny_transformer(), *edits), left)) == left


def test_a_student_that_is_trained_keeps_each_blocks_output():
    student = fitted(tiny_transformer(), removal(block(1)), removal(block(2)))
    assert fold_compensation(student, within_blocks=True) is student
    assert len(projections(student)) == 2
    untouched = build_student(small_unet(), PruningPlan.for_unet(small_unet(), [removal(SKIP), removal(ATTN1)]))
    assert projections(fold_compensation(untouched, within_blocks=True)) == {SKIP: "linear"}


def test_where_no_projection_is_left_the_student_is_stock():
    model = tiny_transformer()
    student = build_student(model, PruningPlan.for_unet(model, [removal(block(1)), removal(block(3))]))
    before = call(student)  # a fit that finds no better projection leaves the starting tensors
    assert type(student) is AsdmPixArtTransformer2DModel
    stock = fold_compensation(student)
    assert type(stock) is PixArtTransformer2DModel and len(stock.transformer_blocks) == 3
    assert torch.allclose(call(stock), before, atol=1e-6)
