"""One file in the original layout: what diffusers reads back, what programs infer from the names, what is refused."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModelWithProjection

from asdm import (
    AsdmError,
    PruningPlan,
    build_student,
    convert_lora,
    export_checkpoint,
    fit_compensation,
    fold_compensation,
    load_pipeline,
    make_plan,
    save_pipeline,
    with_unet,
)
from asdm.families import UNetFamily
from asdm.families.unet_original import OriginalShape, original_structure
from asdm.pipelines import streaming
from asdm.pipelines.loading import load_mapped
from asdm.pipelines.original_layout import StoredTensor
from asdm.pipelines.random_models import UNETS
from asdm.pipelines.shapes import denoiser_without_weights
from asdm.runtime import checkpoint
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import empty_student
from conftest import _text_encoder, predict, tiny_pipeline, tiny_sdxl_pipeline, tiny_sdxl_unet, tiny_unet

FAMILY = UNetFamily()
TINY = {"edit": "drop_layers", "layers_per_block": 1, "mid_block": False, "levels": 3}
PREFIX = "model.diffusion_model."


def student_of(unet, *edits):
    return build_student(unet, PruningPlan.for_unet(unet, edits))


def block_of(path, *branches):
    return [{"edit": "remove", "unit": f"{path}.{branch}"} for branch in branches or ("attn1", "attn2", "ff")]


def full_size(shape):
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[shape])


def of_preset(unet, name):
    edit = FAMILY.preset(name, FAMILY.units(unet)).edit
    return empty_student(unet, PruningPlan.for_unet(unet, [edit]))


def tiny_sd2_pipeline():
    pipeline = tiny_pipeline()
    pipeline.unet = tiny_unet(use_linear_projection=True)
    return pipeline


def tiny_sdxl_pipeline_with_two_widths():
    """diffusers tells the two text encoders by their widths, which are equal in the tiny pipeline."""
    pipeline = tiny_sdxl_pipeline()
    pipeline.text_encoder_2 = _text_encoder(CLIPTextModelWithProjection, 64, pipeline.tokenizer_2)
    return pipeline


# -- diffusers reads back what was written -----------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline_with_two_widths])
@pytest.mark.parametrize("edit", [None, {**TINY, "levels": None}])
def test_diffusers_reads_back_every_tensor(make, edit, tmp_path):
    """SD 1.x's text encoder in CLIP's layout, SD 2.x's and SDXL's second one in OpenCLIP's."""
    pipeline = make()
    if edit is not None:
        pipeline = with_unet(pipeline, student_of(pipeline.unet, edit))
    save_pipeline(pipeline, tmp_path / "folder")
    export_checkpoint(pipeline, tmp_path / "one.safetensors", "diffusers", dtype="fp32")
    kind = StableDiffusionXLPipeline if hasattr(pipeline, "text_encoder_2") else StableDiffusionPipeline
    read = kind.from_single_file(tmp_path / "one.safetensors", config=str(tmp_path / "folder"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(pipeline, part):
            ours, theirs = getattr(pipeline, part).state_dict(), getattr(read, part).state_dict()
            assert ours.keys() == theirs.keys(), part
            for name, tensor in ours.items():
                assert torch.equal(tensor, theirs[name]), (part, name)


def read_unet(tensors, config):
    """The stock UNet that diffusers reads from a file's tensors, strictly."""
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(convert_ldm_unet_checkpoint(tensors, unet.config))
    return unet.eval()


def test_removed_parts_that_a_stock_unet_lacks_leave_the_same_function():
    """The mid block and the lowest level, removed as units: names of modules stay, those of the file have no gaps."""
    unet = tiny_unet()
    student = student_of(unet, *({"edit": "remove", "unit": unit} for unit in ("mid_block", "down_blocks.3")))
    state = student.state_dict()
    tensors = {name: state[tensor] for tensor, name in FAMILY.original_layout(student, None).names.items()}
    stock = student_of(unet, {**TINY, "layers_per_block": 2})
    assert torch.equal(predict(read_unet(tensors, stock.config)), predict(student))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"edit": "drop_layers", "layers_per_block": [2, 2, 1, 1]}, r"this one has \[2, 2, 1, 1\]"),
        ({"edit": "remove", "unit": "down_blocks.3"}, "this one lacks its lowest level"),
    ],
)
def test_what_diffusers_cannot_read_from_one_file_is_refused_with_the_remedy(edit, said, tmp_path):
    pipeline = tiny_pipeline()
    student = with_unet(pipeline, student_of(pipeline.unet, edit))
    with pytest.raises(AsdmError, match=f"^diffusers: .*{said}; load the student's folder there$"):
        export_checkpoint(student, tmp_path / "one.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())


def test_a_student_keeps_its_function_in_a_file_for_diffusers_or_is_refused():
    """Whatever whole part is removed as units: diffusers gives each tensor of the file its name in the folder."""
    unet = tiny_sdxl_unet()
    units = [unit.name for unit in FAMILY.units(unet) if not unit.name.endswith(("attn1", "attn2", "ff"))]
    removals = [[{"edit": "remove", "unit": name}] for name in [*units, "mid_block"]]
    attentions = [name for name in units if ".attentions." in name]
    removals += [block_of(f"{name}.transformer_blocks.{number}") for name in attentions for number in (0, 1)]
    refused = []
    for edits in removals:
        student = student_of(unet, *edits)
        try:
            names = FAMILY.original_layout(student, "diffusers").names
        except AsdmError as error:
            refused += [re.search("first transformer blocks of an attention, and (.*) keeps", str(error))]
            continue
        state = student.state_dict()
        read = convert_ldm_unet_checkpoint({name: state[tensor] for tensor, name in names.items()}, student.config)
        assert read.keys() == state.keys() and all(read[tensor] is state[tensor] for tensor in state), edits
    assert [found[1] for found in refused if found] == attentions


def test_a_transformer_block_whose_branches_are_all_removed_is_left_out():
    unet = tiny_sdxl_unet()
    blocks = [f"down_blocks.1.attentions.{i}.transformer_blocks.0" for i in (0, 1)]
    student = student_of(unet, *block_of(blocks[0]), *block_of(blocks[1]))
    state = student.state_dict()
    tensors = {name: state[tensor] for tensor, name in FAMILY.original_layout(student, None).names.items()}
    stock = student_of(unet, {"edit": "drop_layers", "layers_per_block": 2, "transformer_blocks": blocks})
    assert [len(each.transformer_blocks) for each in stock.down_blocks[1].attentions] == [1, 1]
    torch.testing.assert_close(predict(stock), predict(student))
    assert torch.equal(predict(read_unet(tensors, stock.config)), predict(stock))


# -- what programs infer from the names --------------------------------------------------------------------


def inferred(names):
    """Transformer blocks of each layer, as a program that knows nothing but the names counts them: levels end at a
    downsampler, numbers run until one is missing, the decoder's layers mirror the encoder's."""

    def parts(block, number):
        return [name for name in names if name.startswith(f"{PREFIX}{block}.{number}.")]

    def depth(block, number):
        pattern = rf"{PREFIX}{block}\.{number}\.1\.transformer_blocks\.(\d+)\."
        return len({found[1] for name in names if (found := re.match(pattern, name))})

    levels, number = [[]], 1
    while parts("input_blocks", number):
        if f"{PREFIX}input_blocks.{number}.0.op.weight" in names:
            levels.append([])
        else:
            levels[-1].append(depth("input_blocks", number))
        number += 1
    decoder, number = [], 0
    for level in reversed(levels):
        decoder.append([])
        for _ in range(len(level) + 1):
            assert f"{PREFIX}output_blocks.{number}.0.in_layers.0.weight" in names
            decoder[-1].append(depth("output_blocks", number))
            number += 1
        # The upsampler is the last module of the level's last layer.
        place = 2 if decoder[-1][-1] else 1
        assert (f"{PREFIX}output_blocks.{number - 1}.{place}.conv.weight" in names) == (len(decoder) < len(levels))
    assert not parts("output_blocks", number)
    middle = -2
    if parts("middle_block", 0):
        middle = -1
    if parts("middle_block", 2):
        middle = len({name.split(".")[5] for name in names if f"{PREFIX}middle_block.1.transformer_blocks" in name})
    return OriginalShape(tuple(map(tuple, levels)), middle, tuple(map(tuple, decoder)))


# By ComfyUI's list of models: SDXL's kinds by the encoder path's depths.
COMFYUI = {
    "sdxl": [0, 0, 2, 2, 10, 10],
    "ssd-1b": [0, 0, 2, 2, 4, 4],
    "vega": [0, 0, 1, 1, 2, 2],
    "koala-700m": [0, 2, 5],
    "koala-1b": [0, 2, 6],
}
# (parameters in millions, mid block, depths of the decoder path) as published.
PUBLISHED = {
    "ssd-1b": (1331, -1, ((4, 4, 10), (2, 1, 1), (0, 0, 0))),
    "vega": (745, -1, ((2, 2, 2), (1, 1, 1), (0, 0, 0))),
    "koala-700m": (783, -2, ((5, 5), (2, 2), (0, 0))),
    "koala-1b": (1161, 6, ((6, 6), (2, 2), (0, 0))),
}


@pytest.fixture(scope="module")
def sdxl():
    return full_size("sdxl")


@pytest.mark.parametrize("preset", COMFYUI)
def test_comfyui_knows_sdxl_and_its_students(preset, sdxl):
    unet = sdxl if preset == "sdxl" else of_preset(sdxl, preset)
    names = set(FAMILY.original_layout(unet, "comfyui").names.values())
    shape = inferred(names)
    assert [depth for level in shape.encoder for depth in level] == COMFYUI[preset]
    assert shape == original_structure(unet).shape
    if preset in PUBLISHED:
        millions, middle, decoder = PUBLISHED[preset]
        assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == millions
        assert (shape.middle, shape.decoder) == (middle, decoder)


@pytest.mark.parametrize("shape", ["sd15", "sd21"])
@pytest.mark.parametrize("preset", [None, "bk-base", "bk-small", "bk-tiny"])
def test_numbers_have_no_gaps_for_comfyui(shape, preset):
    unet = full_size(shape)
    unet = unet if preset is None else of_preset(unet, preset)
    layout = FAMILY.original_layout(unet, "comfyui")
    assert inferred(set(layout.names.values())) == original_structure(unet).shape
    assert len(set(layout.names.values())) == len(unet.state_dict())
    # ComfyUI knows an SD 2.x that predicts velocities by a layer that shorter students lack.
    assert (layout.velocity_sign is not None) == (shape == "sd21" and preset is None)


def test_numbers_have_the_gaps_of_two_layers_a_level_for_stable_diffusion_cpp():
    names = FAMILY.original_layout(of_preset(full_size("sd15"), "bk-tiny"), "sdcpp").names.values()

    def numbers(block):
        return sorted({int(name.split(".")[3]) for name in names if f"{PREFIX}{block}." in name})

    assert numbers("input_blocks") == [0, 1, 3, 4, 6, 7]
    assert numbers("output_blocks") == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {f"{PREFIX}output_blocks.2.1.conv.weight", f"{PREFIX}output_blocks.5.2.conv.weight"} <= set(names)


@pytest.mark.parametrize("program", ["comfyui", "sdcpp"])
def test_a_program_that_does_not_know_the_shape_is_named(program, sdxl):
    halved = {"edit": "drop_layers", "layers_per_block": 1}
    with pytest.raises(AsdmError, match=rf"{program}.*(plan --portable|preset)"):
        FAMILY.original_layout(empty_student(sdxl, PruningPlan.for_unet(sdxl, [halved])), program)
    with pytest.raises(AsdmError, match="widths of SD 1"):
        FAMILY.original_layout(tiny_unet(), program)


@pytest.mark.parametrize("number", [0, 1])
def test_any_transformer_block_of_the_decoder_path_may_go_for_comfyui(number, sdxl):
    edits = block_of(f"up_blocks.1.attentions.0.transformer_blocks.{number}")
    student = empty_student(sdxl, PruningPlan.for_unet(sdxl, edits))
    shape = inferred(set(FAMILY.original_layout(student, "comfyui").names.values()))
    assert shape.decoder == ((10, 10, 10), (1, 2, 2), (0, 0, 0))
    with pytest.raises(AsdmError, match="sdcpp: reads of SDXL's shape only"):
        FAMILY.original_layout(student, "sdcpp")


@pytest.mark.parametrize("shape", ["sd15", "sd21"])
def test_comfyui_needs_an_attention_in_the_encoder_path_and_portable_plans_keep_one(shape):
    """It reads the width of the text embedding there, by which it tells SD 1.x from 2.x."""
    unet = full_size(shape)
    units = [unit.name for unit in FAMILY.units(unet)]
    of_encoder = [name for name in units if re.fullmatch(r"down_blocks\.\d\.attentions\.\d", name)]
    for names, is_known in ((of_encoder, False), (of_encoder[1:], True)):
        student = empty_student(unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": name} for name in names]))
        if is_known:
            FAMILY.original_layout(student, "comfyui")
        else:
            with pytest.raises(AsdmError, match=r"comfyui: .* attention in the encoder path.*plan --portable"):
                FAMILY.original_layout(student, "comfyui")
    for each in FAMILY.portable_shapes(unet.config, units):
        assert set(of_encoder) - set(each.gone), each.edit


@pytest.mark.parametrize("preset", ["bk-tiny", "ssd-1b", "vega"])
def test_students_for_inpainting_are_for_comfyui_and_not_for_stable_diffusion_cpp(preset):
    """stable-diffusion.cpp takes a UNet with nine channels for the whole model."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS["sd15" if preset == "bk-tiny" else "sdxl"] | {"in_channels": 9})
    student = of_preset(unet, preset)
    FAMILY.original_layout(student, "comfyui")
    FAMILY.original_layout(unet, "sdcpp")
    with pytest.raises(AsdmError, match="none for inpainting"):
        FAMILY.original_layout(student, "sdcpp")


@pytest.mark.parametrize(
    "edits, said",
    [
        ([{"edit": "remove", "unit": "mid_block", "compensate": "linear"}], "mid_block: removed with a projection"),
        ([{"edit": "remove", "unit": "down_blocks.0.resnets.1"}], "down_blocks.0.resnets.1: removed"),
        (block_of("down_blocks.0.attentions.0.transformer_blocks.0", "ff"), "ff: removed alone"),
        (block_of("down_blocks.0.attentions.0.transformer_blocks.0"), "remove it as a whole"),
        (
            [{"edit": "gri_attention", "unit": "down_blocks.0.attentions.0.transformer_blocks.0.attn1"}],
            "gri_attention",
        ),
        (
            [
                {
                    "edit": "cond_conv",
                    "unit": "down_blocks.0.resnets.0.conv2",
                    "experts": ["down_blocks.0.resnets.1.conv2"],
                }
            ],
            "cond_conv",
        ),
    ],
)
def test_students_that_no_program_computes_are_refused_with_the_remedy(edits, said, tmp_path):
    pipeline = tiny_pipeline()
    student = with_unet(pipeline, student_of(pipeline.unet, *edits))
    with pytest.raises(AsdmError, match=f"{said}.*"):
        export_checkpoint(student, tmp_path / "one.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())


# -- the file ----------------------------------------------------------------------------------------------


def test_the_file_says_what_it_is(tmp_path):
    pipeline = tiny_sdxl_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    edit = {"edit": "drop_layers", "layers_per_block": 1}
    made = export_checkpoint(
        with_unet(pipeline, student_of(pipeline.unet, edit)), tmp_path / "one.safetensors", "diffusers", license="mit"
    )
    with safe_open(made.file, "pt") as content:
        about = content.metadata()
        assert {content.get_slice(name).get_dtype() for name in content.keys()} == {"F16"}  # noqa: SIM118
        assert {"v_pred", "ztsnr"} <= set(content.keys())
    assert about["modelspec.prediction_type"] == "v" and about["modelspec.license"] == "mit"
    assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert json.loads(about["asdm.edits"]) == [{**edit, "mid_block": True, "levels": None}]
    assert "licence: mit" in made.card.read_text("utf-8") and "drop_layers" in made.card.read_text("utf-8")
    student = denoiser_without_weights(str(made.file))  # from the metadata alone
    assert len(student.down_blocks[1].resnets) == 1 and next(student.parameters()).is_meta


def test_a_short_student_that_predicts_velocities_says_what_to_set(tmp_path):
    pipeline = tiny_sd2_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    made = export_checkpoint(pipeline, tmp_path / "one.safetensors", "diffusers")
    assert "predicts velocities" in made.notes[0]
    assert made.notes[0] in made.card.read_text("utf-8")


VELOCITY = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"  # by whose spread ComfyUI knows an SD 2.x


@pytest.mark.parametrize(
    ("shape", "edits", "prediction", "spread", "program", "said"),
    [
        ("sd21", {}, "v_prediction", 0.2, "comfyui", None),
        ("sd21", {}, "v_prediction", 0.01, "comfyui", "ModelSamplingDiscrete with v_prediction"),
        ("sd21", {}, "epsilon", 0.2, "comfyui", "ModelSamplingDiscrete with eps"),
        ("sd21", {}, "epsilon", 0.01, "comfyui", None),
        ("sd21", {"in_channels": 9}, "v_prediction", 0.2, "comfyui", "ModelSamplingDiscrete with v_prediction"),
        ("sd21", {}, "v_prediction", 0.2, "sdcpp", "--prediction v"),
        ("sd15", {}, "v_prediction", 0.2, "comfyui", "ModelSamplingDiscrete with v_prediction"),
        ("sdxl", {}, "v_prediction", None, "comfyui", None),
        ("sdxl", {}, "v_prediction", None, "sdcpp", "--prediction v"),
    ],
)
def test_what_a_program_does_not_see_in_the_file_of_a_unet_is_told(
    shape, edits, prediction, spread, program, said, tmp_path, monkeypatch
):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[shape] | edits)
    if spread is not None:
        bias = torch.tensor([-spread, spread]).repeat(160)
        unet.get_submodule(VELOCITY.removesuffix(".bias")).bias = torch.nn.Parameter(bias)
    pipeline = with_unet(tiny_sdxl_pipeline() if shape == "sdxl" else tiny_pipeline(), unet)
    pipeline.scheduler.register_to_config(prediction_type=prediction)
    written = []
    monkeypatch.setattr(checkpoint, "require_savable", lambda *_: None)  # without weights
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda _file, tensors, *_: written.extend(tensors))
    made = export_checkpoint(pipeline, tmp_path / "one.safetensors", program, unet_only=True)
    assert [said is not None and said in note for note in made.notes] == [True] * (said is not None)
    # ComfyUI drops what lacks the UNet's prefix where it loads a UNet alone.
    markers = {tensor.name for tensor in written if tensor.shape == (0,)}
    assert markers == ({"v_pred", f"{PREFIX}v_pred"} if shape == "sdxl" else set())


@pytest.mark.parametrize(
    ("make", "prediction", "program", "said"),
    [
        (
            tiny_pipeline,
            "v_prediction",
            "comfyui",
            "zsnr in the node .* with v_prediction; in Forge .* Zero Terminal SNR",
        ),
        (tiny_pipeline, "epsilon", "comfyui", "zsnr in the node .* with eps;"),
        (tiny_sd2_pipeline, "sample", "comfyui", "zsnr in the node .* with x0;"),
        (tiny_pipeline, "v_prediction", "sdcpp", "no option"),
        (tiny_pipeline, "v_prediction", "diffusers", "rescale_betas_zero_snr=True"),
        (tiny_sdxl_pipeline, "v_prediction", "comfyui", None),
        (tiny_sdxl_pipeline, "epsilon", "comfyui", "zsnr in the node .* with eps;"),
        (tiny_sdxl_pipeline, "v_prediction", "sdcpp", "no option"),
        (tiny_sdxl_pipeline, "v_prediction", "diffusers", "rescale_betas_zero_snr=True"),
    ],
)
def test_a_schedule_that_ends_at_zero_snr_is_told(make, prediction, program, said, tmp_path, monkeypatch):
    monkeypatch.setattr("asdm.families.unet_programs._require_widths", lambda *_: None)
    monkeypatch.setattr("asdm.families.unet_programs._require_comfyui", lambda *_: None)
    monkeypatch.setattr("asdm.families.unet_programs._require_sdcpp", lambda *_: "dense")
    pipeline, notes = make(), []
    for zero_snr in (False, True):
        pipeline.scheduler.register_to_config(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
        made = export_checkpoint(pipeline, tmp_path / "one.safetensors", program, unet_only=True)
        notes.append(made.notes)
    more = [note for note in notes[1] if note not in notes[0]]
    assert len(more) == (said is not None) and all(re.search(said, note) for note in more)
    assert all(note in made.card.read_text("utf-8") for note in more)


def test_diffusers_takes_the_schedule_that_ends_at_zero_snr_from_the_folder(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    save_pipeline(pipeline, tmp_path / "folder")
    export_checkpoint(pipeline, tmp_path / "one.safetensors", "diffusers")
    read = StableDiffusionPipeline.from_single_file(tmp_path / "one.safetensors", config=str(tmp_path / "folder"))
    assert read.scheduler.config.rescale_betas_zero_snr and read.scheduler.config.prediction_type == "v_prediction"


def test_values_that_do_not_fit_and_interruptions_leave_nothing(tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = 1e6
    with pytest.raises(AsdmError, match=r"out.2.bias.*not finite in float16.*fp32"):
        export_checkpoint(pipeline, tmp_path / "one.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())
    export_checkpoint(pipeline, tmp_path / "one.safetensors", "diffusers", dtype="fp32", unet_only=True)
    before = (tmp_path / "one.safetensors").read_bytes()

    def interrupted(tensor, dtype, real=streaming._data):
        if tensor.name.startswith("first_stage_model"):
            raise KeyboardInterrupt
        return real(tensor, dtype)

    monkeypatch.setattr(streaming, "_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(pipeline, tmp_path / "one.safetensors", "diffusers", dtype="fp32")
    assert (tmp_path / "one.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["one.md", "one.safetensors"]


def test_files_of_others_are_not_replaced(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(AsdmError, match="no export of asdm"):
        export_checkpoint(tiny_pipeline(), tmp_path / "theirs.safetensors", "diffusers")
    with pytest.raises(AsdmError, match="ends in"):
        export_checkpoint(tiny_pipeline(), tmp_path / "theirs.ckpt", "diffusers")


def test_cards_of_others_are_not_replaced(tmp_path):
    """NAME.md beside NAME.safetensors, whether that is there or not."""
    pipeline, file, card = tiny_pipeline(), tmp_path / "readme.safetensors", tmp_path / "readme.md"
    for with_file in (False, True):
        if with_file:
            card.unlink()
            export_checkpoint(pipeline, file, "diffusers", unet_only=True)
        card.write_text("# My notes\n\nAll images were written by asdm 0.2.\n", "utf-8")
        with pytest.raises(AsdmError, match=r"readme\.md: exists, is no card .*readme\.safetensors; name another file"):
            export_checkpoint(pipeline, file, "diffusers")
        assert "My notes" in card.read_text("utf-8")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(AsdmError, match=r"folder\.md: is a folder.*folder\.safetensors"):
        export_checkpoint(pipeline, tmp_path / "folder.safetensors", "diffusers")
    assert sorted(os.listdir(tmp_path)) == ["folder.md", "readme.md", "readme.safetensors"]


def test_cards_of_exports_are_replaced(tmp_path):
    pipeline, file, card = tiny_pipeline(), tmp_path / "one.safetensors", tmp_path / "one.md"
    for without_file in (True, False):
        export_checkpoint(pipeline, file, "diffusers", unet_only=True)
        if without_file:
            file.unlink()
        else:
            card.write_text(card.read_text("utf-8") + "\nEdited.", "utf-8")
        export_checkpoint(pipeline, file, "diffusers", unet_only=True, license="mit")
        assert "licence: mit" in card.read_text("utf-8")


def test_names_that_are_not_utf_8_leave_a_file_that_programs_read(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    pipeline = load_pipeline(save_pipeline(tiny_pipeline(), tmp_path / "folder", {"teacher": "t\udce9"}))
    try:
        made = export_checkpoint(pipeline, file, "diffusers", unet_only=True, license="l\udce9")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 alone")
    assert made.file == file and file.exists()
    # safetensors opens no file of such a name
    about = safe_open(file.rename(tmp_path / "one.safetensors"), "pt").metadata()
    assert about["modelspec.title"] == r"caf\udce9"
    assert (about["modelspec.license"], about["asdm.teacher"]) == (r"l\udce9", r"t\udce9")
    assert r"# caf\udce9" in made.card.read_text("utf-8")


def test_no_second_copy_is_made(tmp_path, monkeypatch):
    """Each tensor is converted when it is written, and let go before the next."""
    alive, most = [], []

    def converted(tensor, dtype, real=streaming._data):
        data = real(tensor, dtype)
        alive.append(data.nbytes)
        most.append(data.nbytes)
        return data

    monkeypatch.setattr(streaming, "_data", converted)
    pipeline = tiny_pipeline()
    made = export_checkpoint(pipeline, tmp_path / "one.safetensors", "diffusers")
    assert max(most) < made.file.stat().st_size / 10


# -- LoRA --------------------------------------------------------------------------------------------------

KEPT = "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q"  # the last layer, the second of a student's
GONE = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
SHORT = {
    "edit": "drop_layers",
    "layers_per_block": 1,
    "transformer_blocks": ["up_blocks.1.attentions.2.transformer_blocks.0"],
}


def lora_file(path, unet, names, style):
    tensors = {}
    for name in names:
        module = unet.get_submodule(name)
        rank = 2
        down, up = torch.randn(rank, module.in_features), torch.randn(module.out_features, rank)
        if style == "diffusers":
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
            continue
        flat = name if style == "kohya" else originally(unet, name)
        start = f"lora_unet_{flat.replace('.', '_')}"
        tensors |= {
            f"{start}.lora_down.weight": down,
            f"{start}.lora_up.weight": up,
            f"{start}.alpha": torch.tensor(2.0),
        }
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 32)
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path


def originally(unet, name):
    return FAMILY.original_layout(unet, None).names[f"{name}.weight"].removeprefix(PREFIX).removesuffix(".weight")


on_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists mapped files there")


@on_linux
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16])
def test_an_export_reads_weights_from_the_mapped_files(wanted, tmp_path):
    """`load_pipeline` copies those that are not aligned, or of another dtype."""
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "saved")
    pipeline.unet.half().save_pretrained(tmp_path / "saved" / "unet", variant="fp16")  # beside the others
    pipeline.unet.float()
    loaded = load_mapped(tmp_path / "saved", dtype=wanted)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for name, parameter in loaded.unet.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name
        assert parameter.dtype == torch.float32


@on_linux
def test_mapped_weights_that_are_written_leave_memory(tmp_path):
    def of_files():
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1])  # kilobytes

    values = torch.arange(2**24, dtype=torch.float32)  # 64 MB
    save_file({"a": values}, tmp_path / "a.safetensors")
    (mapped,) = load_file(tmp_path / "a.safetensors").values()
    before = of_files()
    float(mapped.sum())
    assert of_files() > before + 60_000
    tensor = StoredTensor("a", tuple(mapped.shape), lambda: mapped, (mapped,))
    streaming.write_safetensors(tmp_path / "b.safetensors", [tensor], torch.float32, {})
    assert of_files() < before + 10_000
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], values) and torch.equal(mapped, values)


@pytest.mark.parametrize("style", ["diffusers", "kohya", "original"])
def test_a_lora_is_renumbered_and_what_the_student_lacks_is_counted(style, tmp_path):
    """Adapting and then shortening gives what shortening and then adapting gives."""
    original = tiny_sdxl_unet()
    kept = ["up_blocks.1.attentions.2.transformer_blocks.1.attn1.to_q", "down_blocks.2.attentions.0.proj_in"]
    gone = ["up_blocks.1.attentions.1.proj_in", "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2"]
    student = student_of(original, SHORT)
    lora = lora_file(tmp_path / "lora.safetensors", original, kept + gone, style)
    made = convert_lora(lora, student, tmp_path / "new.safetensors")
    assert (made.kept, made.dropped) == (2, sorted(gone))
    new = load_file(made.file)
    renamed = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    name = f"lora_unet_{renamed.replace('.', '_')}.lora_down.weight"  # diffusers' name, also for the original code's
    if style == "diffusers":
        name = f"unet.{renamed}.lora_A.weight"
    old = {"diffusers": f"unet.{kept[0]}.lora_A.weight"}.get(style)
    before = load_file(lora)
    old = old or next(key for key in before if key.endswith("attn1_to_q.lora_down.weight"))
    assert torch.equal(new[name], before[old])
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight" in new
    assert len(new) == (5 if style == "diffusers" else 7)


def test_a_file_of_a_student_with_unequal_levels_is_refused_in_one_line(tmp_path, monkeypatch):
    """Such as ComfyUI reads; tiny widths are for diffusers alone."""
    monkeypatch.setattr("asdm.families.unet_programs._require_equal_levels", lambda unet: None)
    pipeline = tiny_pipeline()
    student = with_unet(pipeline, student_of(pipeline.unet, {"edit": "drop_layers", "layers_per_block": [2, 2, 1, 1]}))
    save_pipeline(student, tmp_path / "folder")
    export_checkpoint(student, tmp_path / "one.safetensors", "diffusers")
    with pytest.raises(AsdmError, match=r"one\.safetensors: its UNet's levels have \[2, 2, 1, 1\] layers, .*folder$"):
        load_pipeline(tmp_path / "one.safetensors", config=tmp_path / "folder")


def test_a_file_of_an_edited_student_that_diffusers_cannot_read_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("asdm.families.unet_programs._require_first_blocks", lambda *_: None)
    pipeline = tiny_sdxl_pipeline_with_two_widths()
    edits = block_of("up_blocks.1.attentions.0.transformer_blocks.0")
    student = with_unet(pipeline, student_of(pipeline.unet, *edits))
    save_pipeline(student, tmp_path / "folder")
    export_checkpoint(student, tmp_path / "one.safetensors", "diffusers")
    said = r"one\.safetensors: diffusers does not find up_blocks\.1.* and 17 more of the edited UNet.*; load .* folder$"
    with pytest.raises(AsdmError, match=said):
        load_pipeline(tmp_path / "one.safetensors", config=tmp_path / "folder")


def test_what_a_file_of_an_edited_student_lacks_is_named(tmp_path):
    """Its config names the student's class, and diffusers' own knows none of its blocks."""
    pipeline = tiny_pipeline()
    student = with_unet(pipeline, student_of(pipeline.unet, {"edit": "remove", "unit": "up_blocks.1.attentions.0"}))
    save_pipeline(student, tmp_path / "folder")
    one = export_checkpoint(student, tmp_path / "one.safetensors", "diffusers").file
    tensors = load_file(one)
    del tensors["first_stage_model.decoder.conv_in.weight"]
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(AsdmError, match=r"two\.safetensors: its vae lacks 1 of its \d+ tensors: decoder\.conv_in"):
        load_pipeline(tmp_path / "two.safetensors", config=tmp_path / "folder")
    (tmp_path / "folder" / "unet" / "config.json").write_text("[]", "utf-8")
    with pytest.raises(AsdmError, match=r"two\.safetensors: not a whole Stable Diffusion checkpoint"):
        load_pipeline(tmp_path / "two.safetensors", config=tmp_path / "folder")


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_a_file_of_a_unet_alone_is_not_loaded_and_the_remedy_is_named(make, tmp_path):
    pipeline = make()
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    edits = [{"edit": "remove", "unit": "up_blocks.1.attentions.0"}]
    student = with_unet(pipeline, student_of(pipeline.unet, *edits))
    save_pipeline(student, tmp_path / "folder")
    export_checkpoint(student, tmp_path / "one.safetensors", "diffusers", unet_only=True)
    for config in (None, tmp_path / "folder"):
        with pytest.raises(AsdmError, match=r"one\.safetensors: a UNet alone.*without --unet-only\)$"):
            load_pipeline(tmp_path / "one.safetensors", config=config)


def test_a_saved_student_remembers_its_original(tmp_path):
    """The names of what is dropped come from the student's folder, without its teacher."""
    pipeline = tiny_sdxl_pipeline()
    save_pipeline(with_unet(pipeline, student_of(pipeline.unet, SHORT)), tmp_path / "student")
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "student" / "unet")
    names = ["up_blocks.1.attentions.1.proj_in", "down_blocks.2.attentions.0.proj_in"]
    lora = lora_file(tmp_path / "lora.safetensors", pipeline.unet, names, "kohya")
    for student in (stock, denoiser_without_weights(str(tmp_path / "student"))):
        made = convert_lora(lora, student, tmp_path / "new.safetensors")
        assert (made.kept, made.dropped) == (1, names[:1])


def test_loras_that_do_not_fit_are_refused(tmp_path):
    original = tiny_unet()
    gone = lora_file(
        tmp_path / "a.safetensors", original, ["mid_block.attentions.0.transformer_blocks.0.ff.net.2"], "kohya"
    )
    student = student_of(original, TINY)
    with pytest.raises(AsdmError, match="lacks all 1 layers"):
        convert_lora(gone, student, tmp_path / "new.safetensors")
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "b.safetensors")
    with pytest.raises(AsdmError, match="no tensor is for a layer"):
        convert_lora(tmp_path / "b.safetensors", student, tmp_path / "new.safetensors")
    wide = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({wide: torch.zeros(2, 320)}, tmp_path / "c.safetensors")
    with pytest.raises(AsdmError, match="320 inputs"):
        convert_lora(tmp_path / "c.safetensors", student, tmp_path / "new.safetensors")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for suffix, tensor in (
        ("lora_up.weight", torch.zeros(320, 2)),
        ("hada_w1_a", torch.zeros(320, 2)),
        ("hada_w2_b", torch.zeros(2, 320)),
    ):
        save_file({f"{layer}.{suffix}": tensor}, tmp_path / "d.safetensors")
        with pytest.raises(AsdmError, match=r"320 (inputs|outputs), and the student's has 32"):
            convert_lora(tmp_path / "d.safetensors", student, tmp_path / "new.safetensors")
    forgetful = UNet2DConditionModel.from_config({k: v for k, v in student.config.items() if k[0] != "_"})
    with pytest.raises(AsdmError, match="does not say which model it was made of"):
        convert_lora(gone, forgetful, tmp_path / "new.safetensors")
    (tmp_path / "d.pt").write_bytes(b"")
    with pytest.raises(AsdmError, match=r"must be a .safetensors file"):
        convert_lora(tmp_path / "d.pt", student, tmp_path / "new.safetensors")
    with pytest.raises(AsdmError, match="is the LoRA itself"):
        convert_lora(gone, student, gone)
    save_file(
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 32)},
        tmp_path / "e.safetensors",
    )
    with pytest.raises(AsdmError, match=r"text encoders alone.*as it is"):
        convert_lora(tmp_path / "e.safetensors", student, tmp_path / "new.safetensors")
    save_file({}, tmp_path / "f.safetensors")
    with pytest.raises(AsdmError, match="no tensor is for a layer"):
        convert_lora(tmp_path / "f.safetensors", student, tmp_path / "new.safetensors")


@pytest.mark.parametrize("style", ["diffusers", "kohya", "original"])
def test_a_lora_of_another_model_is_refused_though_some_layers_have_its_names(style, tmp_path):
    """SDXL has layers of SD 1.x's names and widths, and more."""
    names = [f"down_blocks.1.attentions.0.transformer_blocks.{number}.attn1.to_q" for number in (0, 1)]
    lora = lora_file(tmp_path / "lora.safetensors", tiny_sdxl_unet(), names, style)
    with pytest.raises(AsdmError, match=r"transformer_blocks.1.attn1.*original lacks, too; take a LoRA made for"):
        convert_lora(lora, student_of(tiny_unet(), TINY), tmp_path / "new.safetensors")


ADAPTERS = {  # what a layer has in each kind of adapter, by kohya's names
    "dora": {"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "alpha": (), "dora_scale": (64, 1)},
    "loha": {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64), "alpha": ()},
    "loha, tucker": {"hada_w1_a": (2, 64), "hada_w1_b": (2, 64), "hada_t1": (2, 2, 1, 1), "alpha": ()},
    "lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8), "alpha": ()},
    "full": {"diff": (64, 64)},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_is_renumbered_whole(kind, tmp_path):
    tensors = {suffix: torch.randn(shape) for suffix, shape in ADAPTERS[kind].items()}
    text = {f"lora_te{n}_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 32) for n in (1, 2)}
    old, new = (f"lora_unet_up_blocks_1_attentions_{index}_transformer_blocks_0_attn1_to_q" for index in (2, 1))
    save_file({f"{old}.{suffix}": tensor for suffix, tensor in tensors.items()} | text, tmp_path / "a.safetensors")
    student = student_of(tiny_unet(), {"edit": "drop_layers", "layers_per_block": 1})
    made = convert_lora(tmp_path / "a.safetensors", student, tmp_path / "b.safetensors")
    expected = {f"{new}.{suffix}": tensor for suffix, tensor in tensors.items()} | text
    found = load_file(made.file)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_lora_for_a_student_that_lacks_nothing_stays_as_it_is(tmp_path):
    unet = tiny_unet()
    tensors = {
        "lora_unet_up_blocks_1_attentions_2_proj_in.lora_down.weight": torch.randn(2, 64, 1, 1).half(),
        "lora_unet_up_blocks_1_attentions_2_proj_in.alpha": torch.tensor(2.0, dtype=torch.bfloat16),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 32),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_module": "networks.lora"})
    for student in (unet, student_of(unet, {"edit": "drop_layers", "layers_per_block": 2})):
        made = convert_lora(tmp_path / "a.safetensors", student, tmp_path / "b.safetensors")
        found = load_file(made.file)
        assert found.keys() == tensors.keys() and not made.dropped
        assert all(found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in tensors.items())


# -- LoRA files for one file ---------------------------------------------------------------------------------

UNEQUAL = [{"edit": "drop_layers", "layers_per_block": [2, 1, 2, 1]}]
NO_LOWEST_LEVEL = [{"edit": "remove", "unit": "down_blocks.3"}]
BLOCK = "up_blocks.1.attentions.0.transformer_blocks"
NO_FIRST_BLOCK = block_of(f"{BLOCK}.0")


def whole_lora(path, unet, style):
    """A LoRA for all layers, which tells them by the values of its matrices; return it and the layers' names."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    tensors = {}
    for number, name in enumerate(layers):
        weight = unet.get_submodule(name).weight
        down, up = (
            torch.full((2, *weight.shape[1:]), float(number)),
            torch.zeros(len(weight), 2, *(weight[0, 0].ndim * [1])),
        )
        if style == "diffusers":
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        else:
            flat = f"lora_unet_{(name if style == 'kohya' else originally(unet, name)).replace('.', '_')}"
            tensors |= {
                f"{flat}.lora_down.weight": down,
                f"{flat}.lora_up.weight": up,
                f"{flat}.alpha": torch.tensor(2.0),
            }
    save_file(tensors, path)
    return path, layers


def exported(pipeline, path, monkeypatch):
    """A student's one file, such as ComfyUI reads; tiny widths are for diffusers alone."""
    for name in ("_require_equal_levels", "_require_first_blocks"):
        monkeypatch.setattr(f"asdm.families.unet_programs.{name}", lambda *given: None)
    return export_checkpoint(pipeline, path, "diffusers", dtype="fp32").file


@pytest.mark.parametrize("style", ["diffusers", "kohya", "original"])
@pytest.mark.parametrize(
    ("make", "edits"),
    [
        (tiny_pipeline, UNEQUAL),
        (tiny_pipeline, NO_LOWEST_LEVEL),
        (tiny_pipeline, [{**TINY, "levels": None}]),
        (tiny_sdxl_pipeline_with_two_widths, [SHORT]),
        (tiny_sdxl_pipeline_with_two_widths, NO_FIRST_BLOCK),
    ],
)
def test_for_one_file_each_key_is_the_name_of_the_tensor_that_it_adapts(style, make, edits, tmp_path, monkeypatch):
    """ComfyUI adapts the tensor whose name, flat, is the key's; a student's weights are the original's."""
    pipeline = make()
    lora, layers = whole_lora(tmp_path / "lora.safetensors", pipeline.unet, style)
    student = with_unet(pipeline, student_of(pipeline.unet, *edits))
    file = exported(student, tmp_path / "one.safetensors", monkeypatch)
    made = convert_lora(lora, denoiser_without_weights(str(file)), tmp_path / "new.safetensors", file)
    tensors = {
        name.removeprefix(PREFIX).removesuffix(".weight").replace(".", "_"): tensor
        for name, tensor in load_file(file).items()
        if name.startswith(PREFIX) and name.endswith(".weight")
    }
    converted, adapted = load_file(made.file), set()
    for key, down in converted.items():
        if key.endswith(".lora_down.weight"):
            original = layers[int(down.flatten()[0])]
            assert torch.equal(
                tensors[key.removeprefix("lora_unet_").removesuffix(".lora_down.weight")],
                pipeline.unet.get_submodule(original).weight,
            ), (key, original)
            adapted.add(original)
    assert len(adapted) == made.kept and adapted.isdisjoint(made.dropped)
    assert adapted.union(made.dropped) == set(layers)
    assert all(key.startswith("lora_unet_") for key in converted)


@pytest.mark.parametrize("style", ["diffusers", "kohya", "original"])
@pytest.mark.parametrize("edits", [[SHORT], NO_FIRST_BLOCK])
def test_for_a_folder_each_key_is_the_name_of_the_module_that_it_adapts(style, edits, tmp_path):
    pipeline = tiny_sdxl_pipeline()
    lora, layers = whole_lora(tmp_path / "lora.safetensors", pipeline.unet, style)
    student = with_unet(pipeline, student_of(pipeline.unet, *edits))
    made = convert_lora(lora, student.unet, tmp_path / "new.safetensors")
    student.load_lora_weights(load_file(made.file), adapter_name="new")
    adapted = set()
    for name, module in student.unet.named_modules():
        if name.endswith(".lora_A.new"):
            original = layers[int(module.weight.flatten()[0])]
            own = student.unet.get_submodule(name.removesuffix(".lora_A.new")).base_layer.weight
            assert torch.equal(own, pipeline.unet.get_submodule(original).weight), (name, original)
            adapted.add(original)
    unread = {"add_embedding.linear_1", "add_embedding.linear_2"} if style == "kohya" else set()  # by diffusers itself
    assert adapted.union(made.dropped, unread) == set(layers) and adapted.isdisjoint(made.dropped)


@pytest.mark.parametrize(("program", "number"), [("comfyui", 3), ("sdcpp", 4)])
def test_for_one_file_a_key_has_the_numbers_of_that_file(program, number, tmp_path):
    """stable-diffusion.cpp numbers the layers of bk-tiny otherwise than ComfyUI."""
    student = of_preset(full_size("sd15"), "bk-tiny")
    names = FAMILY.original_layout(student, program).names.values()
    save_file({name: torch.zeros(0) for name in names}, tmp_path / "one.safetensors")
    old = "lora_unet_up_blocks_2_attentions_2_proj_in.lora_down.weight"
    save_file({old: torch.zeros(2, 640, 1, 1)}, tmp_path / "lora.safetensors")
    made = convert_lora(
        tmp_path / "lora.safetensors", student, tmp_path / "new.safetensors", tmp_path / "one.safetensors"
    )
    assert list(load_file(made.file)) == [f"lora_unet_output_blocks_{number}_1_proj_in.lora_down.weight"]


def test_for_one_file_diffusers_adapters_have_kohyas_form(tmp_path, monkeypatch):
    """Names of the text encoders, of parts of older versions, magnitudes of DoRA, and scales."""
    pipeline = tiny_pipeline()
    file = exported(pipeline, tmp_path / "one.safetensors", monkeypatch)
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    text = "text_encoder.text_model.encoder.layers.0"
    config = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_k": 6}, "unet.use_rslora": False}
    tensors = {
        f"{attention}.to_q.lora_A.weight": torch.zeros(2, 32),
        f"{attention}.to_q.lora_B.weight": torch.zeros(32, 2),
        f"{attention}.to_q.lora_magnitude_vector": torch.arange(32.0),
        f"{attention}.to_k.lora.down.weight": torch.zeros(2, 32),
        f"{attention}.processor.to_out_lora.up.weight": torch.zeros(32, 2),
        f"{text}.self_attn.q_proj.lora_linear_layer.down.weight": torch.zeros(2, 32),
        f"{text.replace('text_model.', '')}.mlp.fc1.lora_A.weight": torch.zeros(2, 32),
    }
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    made = convert_lora(tmp_path / "lora.safetensors", pipeline.unet, tmp_path / "new.safetensors", file)
    flat = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1"
    flat_text = "lora_te_text_model_encoder_layers_0"
    assert {key: list(tensor.shape) or tensor.item() for key, tensor in load_file(made.file).items()} == {
        f"{flat}_to_q.lora_down.weight": [2, 32],
        f"{flat}_to_q.lora_up.weight": [32, 2],
        f"{flat}_to_q.dora_scale": [32, 1],
        f"{flat}_to_q.alpha": 4,
        f"{flat}_to_k.lora_down.weight": [2, 32],
        f"{flat}_to_k.alpha": 6,
        f"{flat}_to_out_0.lora_up.weight": [32, 2],
        f"{flat_text}_self_attn_q_proj.lora_down.weight": [2, 32],
        f"{flat_text}_mlp_fc1.lora_down.weight": [2, 32],
    }
    with safe_open(made.file, "pt") as content:
        assert "lora_adapter_metadata" not in content.metadata()


def test_for_one_file_sdxls_text_encoders_have_numbers(tmp_path, monkeypatch):
    pipeline = tiny_sdxl_pipeline_with_two_widths()
    file = exported(pipeline, tmp_path / "one.safetensors", monkeypatch)
    layer = "text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
    tensors = {f"{part}.{layer}": torch.zeros(2, 32) for part in ("text_encoder", "text_encoder_2")}
    save_file(tensors | {"unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3)}, tmp_path / "lora.safetensors")
    made = convert_lora(tmp_path / "lora.safetensors", pipeline.unet, tmp_path / "new.safetensors", file)
    flat = "text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    assert set(load_file(made.file)) == {
        f"lora_te1_{flat}",
        f"lora_te2_{flat}",
        "lora_unet_input_blocks_0_0.lora_down.weight",
    }


def test_what_one_file_has_no_place_for_is_refused(tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    file = exported(pipeline, tmp_path / "one.safetensors", monkeypatch)
    lora, new = tmp_path / "lora.safetensors", tmp_path / "new.safetensors"
    save_file({"unet.conv_in.lora_B.bias": torch.zeros(32)}, lora)
    with pytest.raises(AsdmError, match=r"lora_B.bias, for which kohya's layout has no place; .*folder$"):
        convert_lora(lora, pipeline.unet, new, file)
    for config, said in (
        ({"unet.lora_alpha": "4"}, r"damaged \(lora_alpha\)"),
        ({"unet.alpha_pattern": {".*": 4}}, "no plain names"),
        ([], "damaged"),
    ):
        tensors = {"unet.conv_in.lora_A.weight": torch.zeros(2, 4, 3, 3)}
        save_file(tensors, lora, {"lora_adapter_metadata": json.dumps(config)})
        with pytest.raises(AsdmError, match=rf"lora\.safetensors: its .*{said}"):
            convert_lora(lora, pipeline.unet, new, file)
    whole_lora(lora, pipeline.unet, "kohya")
    with pytest.raises(AsdmError, match=r"one\.safetensors: its tensors are not those of the student"):
        convert_lora(lora, student_of(pipeline.unet, TINY), new, file)
    assert not new.exists()


def test_only_a_lora_is_replaced_by_a_converted_one(tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    lora, _ = whole_lora(tmp_path / "lora.safetensors", pipeline.unet, "kohya")
    file = exported(pipeline, tmp_path / "one.safetensors", monkeypatch)
    other, broken = tmp_path / "other.safetensors", tmp_path / "broken.safetensors"
    save_file({"conv_in.weight": torch.zeros(1)}, other)
    broken.write_bytes(b"no tensors")
    link = tmp_path / "link.safetensors"
    link.symlink_to(lora)  # of the same content, were it not the same file
    before = {path: path.read_bytes() for path in (lora, file, other, broken)}
    for out, said in (
        (file, "is the student's own file"),
        (link, "is the LoRA itself"),
        (other, "exists and holds no LoRA; name another file or remove it"),
        (broken, "exists and holds no LoRA; name another file or remove it"),
    ):
        with pytest.raises(AsdmError, match=f"^{re.escape(str(out))}: {said}"):
            convert_lora(lora, pipeline.unet, out, file)
    with pytest.raises(AsdmError, match="exists and holds no LoRA"):
        convert_lora(lora, pipeline.unet, file)
    assert before == {path: path.read_bytes() for path in before}
    for _ in range(2):
        assert convert_lora(lora, pipeline.unet, tmp_path / "new.safetensors").kept


# -- portable plans ----------------------------------------------------------------------------------------


def saved_parameters(unet, unit):
    """The parameters of a unit without those of its shortcut, which stays."""
    shortcut = FAMILY.branch(unet, unit).folds_into
    return parameters(unet.get_submodule(unit)) - (0 if shortcut is None else parameters(unet.get_submodule(shortcut)))


def profile(unet, sensitive="\0"):
    """A profile whose sensitivities grow with the parameters; units of this name are a thousand times as sensitive."""
    sizes = {unit: saved_parameters(unet, unit.name) for unit in FAMILY.units(unet)}
    names, total = [unit.name for unit in sizes], parameters(unet)

    def costs(name, size):
        sensitivity = (1000 if name.startswith(sensitive) else 1) * (1 + size) / total
        shared = {"parameters": size, "gmacs": size / 1e9, "gmacs_without_attention": size / 1e9, "latency_ms": 0.0}
        return {**shared, "sensitivity": sensitivity, "sensitivity_by_timestep": {}}

    units = [
        {"name": unit.name, "kind": unit.kind, "parent": unit.parent, "latency_share": 0.0, **costs(unit.name, size)}
        for unit, size in sizes.items()
    ]
    others = []
    for part in ("mid_block", f"down_blocks.{len(unet.down_blocks) - 1}"):
        covers = [name for name in names if FAMILY.is_covered_by(name, [part])]
        size = sum(sizes[unit] for unit in sizes if unit.name in covers and unit.parent is None)
        others.append({"edit": {"edit": "remove", "unit": part}, "covers": covers, **costs(part, size)})
    return RedundancyMap.model_validate(
        {
            "model": "made up", "fingerprint": FAMILY.fingerprint(unet), "unet_config": dict(unet.config),
            "parameters": total, "gmacs": total / 1e9, "gmacs_without_attention": total / 1e9, "latency_ms": 0.0,
            "latency_batch_size": 2, "dtype": "float32", "threads": 1, "timesteps": [], "prompts": 0, "seed": 0,
            "unet_forwards": 0, "necessary_forwards": 0, "seconds": 0, "units": units, "others": others,
        }
    )  # fmt: skip


def parameters(unet):
    return sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("params", [0.8, 0.45])
def test_a_portable_student_is_stock_and_within_the_budget(params):
    unet = tiny_unet()
    student = build_student(unet, make_plan(profile(unet), params=params, portable=True))
    assert type(student) is UNet2DConditionModel
    assert parameters(student) <= params * parameters(unet)
    FAMILY.original_layout(student, None)
    assert predict(student).shape == predict(unet).shape


def test_a_portable_student_of_sdxl_is_of_a_known_shape_and_keeps_what_is_sensitive(sdxl):
    kept = "up_blocks.0.attentions.1.transformer_blocks.7"
    for part in (0.6, 0.3):
        plan = make_plan(profile(sdxl, kept), params=part, portable=True)
        student = empty_student(sdxl, plan)
        assert parameters(student) <= part * parameters(sdxl)
        shape = inferred(set(FAMILY.original_layout(student, "comfyui").names.values()))
        assert [depth for level in shape.encoder for depth in level] in COMFYUI.values()
        assert not any(name.startswith(kept) for name in plan.edits[0].transformer_blocks)


def test_portable_refuses_what_it_cannot_do(sdxl):
    with pytest.raises(AsdmError, match="out of reach of students that every program reads"):
        make_plan(profile(sdxl), params=0.01, portable=True)
    with pytest.raises(AsdmError, match="no place for projections"):
        make_plan(profile(tiny_unet()), params=0.5, portable=True, compensate="linear")
    shallow = [unit.name for unit in FAMILY.units(tiny_sdxl_unet()) if "transformer_blocks.1" not in unit.name]
    with pytest.raises(AsdmError, match="no program reads a student of this UNet"):
        FAMILY.portable_shapes(tiny_sdxl_unet().config, shallow)


def of_attentions(block, *numbers):
    return [f"{block}.attentions.{index}.transformer_blocks.{number}" for index in range(3) for number in numbers]


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        # The first blocks fold into proj_in, the last ones into proj_out.
        ({"transformer_blocks": of_attentions("up_blocks.1", 0) + of_attentions("up_blocks.0", 1)}, 0.4),
        # Whole attentions fold into the resnets before them.
        ({"transformer_blocks": of_attentions("up_blocks.1", 0, 1)}, 0.6),
        # A constant is all that folds there.
        ({"mid_attention": False}, 0.95),
        # Layers that go, and their skip connections, are another matter.
        ({"layers_per_block": 1, "mid_attention": False, "transformer_blocks": of_attentions("up_blocks.1", 0)}, 1),
    ],
)
def test_what_folds_is_fitted_for_a_smaller_stock_student(fields, left):
    pipeline = tiny_sdxl_pipeline()
    edit = {"edit": "drop_layers", "layers_per_block": 2, **fields}
    plain, fitted = (student_of(pipeline.unet, edit | {"fitted": each}) for each in (False, True))
    samples = {"prompts": ["a", "b", "c", "d"], "samples": 8, "timesteps": 4}
    made = fit_compensation(pipeline, fitted, **samples)
    assert made.left_by_unit and made.error_after < left * made.error_before
    assert type(fitted) is UNet2DConditionModel and fitted.state_dict().keys() == plain.state_dict().keys()
    assert not fit_compensation(pipeline, plain, **samples).left_by_unit
    FAMILY.original_layout(fitted, None)


def test_portable_plans_are_fitted_unless_that_is_switched_off():
    redundancy = profile(tiny_sdxl_unet_of_a_known_shape())
    for compensate, is_fitted in ((None, True), ("none", False)):
        (edit,) = make_plan(redundancy, params=0.9, portable=True, compensate=compensate).edits
        assert edit.transformer_blocks and edit.fitted == is_fitted and ("fitted" in edit.to_dict()) == is_fitted


def tiny_sdxl_unet_of_a_known_shape():
    return tiny_unet(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 32,
    )


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"transformer_blocks": ["up_blocks.1.attentions.0.transformer_blocks.9"]}, "no such transformer block"),
        ({"transformer_blocks": ["down_blocks.1.attentions.0.transformer_blocks.0"] * 2}, "some of its attentions"),
        ({"layers_per_block": [2, 1]}, "a number for each level"),
        ({"layers_per_block": [2, 0, 1]}, "at least 1"),
    ],
)
def test_what_no_stock_unet_is_cannot_be_dropped(fields, said):
    unet = tiny_unet(block_out_channels=(32, 64, 64), down_block_types=DOWN, up_block_types=UP)
    with pytest.raises(AsdmError, match=said):
        PruningPlan.for_unet(unet, [{"edit": "drop_layers", "layers_per_block": 2, **fields}])


DOWN, UP = ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2


def test_levels_may_have_different_numbers_of_layers():
    """A layer that goes takes its skip connection along: what stays computes what it computed."""
    unet = tiny_unet()
    student = student_of(unet, {"edit": "drop_layers", "layers_per_block": [2, 1, 2, 1]})
    assert [len(block.resnets) for block in student.down_blocks] == [2, 1, 2, 1]
    assert [len(block.resnets) for block in student.up_blocks] == [2, 3, 2, 3]
    for own, original in (("up_blocks.2.resnets.1", "up_blocks.2.resnets.2"), ("up_blocks.1.resnets.1",) * 2):
        assert torch.equal(student.get_submodule(own).conv1.weight, unet.get_submodule(original).conv1.weight)


def test_the_mid_block_may_keep_its_first_resnet_alone(tmp_path):
    pipeline = tiny_pipeline()
    edits = [{"edit": "remove", "unit": f"mid_block.{unit}"} for unit in ("attentions.0", "resnets.1")]
    student = student_of(pipeline.unet, {"edit": "drop_layers", "layers_per_block": 2, "mid_attention": False})
    removed = student_of(pipeline.unet, *edits)
    assert torch.equal(predict(student), predict(removed))
    names = [FAMILY.original_layout(each, None).names.values() for each in (student, removed)]
    assert set(names[0]) == set(names[1])


def test_a_projection_that_folds_is_written_and_one_that_does_not_is_refused(tmp_path):
    """A projection in an attention's place folds into the resnet before it, where that has a 1x1 shortcut."""
    pipeline = tiny_pipeline()
    folding, staying = "up_blocks.3.attentions.0", "down_blocks.0.attentions.1"
    for unit, folds in ((folding, True), (staying, False)):
        assert FAMILY.projection_folds(pipeline.unet, unit) == folds
        student = student_of(pipeline.unet, {"edit": "remove", "unit": unit, "compensate": "linear"})
        with torch.no_grad():
            student.get_submodule(unit).compensation.bias.fill_(0.1)
        student = with_unet(pipeline, fold_compensation(student))
        if folds:
            export_checkpoint(student, tmp_path / "one.safetensors", "diffusers")
        else:
            with pytest.raises(AsdmError, match=f"{unit}: removed with a projection"):
                export_checkpoint(student, tmp_path / "two.safetensors", "diffusers")
