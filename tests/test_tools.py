"""What people use with a Stable Diffusion pipeline works with a student in it."""

import copy
import inspect
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    T2IAdapter,
    UNetMotionModel,
)
from diffusers.loaders.utils import AttnProcsLayers
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor
from PIL import Image

from asdm import AsdmError, PruningPlan, build_student, load_pipeline, save_pipeline, with_unet
from asdm.edits.regional_attention import GriAttnProcessor
from conftest import ip_adapter, load_ip_adapter, predict, tiny_sdxl_unet, tiny_unet, unet_inputs

OUTER = "down_blocks.0.attentions.0.transformer_blocks.0"
LEAN = [
    {"edit": "remove", "unit": "mid_block"},
    {"edit": "remove", "unit": "down_blocks.3"},
    {"edit": "remove", "unit": "down_blocks.1.resnets.1", "compensate": "linear"},
    {"edit": "remove", "unit": "down_blocks.1.attentions.0"},
    {"edit": "remove", "unit": f"{OUTER}.attn2"},
    {"edit": "gri_attention", "unit": f"{OUTER}.attn1", "regions": 2, "pool": 2},
    {"edit": "cond_conv", "unit": "up_blocks.3.resnets.0.conv2", "experts": ["down_blocks.1.resnets.1.conv2"],
     "router": "input+time"},
    {"edit": "cond_conv", "unit": "up_blocks.3.resnets.2.conv2", "experts": ["down_blocks.1.resnets.1.conv2"],
     "router": "prompt"},
]  # fmt: skip


@pytest.fixture
def student(pipeline):
    # Experts come from resnets of as many channels.
    edits = [edit | {"experts": ["up_blocks.3.resnets.1.conv2"]} if "experts" in edit else edit for edit in LEAN]
    return with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits)))


def draw(pipeline, seed=0, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline("octopus, noto", num_inference_steps=2, generator=generator, output_type="np", **arguments).images[
        0
    ]


def parts(pipeline, **more):
    return {**pipeline.components, "requires_safety_checker": False, **more}


def test_image_to_image_and_inpainting(student):
    image, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    by_strength = [
        draw(StableDiffusionImg2ImgPipeline(**parts(student)), image=image, strength=strength)
        for strength in (0.5, 1.0)
    ]
    assert not np.array_equal(*by_strength)
    painted = draw(StableDiffusionInpaintPipeline(**parts(student)), image=image, mask_image=mask, height=16, width=16)
    assert painted.shape == (16, 16, 3)


def test_a_stock_controlnet_guides_a_student(pipeline, student):
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    with torch.no_grad():  # its outputs start at zero
        for parameter in controlnet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    image = Image.new("RGB", (16, 16), "blue")
    guided = StableDiffusionControlNetPipeline(**parts(student, controlnet=controlnet))
    without = draw(guided, image=image, controlnet_conditioning_scale=0.0)
    assert np.allclose(without, draw(student), atol=1e-5)
    assert np.abs(draw(guided, image=image, controlnet_conditioning_scale=1.0) - without).max() > 1e-3
    # Each residual meets the hidden states it was made for: in an unedited student, those of the teacher.
    same = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet))
    expected = draw(StableDiffusionControlNetPipeline(**parts(pipeline, controlnet=controlnet)), image=image)
    again = draw(StableDiffusionControlNetPipeline(**parts(pipeline, unet=same, controlnet=controlnet)), image=image)
    assert np.array_equal(expected, again)


@pytest.mark.parametrize("side", [16, 32, 56])
def test_controlnets_and_adapters_guide_a_student_without_its_innermost_stage(pipeline, side):
    edits = [{"edit": "remove", "unit": "down_blocks.3"}]
    student = with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits)))
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    controlnet.controlnet_mid_block.weight.data.normal_()
    adapter = T2IAdapter(channels=[32, 32, 64, 64], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    image = Image.new("RGB", (side, side), "blue")
    for kind, part in (
        (StableDiffusionControlNetPipeline, {"controlnet": controlnet}),
        (StableDiffusionAdapterPipeline, {"adapter": adapter}),
    ):
        taken = inspect.signature(kind).parameters
        guided = kind(**{name: value for name, value in parts(student, **part).items() if name in taken})
        scale = f"{next(iter(part))}_conditioning_scale"
        without, drawn = (
            draw(guided, image=image, height=side, width=side, **{scale: strength}) for strength in (0.0, 1.0)
        )
        assert np.allclose(without, draw(student, height=side, width=side), atol=1e-5)
        assert np.abs(drawn - without).max() > 1e-3


def test_what_an_adapter_adds_innermost_stays_out_of_the_skip_connections(pipeline):
    edits = [{"edit": "remove", "unit": "down_blocks.3"}]
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    inputs = unet_inputs(student)
    within = [torch.zeros(2, 32, 8, 8), torch.zeros(2, 32, 4, 4), torch.zeros(2, 64, 2, 2), torch.ones(2, 64, 1, 1)]
    seen = []
    handle = student.up_blocks[1].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["res_hidden_states_tuple"][-1]), with_kwargs=True
    )
    with torch.no_grad():
        student(**inputs)
        student(**inputs, down_intrablock_additional_residuals=within)
    handle.remove()
    assert torch.equal(*seen)


def without_branches(unet, units):
    """Return a copy of a UNet in which the branches of these layers add zero."""
    zeroed = copy.deepcopy(unet)
    for unit in units:
        layer = zeroed.get_submodule(unit)
        for parameter in (layer.proj_out if ".attentions." in unit else layer.conv2).parameters():
            torch.nn.init.zeros_(parameter)
    return zeroed


MIDDLE = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
INNERMOST = ["down_blocks.3.resnets.0", "down_blocks.3.resnets.1"]


@pytest.mark.parametrize(
    ("make", "removed", "branches"),
    [
        (tiny_unet, ["mid_block"], MIDDLE),
        (tiny_unet, MIDDLE, MIDDLE),
        (tiny_unet, INNERMOST[1:], INNERMOST[1:]),
        (tiny_unet, INNERMOST, INNERMOST),
        (tiny_unet, [*INNERMOST, "mid_block"], [*INNERMOST, *MIDDLE]),
        (tiny_sdxl_unet, ["mid_block"], MIDDLE),
    ],
    ids=["mid block", "its units", "innermost resnet", "innermost resnets", "all of these", "sdxl"],
)
def test_what_changes_hidden_states_in_place_changes_no_skip_connection(make, removed, branches):
    unet = make()
    edits = [{"edit": "remove", "unit": unit} for unit in removed]
    student = build_student(unet, PruningPlan.for_unet(unet, edits))
    zeroed = without_branches(unet, branches)
    sides = ((32, 8), (32, 4), (64, 2), (64, 1)) if make is tiny_unet else ((32, 4), (32, 4), (64, 2), (64, 2))

    def guided(network):  # by a T2I-Adapter
        generator = torch.Generator().manual_seed(0)
        within = [torch.randn(2, channels, side, side, generator=generator) for channels, side in sides]
        return predict(network, **unet_inputs(network), down_intrablock_additional_residuals=within)

    plain = predict(zeroed)
    assert (guided(zeroed) - plain).abs().max() > 1e-3
    torch.testing.assert_close(guided(student), guided(zeroed), atol=1e-6, rtol=0)
    for network in (student, zeroed):
        network.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    assert (predict(zeroed) - plain).abs().max() > 1e-3
    torch.testing.assert_close(predict(student), predict(zeroed), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: pipe.unet.set_default_attn_processor(),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    ],
)
def test_regional_attention_stays_whatever_else_computes_attention(student, change):
    before = draw(student)
    change(student)
    processors = student.unet.attn_processors
    assert isinstance(processors[f"{OUTER}.attn1.processor"], GriAttnProcessor)
    assert sum(isinstance(each, GriAttnProcessor) for each in processors.values()) == 1
    assert np.allclose(draw(student), before, atol=1e-4)


def test_perturbed_attention_guidance_takes_the_place_of_regional_attention_for_its_calls(student):
    before = draw(student)
    guided = AutoPipelineForText2Image.from_pipe(student, enable_pag=True, pag_applied_layers=["down_blocks.0"])
    assert np.abs(draw(guided, pag_scale=2.0) - before).max() > 1e-3
    assert isinstance(student.unet.get_submodule(f"{OUTER}.attn1").processor, GriAttnProcessor)
    assert np.array_equal(draw(student), before)


def test_a_lora_of_the_teacher_fills_what_is_there_and_names_the_rest(pipeline, student, caplog):
    import peft
    from peft.utils import get_peft_model_state_dict

    teacher = with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet)))
    teacher.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    lora = {
        f"unet.{name}": torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, tensor) in enumerate(get_peft_model_state_dict(teacher.unet).items())
    }
    before = draw(student)
    with caplog.at_level(logging.WARNING):
        student.load_lora_weights(lora, adapter_name="default")
    loaded = get_peft_model_state_dict(student.unet)
    there = [name for name in lora if any(name == f"unet.{key}" for key in loaded)]
    assert len(there) == len(loaded) > 0
    assert all(torch.equal(loaded[name.removeprefix("unet.")], lora[name]) for name in there)
    gone = [name.removeprefix("unet.") for name in lora if name not in there]
    assert gone and all(name.split(".attn")[0] != OUTER or ".attn2." in name for name in gone)
    assert any(gone[0].split(".lora")[0] in record.getMessage() for record in caplog.records)
    assert np.abs(draw(student) - before).max() > 1e-3
    student.unload_lora_weights()
    assert np.allclose(draw(student), before, atol=1e-5)


def lora_of(unet, seed: int, targets: list[str]) -> dict:
    peft = pytest.importorskip("peft")
    other = copy.deepcopy(unet)
    torch.manual_seed(seed)
    other.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return {f"unet.{name}": tensor for name, tensor in peft.get_peft_model_state_dict(other).items()}


def test_a_pipeline_takes_a_lora_out_of_expert_kernels_too(pipeline, student):
    before = draw(student)
    student.load_lora_weights(lora_of(pipeline.unet, 0, ["conv1", "conv2", "to_q"]))
    loaded = draw(student)
    student.fuse_lora()
    assert np.allclose(draw(student), loaded, atol=1e-5)
    student.unfuse_lora()
    assert np.allclose(draw(student), loaded, atol=1e-5)
    student.fuse_lora()
    student.unfuse_lora()
    student.unload_lora_weights()
    assert np.allclose(draw(student), before, atol=1e-5)


def test_a_lora_of_the_teacher_takes_the_place_of_another(pipeline, student):
    first, second = (lora_of(pipeline.unet, seed, ["conv2", "to_q", "proj_in"]) for seed in (0, 1))
    student.load_lora_weights(first, adapter_name="style")
    before = draw(student)
    student.load_lora_weights(second, adapter_name="style", hotswap=True)
    swapped = draw(student)
    student.unload_lora_weights()
    student.load_lora_weights(second, adapter_name="style")
    assert np.array_equal(draw(student), swapped) and not np.allclose(before, swapped, atol=1e-3)


def test_textual_inversion(student):
    before = draw(student)
    student.load_textual_inversion({"<mine>": torch.ones(1, 32)}, token="<mine>")
    assert np.array_equal(draw(student), before)
    images = [
        student(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for prompt in ("<mine>", "octopus")
    ]
    assert not np.array_equal(*images)


def test_an_ip_adapter_of_the_teacher_meets_the_same_cross_attentions(pipeline, student):
    weights = ip_adapter(pipeline.unet)
    teacher_unet = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet))
    teacher = with_unet(pipeline, teacher_unet)
    embeds = [torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))]
    before = draw(student)
    for each in (teacher, student):
        each.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    kept = [name for name in student.unet.attn_processors if name.endswith("attn2.processor")]
    assert len(kept) < len([name for name in teacher.unet.attn_processors if name.endswith("attn2.processor")])
    for name in kept:
        mine, theirs = student.unet.attn_processors[name], teacher.unet.attn_processors[name]
        assert torch.equal(mine.to_k_ip[0].weight, theirs.to_k_ip[0].weight), name
    assert isinstance(student.unet.get_submodule(f"{OUTER}.attn1").processor, GriAttnProcessor)
    assert np.abs(draw(student, ip_adapter_image_embeds=embeds) - before).max() > 1e-3
    student.unload_ip_adapter()
    assert np.allclose(draw(student), before, atol=1e-5)


def test_a_student_with_fused_projections_is_saved_as_without(student, tmp_path):
    expected = predict(student.unet)
    student.unet.fuse_qkv_projections()
    save_pipeline(student, tmp_path / "student")
    assert any(".to_qkv." in name for name in student.unet.state_dict())
    loaded = load_pipeline(tmp_path / "student").unet
    assert torch.equal(predict(loaded), expected)
    assert not any(".to_qkv." in name or ".to_kv." in name for name in loaded.state_dict())


@pytest.mark.parametrize("kind", ["stock", "student"])
def test_a_pipeline_with_an_ip_adapter_is_not_saved(pipeline, student, kind, tmp_path):
    saved = {"stock": pipeline, "student": student}[kind]
    expected = predict(saved.unet)
    save_pipeline(saved, tmp_path / "model")
    load_ip_adapter(saved)
    with pytest.raises(AsdmError, match="an IP-Adapter is loaded"):
        save_pipeline(saved, tmp_path / "model")
    if kind == "student":
        with pytest.raises(AsdmError, match="an IP-Adapter is loaded"):
            saved.unet.save_pretrained(tmp_path / "model" / "unet")
    assert torch.equal(predict(load_pipeline(tmp_path / "model").unet), expected)
    saved.unload_ip_adapter()
    save_pipeline(saved, tmp_path / "model")
    load_pipeline(tmp_path / "model")


def face_id(unet) -> dict:
    """Weights as a FaceID IP-Adapter's file has them: a LoRA, too, whose layers are numbered by all attentions."""
    file, generator = ip_adapter(unet), torch.Generator().manual_seed(3)
    width = unet.config.cross_attention_dim
    file["image_proj"] = {
        "proj.0.weight": torch.randn(48, 24, generator=generator),
        "proj.0.bias": torch.zeros(48),
        "proj.2.weight": torch.randn(4 * width, 48, generator=generator),
        "proj.2.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    for number, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for side in ("q", "k", "v", "out"):
            layer = attention.to_out[0] if side == "out" else getattr(attention, f"to_{side}")
            for half, shape in (("down", (2, layer.in_features)), ("up", (layer.out_features, 2))):
                tensor = torch.randn(shape, generator=generator)
                file["ip_adapter"][f"{number}.to_{side}_lora.{half}.weight"] = tensor
    return file


@pytest.mark.parametrize("made_for", ["original", "student"])
def test_what_an_ip_adapters_numbers_mean_is_told_by_what_fits(pipeline, student, made_for):
    unet = student.unet
    meant = pipeline.unet if made_for == "original" else unet
    file, names = face_id(meant), list(meant.attn_processors)
    crossing = [name for name in names if name.endswith("attn2.processor")]
    loras = unet._load_ip_adapter_loras([file])[0]
    assert len(loras) == 8 * len(unet.attn_processors)
    for name, tensor in loras.items():
        processor, _, rest = name.removeprefix("unet.").partition(".to_")
        assert torch.equal(tensor, file["ip_adapter"][f"{names.index(processor)}.to_{rest}"]), name
    for given in (file, [file], [file, file]):  # the stock class takes a single one, too
        unet._load_ip_adapter_weights(given)
        for name in (name for name in unet.attn_processors if name.endswith("attn2.processor")):
            for layer in unet.attn_processors[name].to_v_ip:
                number = 2 * crossing.index(name) + 1
                assert torch.equal(layer.weight, file["ip_adapter"][f"{number}.to_v_ip.weight"]), name


def test_an_ip_adapter_numbered_by_the_places_of_the_students_processors(student):
    unet = student.unet
    places = {name: number for number, name in enumerate(unet.attn_processors)}
    crossing = [name for name in places if name.endswith("attn2.processor")]
    file = ip_adapter(unet)
    file["ip_adapter"] = {
        f"{places[crossing[int(key.split('.')[0]) // 2]]}.{key.split('.', 1)[1]}": tensor
        for key, tensor in file["ip_adapter"].items()
    }
    unet._load_ip_adapter_weights(file)
    for name in crossing:
        expected = file["ip_adapter"][f"{places[name]}.to_k_ip.weight"]
        assert torch.equal(unet.attn_processors[name].to_k_ip[0].weight, expected)


def test_an_ip_adapter_for_neither_is_refused(student):
    file = ip_adapter(student.unet)
    for number in (1, 3, 5):
        for side in ("k", "v"):
            del file["ip_adapter"][f"{number}.to_{side}_ip.weight"]
    with pytest.raises(AsdmError, match=r"a file for \d+ cross-attentions does not fit; the original UNet has 16"):
        student.unet._load_ip_adapter_weights(file)


@pytest.mark.parametrize(
    "scales",
    [
        0.5,
        [0.5],
        {"down": 0.3},
        {"mid": 0.2, "up": {"block_1": [0.1, 0.2, 0.3]}},
        [{"down": {"block_1": [0.25, 0.75]}, "up": {"block_3": 0.4}}],
        None,
    ],
)
def test_adapters_are_scaled_by_block_and_layer_as_in_the_teacher(pipeline, student, scales):
    peft = pytest.importorskip("peft")
    found = []
    for unet in (pipeline.unet, student.unet):
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
        unet.set_adapters("default", scales)
        found.append({name: each.scaling["default"] for name, each in unet.named_modules() if hasattr(each, "scaling")})
    assert found[1] and all(found[0][name] == scale for name, scale in found[1].items())


@pytest.mark.parametrize("made_for", ["original", "student"])
def test_custom_diffusion_is_saved_and_loaded_beside_regional_attention(pipeline, student, tmp_path, made_for):
    trained = pipeline.unet if made_for == "original" else student.unet
    processors = {}
    for name in trained.attn_processors:
        width = trained.get_submodule(name.removesuffix(".processor")).inner_dim
        crosses = name.endswith("attn2.processor")
        sizes = {"hidden_size": width, "cross_attention_dim": 32} if crosses else {}
        processors[name] = CustomDiffusionAttnProcessor(train_kv=crosses, train_q_out=False, **sizes)
    trained.set_attn_processor(dict(processors))
    AttnProcsLayers(trained.attn_processors)  # what its training optimises
    trained.save_attn_procs(tmp_path, safe_serialization=False)
    student.unet.set_default_attn_processor()
    file = {"weight_name": "pytorch_custom_diffusion_weights.bin", "_pipeline": student}
    student.unet.load_attn_procs(tmp_path, **file)
    for name, processor in student.unet.attn_processors.items():
        if name == f"{OUTER}.attn1.processor":
            assert isinstance(processor, GriAttnProcessor)
        elif name.endswith("attn2.processor"):
            expected = processors[name].to_k_custom_diffusion.weight
            assert torch.equal(processor.to_k_custom_diffusion.weight, expected)


def test_other_pipelines_are_made_from_a_students(student):
    image = Image.new("RGB", (16, 16), "red")
    for made in (
        StableDiffusionImg2ImgPipeline.from_pipe(student, unet=student.unet),
        AutoPipelineForImage2Image.from_pipe(student),
    ):
        assert made.unet is student.unet
        assert draw(made, image=image, strength=1.0).shape == (16, 16, 3)


@pytest.mark.parametrize("make", [ControlNetModel.from_unet, UNetMotionModel.from_unet2d])
def test_what_is_made_from_a_student_that_lacks_its_layers_is_not_made(pipeline, student, make):
    """They have the original's layers; the documentation says to make them from the original."""
    with pytest.raises(RuntimeError, match="Missing key"):
        make(student.unet)
    make(build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet)))
