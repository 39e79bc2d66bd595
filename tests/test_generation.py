"""What `asdm generate` and other interfaces make of a request: which images, from which noise, and what is refused."""

import gc
import json
import warnings
import weakref

import numpy as np
import peft
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from asdm import (
    AsdmError,
    AsdmWarning,
    GenerationRequest,
    PruningPlan,
    build_student,
    compare_images,
    generate,
    generate_images,
    with_unet,
)
from asdm.choices import SCHEDULERS
from asdm.generation.files import ImageFolder, open_inputs, parse_seeds, read_prompts
from asdm.generation.image import read_about
from asdm.generation.lora import LoraFile
from asdm.generation.prompts import lost_text, parse_weights, without_last_layers
from asdm.generation.schedulers import scheduler_label, scheduler_named
from asdm.generation.sheets import LARGEST_SHEET, LEAST_LEGIBLE, Layout, Tile, difference_map, sheets
from asdm.images import as_rgb, to_images
from asdm.pipelines.lora_files import convert_lora
from conftest import (
    lora_file,
    text_lora_file,
    tiny_inpainting_pipeline,
    tiny_pipeline,
    tiny_pixart_pipeline,
    tiny_sdxl_pipeline,
    tiny_unet,
)

REMOVALS = [
    {"edit": "remove", "unit": "down_blocks.1.attentions.0"},
    {"edit": "remove", "unit": "down_blocks.0.resnets.1", "compensate": "bias"},
]


def request(**fields) -> GenerationRequest:
    return GenerationRequest(**{"prompts": ["pear"], "steps": 2} | fields)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(each.image) for each in images])


def made(pipeline, **fields) -> np.ndarray:
    return pixels(generate_images(pipeline, request(**fields)))


@pytest.fixture
def student(pipeline):
    return with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, REMOVALS)))


@pytest.fixture
def lora(tmp_path):
    """A LoRA of the tiny SD UNet in a file."""
    return lora_file(tiny_unet(), tmp_path / "lora.safetensors")


# -- requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompts": []}, "prompts"),
        ({"strength": 0.5}, "strength=0.5: has no effect without image"),
        ({"mask": Image.new("L", (16, 16))}, r"mask\(16x16 pixels\): has no effect without image"),
        ({"control_scale": 0.5}, "control_scale=0.5: has no effect without controlnet"),
        ({"width": 16}, "width=16: give height too"),
        ({"width": 20, "height": 16}, "width=20: must be a positive multiple of 8; the nearest is 16"),
        ({"seeds": [1], "seed": 3}, "seed=3: seeds=.1. says it already"),
        ({"seeds": [1], "num_images": 2}, "num_images=2: seeds"),
        ({"seed": 2**32 - 2, "num_images": 3}, "seed=4294967294: the last of 3 .* give 4294967293 at most"),
        ({"seed": 2**32}, "seed=4294967296: "),
        ({"seeds": [1, 2**32]}, "4294967296"),
        ({"negative": "x", "guidance_scale": 1.0}, "negative=x: has no effect at guidance_scale=1"),
        ({"cfg_cutoff": 0.5, "guidance_scale": 0.5}, "cfg_cutoff=0.5: has no effect at guidance_scale=0.5"),
        ({"scheduler": "euler-b"}, "scheduler=euler-b: must be one of ddim, .* the nearest is euler-"),
        ({"image": Image.new("RGB", (16, 16)), "strength": 0.1}, "strength=0.1: must leave at least one of the 2"),
        ({"image": Image.new("RGB", (16, 16)), "mask": Image.new("L", (8, 8))}, "the mask has"),
        ({"controlnet": "./gone", "control_image": Image.new("RGB", (16, 16))}, "gone: no such folder of a ControlNet"),
        ({"loras": [{"path": "gone.safetensors"}]}, "gone.safetensors: no such LoRA file"),
        ({"cache_schedule": "gone.json"}, "gone.json"),
        ({"cache_speedup": 1.5, "cache_schedule": __file__}, "cache_speedup=1.5|not a"),
    ],
)
def test_a_request_without_meaning_is_refused_in_one_line(fields, told):
    with pytest.raises(AsdmError, match=rf"^[^\n]*({told})[^\n]*$") as refused:
        request(**fields)
    assert "GenerationRequest" not in str(refused.value) and "LoraFile" not in str(refused.value)


def test_each_image_has_a_seed_of_its_own_or_the_given_ones():
    both = request(prompts=["a", "b"], seed=5, num_images=2)
    assert both.items() == [("a", 5), ("a", 6), ("b", 7), ("b", 8)]
    assert request(prompts=["a", "b"], seeds=[9, 3]).items() == [("a", 9), ("a", 3), ("b", 9), ("b", 3)]
    assert parse_seeds("1,5, 8-10") == [1, 5, 8, 9, 10]
    for wrong in ("", "x", "3-1", "1,,2", "-1", "1,1", "1.5", "0-99999", "4294967296"):
        with pytest.raises(AsdmError, match=r"^seeds=[^\n]*$"):
            parse_seeds(wrong)


def test_prompts_are_read_from_files(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffbirne, rot\r\n\n  übung \n".encode())
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["birne, rot", "übung"]
    for content, told in [(b"", "no prompt"), (b"\xff\xfe\xfa", "not text in UTF-8"), (b"a\0b", "not a text file")]:
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(AsdmError, match=told):
            read_prompts(str(tmp_path / "prompts.txt"))


def test_no_two_seeds_draw_the_same_image(pipeline):
    assert request(seed=2**32 - 2, num_images=2).items()[-1][1] == parse_seeds("4294967295")[0]
    for seed, prompts in ((2**32, ["a"]), (2**32 - 2, ["a", "b", "c"])):
        with pytest.raises(AsdmError, match=rf"^seed={seed}: [^\n]*$"):
            generate(pipeline, prompts, steps=1, seed=seed)


# -- images --------------------------------------------------------------------------------------------------


def test_images_are_those_of_generate_whatever_the_batch(pipeline):
    prompts = ["pear", "a tree", "dog"]
    expected = np.stack([np.asarray(each) for each in to_images(generate(pipeline, prompts, steps=2, seed=5))])
    for batch_size in (None, 1, 2):
        seen = []
        wanted = request(prompts=prompts, seed=5)
        images = list(
            generate_images(
                pipeline, wanted, batch_size=batch_size, progress=lambda now, seen=seen: seen.append(now.image_steps)
            )
        )
        moved = np.abs(pixels(images).astype(int) - expected).max()
        assert moved <= (0 if batch_size is None else 1)  # kernels differ by the batch
        assert seen[-1] == (6, 6) and seen == sorted(seen)
        assert [(each.prompt, each.seed) for each in images] == [("pear", 5), ("a tree", 6), ("dog", 7)]
    np.testing.assert_array_equal(made(pipeline, prompts=["dog"], seeds=[7]), expected[2:])


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline, tiny_inpainting_pipeline])
def test_inputs_are_cropped_to_the_size_and_a_mask_keeps_the_rest(make):
    pipeline, image = make(), Image.new("RGB", (40, 16), "red")
    assert made(pipeline, width=24, height=16).shape == (1, 16, 24, 3)
    whole = made(pipeline, image=image, strength=1.0, width=24, height=16)
    kept = made(pipeline, image=image, mask=Image.new("L", (40, 16), 0), strength=1.0, width=24, height=16)
    assert whole.shape == kept.shape == (1, 16, 24, 3) and not np.array_equal(whole, kept)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_inputs_may_have_any_mode(pipeline, mode):
    pixels = Image.linear_gradient("L").resize((16, 16))
    given = Image.fromarray(np.asarray(pixels, np.uint16) * 257) if mode == "I;16" else pixels.convert(mode)
    in_rgb, one_channel = as_rgb(given), as_rgb(given, "black").convert("L")
    np.testing.assert_array_equal(made(pipeline, image=given), made(pipeline, image=in_rgb))
    masked = made(pipeline, image=in_rgb, mask=given)
    np.testing.assert_array_equal(masked, made(pipeline, image=in_rgb, mask=one_channel))
    by_hand = [generate(pipeline, ["pear"], steps=2, image=in_rgb, mask=each) for each in (given, one_channel)]
    assert torch.equal(*by_hand)


def test_a_negative_prompt_counts_with_guidance(pipeline):
    plain, negative = made(pipeline), made(pipeline, negative="red")
    assert not np.array_equal(plain, negative)
    pipeline.scheduler = scheduler_named("lcm", pipeline.scheduler)
    _assert_is_not_guided(pipeline)


def test_a_unet_that_embeds_the_guidance_scale_takes_no_negative_prompt():
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=tiny_unet(time_cond_proj_dim=8))
    _assert_is_not_guided(pipeline, guidance_scale=7.5)


def _assert_is_not_guided(pipeline, **fields):
    for name, value in {"negative": "red", "cfg_cutoff": 0.5}.items():
        with pytest.raises(AsdmError, match=f"^{name}={value}: has no effect[^\n]*; leave it out"):
            generate_images(pipeline, request(**fields, **{name: value}))


@pytest.mark.parametrize("scheduler", [None, "tcd", "euler"])
def test_a_few_step_model_keeps_its_defaults_with_any_scheduler(pipeline, scheduler):
    pipeline.scheduler = scheduler_named("lcm", pipeline.scheduler)
    (image,) = generate_images(pipeline, request(steps=None, scheduler=scheduler))
    assert (image.about["steps"], image.about["guidance_scale"]) == (4, 1.0)


def test_pixart_generates_and_refuses_what_it_does_not_take(lora):
    pipeline, steps = tiny_pixart_pipeline(), []
    images = generate_images(pipeline, request(negative="b", width=24, height=16), progress=steps.append)
    assert pixels(images).shape == (1, 16, 24, 3) and [(each.step, each.total_steps) for each in steps] == [
        (1, 2),
        (2, 2),
    ]
    for fields, name in [
        ({"image": Image.new("RGB", (16, 16)), "strength": 1.0}, "image"),
        ({"clip_skip": 1}, "clip_skip"),
        ({"weighted": True}, "weighted"),
        ({"loras": [{"path": lora}]}, "lora"),
        ({"cfg_cutoff": 0.5}, "PixArtAlphaPipeline"),
    ]:
        with pytest.raises(AsdmError, match=rf"^{name}: [^\n]*leave "):
            generate_images(pipeline, request(**fields))


def test_cancelling_ends_the_images_and_an_error_of_the_callback_leaves_nothing_behind(pipeline, lora):
    seen = []
    images = list(
        generate_images(
            pipeline, request(num_images=3), progress=seen.append, cancelled=lambda: len(seen) > 2, batch_size=1
        )
    )
    assert len(images) == 1 and [(each.images, each.step) for each in seen] == [(0, 1), (0, 2), (1, 1)]

    def fails(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate_images(pipeline, request(loras=[LoraFile(path=lora)], cache_speedup=1.01), progress=fails))
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
    np.testing.assert_array_equal(made(pipeline), pixels(images))


# -- schedulers ----------------------------------------------------------------------------------------------


def test_each_short_name_samples_and_has_its_label(pipeline):
    before, images = pipeline.scheduler, {}
    for name, choice in SCHEDULERS.items():
        images[name] = made(pipeline, scheduler=name, steps=3).tobytes()
        scheduler = scheduler_named(name, before)
        assert (type(scheduler).__name__, scheduler_label(scheduler)) == (choice.class_name, choice.label), name
        assert scheduler.config.beta_end == before.config.beta_end
    assert pipeline.scheduler is before
    assert len(set(images.values())) > len(images) - 3  # a few agree in so few steps


def test_schedulers_that_would_ignore_the_training_are_refused(pipeline):
    by_class = scheduler_named("EulerAncestralDiscreteScheduler", pipeline.scheduler)
    assert isinstance(by_class, EulerAncestralDiscreteScheduler)
    karras = scheduler_named("dpmpp-2m-karras", pipeline.scheduler)
    assert scheduler_named("dpmpp-2m", karras).config.use_karras_sigmas is False
    for name in ("ddim", "ddpm", "DDIMScheduler", "lcm"):
        made_of = scheduler_named(name, DPMSolverMultistepScheduler()).config
        assert not made_of.clip_sample and not made_of.get("set_alpha_to_one")  # latents are no pixels
    assert scheduler_named("ddpm", DDIMScheduler(clip_sample=True)).config.clip_sample
    zero_snr = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(AsdmError, match="its noise does not follow the seeds; use dpmpp-2m-sde"):
        scheduler_named("DPMSolverSDEScheduler", pipeline.scheduler)
    with pytest.raises(AsdmError, match="scheduler=heun: cannot end at zero SNR"):
        scheduler_named("heun", zero_snr)
    assert scheduler_named("euler", zero_snr).config.rescale_betas_zero_snr
    with pytest.raises(AsdmError, match="scheduler=lms: takes no predictions of the image"):
        scheduler_named("lms", DDIMScheduler(prediction_type="sample"))


# -- prompts -------------------------------------------------------------------------------------------------


def test_what_a_prompt_loses_is_said(pipeline):
    most = pipeline.tokenizer.model_max_length
    long = " ".join(["pear"] * (most - 2)) + " green tree"
    lost = lost_text(pipeline, long)
    assert lost and long.endswith(lost.strip()) and lost_text(pipeline, "pear") == ""
    with pytest.warns(AsdmWarning, match=f"reads {most} tokens; it does not see"):
        list(generate_images(pipeline, request(prompts=[long])))
    assert lost_text(tiny_pixart_pipeline(), "a" * 130).strip("a") == ""
    with pytest.warns(AsdmWarning, match=r"\(pear:1.5\): read as text"):
        list(generate_images(pipeline, request(prompts=["a (pear:1.5)"])))


def test_clip_skip_takes_an_earlier_layer_and_puts_the_encoder_back(pipeline):
    encoder, tokens = pipeline.text_encoder, torch.tensor([[0, 5, 7, 1]])
    with torch.no_grad():
        states = encoder(tokens, output_hidden_states=True).hidden_states
        with without_last_layers(encoder, 1):
            skipped = encoder(tokens).last_hidden_state
        norm = getattr(encoder, "text_model", encoder).final_layer_norm  # the former in transformers 5.0
        torch.testing.assert_close(skipped, norm(states[-2]))
        torch.testing.assert_close(encoder(tokens).last_hidden_state, norm(states[-1]))
    assert not np.array_equal(made(pipeline), made(pipeline, clip_skip=1))
    with pytest.raises(AsdmError, match="clip_skip=2: the text encoder has 2 layers; must be from 1 to 1"):
        made(pipeline, clip_skip=2)
    sdxl = tiny_sdxl_pipeline()
    with pytest.raises(AsdmError, match="clip_skip=2"):
        made(sdxl, clip_skip=2)


def test_weights_in_parentheses_are_parsed():
    assert parse_weights("a cat") == [("a cat", 1.0)]
    assert parse_weights("a (cat:1.5), red") == [("a ", 1.0), ("cat", 1.5), (", red", 1.0)]
    (_, twice), (_, less) = parse_weights("((cat))[dog]")
    assert (twice, less) == (pytest.approx(1.21), pytest.approx(1 / 1.1))
    assert parse_weights(r"a \(b\) at 16:9") == [("a (b) at 16:9", 1.0)]
    assert parse_weights("(a (b:2) c:0.5)") == [("a ", 0.5), ("b", 1.0), (" c", 0.5)]
    assert parse_weights("") == parse_weights("()") == [("", 1.0)]
    for wrong in ("(a", "a)", "[a)", "(a]", "(a:99)", "(a:-1)"):
        with pytest.raises(AsdmError, match=r'^prompt "[^\n]*$'):
            parse_weights(wrong)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_weights_move_the_embedding_and_leave_plain_prompts_alone(make):
    pytest.importorskip("compel")
    pipeline = make()
    plain = made(pipeline, prompts=["pear"], negative="tree")
    np.testing.assert_array_equal(made(pipeline, prompts=["pear"], negative="tree", weighted=True), plain)
    for prompt in ("(pear:1.5)", "red [pear]", "pear " * 40):
        with warnings.catch_warnings():
            warnings.simplefilter("error", AsdmWarning)  # nothing of it is lost
            assert not np.array_equal(made(pipeline, prompts=[prompt], negative="(tree)", weighted=True), plain)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_prompts_without_weights_are_drawn_as_plain_ones(make):
    pytest.importorskip("compel")
    pipeline = make()
    np.testing.assert_array_equal(made(pipeline, weighted=True), made(pipeline))


def test_a_weighted_prompt_is_drawn_alike_beside_longer_ones(pipeline):
    pytest.importorskip("compel")
    several = request(prompts=["(pear:1.5)", "pear " * 40], weighted=True, num_images=2)
    alone = made(pipeline, prompts=["(pear:1.5)"], weighted=True, num_images=2)
    np.testing.assert_array_equal(pixels(generate_images(pipeline, several, batch_size=4))[:2], alone)


def test_without_the_extra_it_is_named(pipeline, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "compel", None)
    with pytest.raises(AsdmError, match=r"asdm-diffusion\[weighting\]"):
        made(pipeline, weighted=True)


# -- LoRA and ControlNet -------------------------------------------------------------------------------------


def test_a_lora_counts_by_its_scale_and_is_gone_afterwards(pipeline, lora):
    plain = made(pipeline)
    full, half, none = (made(pipeline, loras=[{"path": lora, "scale": scale}]) for scale in (1.0, 0.5, 0.0))
    assert not np.array_equal(full, plain) and not np.array_equal(half, full) and np.array_equal(none, plain)
    both = made(pipeline, loras=[{"path": lora, "scale": 0.5}, {"path": lora, "scale": 0.5}])
    np.testing.assert_allclose(both.astype(int), full, atol=1)
    np.testing.assert_array_equal(made(pipeline), plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_saved_by_diffusers_counts_as_it_was_trained(pipeline, tmp_path, rslora):
    """Its alphas are in the file's metadata."""
    unet = tiny_pipeline().unet
    config = {"r": 2, "lora_alpha": 16, "alpha_pattern": {"to_v": 1}, "use_rslora": rslora}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet.add_adapter(peft.LoraConfig(**config, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=config | {"target_modules": ["to_q", "to_v"]},
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    expected = made(pipeline)
    pipeline.unload_lora_weights()
    drawn = made(pipeline, loras=[{"path": file}])
    np.testing.assert_allclose(drawn.astype(int), expected, atol=1)
    assert not np.allclose(drawn.astype(int), made(pipeline, loras=[{"path": file, "scale": 0.5}]), atol=1)


def test_a_loras_damaged_scale_is_refused(pipeline, lora, tmp_path):
    for config in ("{", '{"unet.lora_alpha": 1e400}', '{"unet.lora_alpha": null}', "7"):
        file = tmp_path / "damaged.safetensors"
        save_file(load_file(lora), file, {"lora_adapter_metadata": config})
        with pytest.raises(AsdmError, match=r"damaged.safetensors: its metadata lora_adapter_metadata is damaged"):
            made(pipeline, loras=[{"path": file}])


@pytest.mark.parametrize(
    ("suffix", "kind"), [("dora_scale", "a DoRA in kohya's layout"), ("hada_w1_a", "a LoHa"), ("lokr_w1", "a LoKr")]
)
def test_adapters_that_diffusers_does_not_read_are_refused_by_their_kind(suffix, kind, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({f"lora_unet_mid_block_attentions_0_proj_in.{suffix}": torch.ones(1)}, file)
    with pytest.raises(AsdmError, match=rf"other.safetensors: {kind}, which diffusers does not read; use a LoRA"):
        LoraFile(path=file)


def test_a_lora_of_the_text_encoder_counts_by_its_scale_and_is_gone_afterwards(pipeline, tmp_path):
    plain = made(pipeline)
    lora = text_lora_file(pipeline.text_encoder, tmp_path / "lora.safetensors")
    full, half, none = (made(pipeline, loras=[{"path": lora, "scale": scale}]) for scale in (1.0, 0.5, 0.0))
    assert not np.array_equal(full, plain) and not np.array_equal(half, full) and np.array_equal(none, plain)
    np.testing.assert_array_equal(made(pipeline), plain)


def test_a_students_missing_layers_of_a_lora_are_counted(student, lora):
    with pytest.warns(AsdmWarning, match=r"lora.safetensors: 4 of its \d+ layers are not in this model"):
        made(student, loras=[{"path": lora}])


def test_a_lora_counts_by_its_scale_where_levels_have_different_numbers_of_layers(pipeline, lora, tmp_path):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "drop_layers", "layers_per_block": [2, 2, 1, 1]}])
    student = with_unet(pipeline, build_student(pipeline.unet, plan))
    file = convert_lora(lora, student.unet, tmp_path / "renumbered.safetensors").file
    plain, full, half = (made(student, loras=[{"path": file, "scale": scale}]) for scale in (0.0, 1.0, 0.5))
    assert not np.array_equal(full, plain) and not np.array_equal(half, full)


def test_files_that_are_no_lora_for_this_model_are_refused(pipeline, lora, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(AsdmError, match=r"other.safetensors: holds no LoRA"):
        LoraFile.parse(str(other))
    other.write_bytes(lora.read_bytes()[:200])
    with pytest.raises(AsdmError, match="not a safetensors file"):
        LoraFile.parse(f"{other}:0.5")
    (tmp_path / "old.pt").write_bytes(b"x")
    with pytest.raises(AsdmError, match=r"^\S+old.pt: a LoRA must be a .safetensors file"):
        LoraFile.parse(str(tmp_path / "old.pt"))
    with pytest.raises(AsdmError, match=r"^\S+gone.safetensors: no such LoRA file"):
        LoraFile.parse(str(tmp_path / "gone.safetensors"))
    for scale in ("nan", "-11", "1e9"):
        with pytest.raises(AsdmError, match=r"^\S+lora.safetensors:\S+: the scale must be from -10 to 10$"):
            LoraFile.parse(f"{lora}:{scale}")
    for wrong in (True, "x"):
        with pytest.raises(AsdmError, match=r"^scale="):
            LoraFile(path=lora, scale=wrong)
    assert LoraFile.parse(f"{lora}:0.25") == LoraFile(path=lora, scale=0.25)
    with pytest.raises(AsdmError, match=r"lora.safetensors: a LoRA for another model \(\S+to_\w has another size\)"):
        made(tiny_sdxl_pipeline(), loras=[{"path": lora}])


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_inpainting_pipeline])
def test_a_controlnet_guides_each_kind_of_generation(make, tmp_path):
    pipeline = make()
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(16, 32))
    with torch.no_grad():  # its outputs start at zero
        for parameter in controlnet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    controlnet.save_pretrained(tmp_path / "control")
    image, edges = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (30, 20), "blue")
    mask = {"mask": Image.new("L", (16, 16), 255)}
    for inputs in ({}, {"image": image, "strength": 1.0}, {"image": image, "strength": 1.0, **mask}):
        control = {"controlnet": tmp_path / "control", "control_image": edges}
        without, guided = (made(pipeline, **inputs, **control, control_scale=scale) for scale in (0.0, 1.0))
        assert not np.array_equal(without, guided)
        np.testing.assert_allclose(without.astype(int), made(pipeline, **inputs), atol=1)
    with pytest.raises(AsdmError, match="control: a ControlNet for another UNet, with"):
        made(tiny_sdxl_pipeline(), **control)
    ControlNetModel.from_unet(tiny_unet()).save_pretrained(tmp_path / "large")
    with pytest.raises(AsdmError, match=r"makes images smaller by 8, and this model's VAE does by 2; use one with 2 "):
        made(tiny_pipeline(), **{**control, "controlnet": tmp_path / "large"})
    (tmp_path / "control" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(AsdmError, match="control: a AutoencoderKL; must be"):
        request(**control)


# -- files ---------------------------------------------------------------------------------------------------


def test_a_png_says_how_it_was_made(student, lora, tmp_path):
    fields = {"prompts": ["pear, 50%: red\nleaf"], "negative": "tree", "clip_skip": 1, "scheduler": "dpmpp-2m-karras"}
    with pytest.warns(AsdmWarning, match="layers are not in this model"):
        (image,) = generate_images(student, request(**fields, seed=7, loras=[{"path": lora, "scale": 0.5}]))
    path = image.save(tmp_path / "image.png")
    with Image.open(path) as saved:
        lines = saved.info["parameters"].splitlines()
        json.loads(saved.info["asdm"], parse_constant=pytest.fail)
    assert lines[:3] == ["pear, 50%: red", "leaf <lora:lora:0.5>", "Negative prompt: tree"]
    assert lines[3].startswith("Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3, Seed: 7, Size: 16x16, ")
    assert "Clip skip: 2" in lines[3] and "Model: " not in lines[3]  # it was made here and has no name
    about = read_about(path)
    assert PruningPlan.model_validate(about["plan"]) == PruningPlan.for_unet(student.unet.original(), REMOVALS)
    assert about["versions"].keys() == {"asdm", "diffusers", "transformers", "torch"} and about["seed"] == 7
    assert str(tmp_path) not in json.dumps(about)
    with pytest.raises(AsdmError, match="not a PNG that asdm generated"):
        read_about(lora)


def test_a_png_says_that_a_controlnet_had_no_weight(pipeline, tmp_path):
    ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(16, 32)).save_pretrained(tmp_path)
    control = {"controlnet": tmp_path, "control_image": Image.new("RGB", (16, 16)), "control_scale": 0.0}
    (image,) = generate_images(pipeline, request(**control))
    assert image.about["controlnet"]["scale"] == 0


def test_files_are_named_after_their_prompts_and_replace_nothing(pipeline, tmp_path):
    wanted = request(prompts=["pear, red", "pear, red"])
    folder = ImageFolder(tmp_path / "out", wanted, with_sheet=True)
    for image in generate_images(pipeline, wanted):
        folder.write(image)
    folder.write_last_sheet()
    assert [path.name for path in folder.paths] == ["pear__red.png", "pear__red-1.png", "grid.png"]
    seeded = ImageFolder(tmp_path / "out", request(seeds=[4, 9]))
    for image in generate_images(pipeline, request(seeds=[4, 9])):
        seeded.write(image)
    assert [path.name for path in seeded.paths] == ["pear_seed4.png", "pear_seed9.png"]


def test_a_name_is_as_long_as_file_systems_allow(pipeline, tmp_path):
    letters = "\N{MATHEMATICAL SCRIPT CAPITAL X}" * 80  # of four bytes each
    wanted = request(prompts=[letters], num_images=2, seed=2**32 - 2)
    folder = ImageFolder(tmp_path, wanted)
    for image in generate_images(pipeline, wanted):
        folder.write(image)
    assert [path.name.count(letters[0]) for path in folder.paths] == [45, 45]


def test_a_single_image_may_have_a_name_of_its_own(pipeline, tmp_path):
    (image,) = generate_images(pipeline, request())
    for _ in range(2):
        alone = ImageFolder(tmp_path / "fruit.png", request())
        alone.write(image)
    assert [path.name for path in alone.paths] == ["fruit-1.png"] and (tmp_path / "fruit.png").is_file()
    with pytest.raises(AsdmError, match=r"fruit.png: a file, and there are 2 images; name a folder"):
        ImageFolder(tmp_path / "fruit.png", request(seeds=[4, 9]))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AsdmError, match=r"notes.txt: a file; name a folder, or for one image a name that ends in .png"):
        ImageFolder(tmp_path / "notes.txt", request())


@pytest.mark.parametrize("with_sheet", [False, True])
def test_written_images_are_held_no_longer(pipeline, tmp_path, with_sheet):
    wanted = request(num_images=3)
    folder, written = ImageFolder(tmp_path, wanted, with_sheet=with_sheet), []
    for image in generate_images(pipeline, wanted, batch_size=1):
        folder.write(image)
        written.append(weakref.ref(image.image))
    del image
    gc.collect()
    assert [one() for one in written] == [None] * 3
    folder.write_last_sheet()
    assert (tmp_path / "grid.png").exists() is with_sheet


def test_an_image_and_its_mask_have_one_size(tmp_path):
    Image.new("RGB", (24, 16), "red").save(tmp_path / "image.png")
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    with pytest.raises(AsdmError, match=r"mask.png: \(8, 8\) pixels; it must be of the size"):
        open_inputs(tmp_path / "image.png", tmp_path / "mask.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_in_white_on_a_transparent_ground_replaces_its_white_part(pipeline, mode, tmp_path):
    transparent = np.zeros((16, 16, 4), np.uint8)
    transparent[..., :3] = 255
    transparent[4:12, 4:12, 3] = 255
    drawn = Image.fromarray(transparent)
    drawn = drawn.quantize(2) if mode == "P" else drawn.convert(mode)
    drawn.save(tmp_path / "mask.png")
    image, black = Image.new("RGB", (16, 16), "red"), Image.fromarray(transparent[..., 3])
    image.save(tmp_path / "image.png")
    _, opened = open_inputs(tmp_path / "image.png", tmp_path / "mask.png")
    assert opened.tobytes() == black.tobytes()
    inputs = {"image": image, "strength": 1.0}
    np.testing.assert_array_equal(made(pipeline, **inputs, mask=drawn), made(pipeline, **inputs, mask=black))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_inputs_are_turned_by_their_exif_before_their_sizes_are_compared(pipeline, mode):
    upright = Image.linear_gradient("L").resize((16, 24)).convert(mode)
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6  # to be turned to the right
    expected = made(pipeline, image=upright, mask=upright, width=16, height=24)
    turned = {"image": lying, "mask": upright}, {"image": upright, "mask": lying}
    for inputs in turned:
        np.testing.assert_array_equal(made(pipeline, **inputs, width=16, height=24), expected)
    by_hand = [generate(pipeline, ["pear"], steps=2, **inputs) for inputs in turned]
    assert by_hand[0].shape[2:] == (24, 16) and torch.equal(*by_hand)
    assert (request(image=upright).image is upright) == (mode == "RGB")  # not copied
    with pytest.raises(AsdmError, match="the mask has"):
        request(image=lying, mask=Image.fromarray(np.asarray(lying)))


# -- comparisons and sheets ----------------------------------------------------------------------------------


def test_a_comparison_starts_both_from_the_same_noise(pipeline, student, tmp_path):
    wanted = request(num_images=2, cache_speedup=1.01)
    (same, _) = compare_images(pipeline, pipeline, request(num_images=2))
    np.testing.assert_array_equal(np.asarray(same.teacher.image), np.asarray(same.student.image))
    seen = []
    first, second = compare_images(student, pipeline, wanted, progress=seen.append)
    assert (first.teacher.seed, second.student.seed) == (0, 1)
    assert "cache" in first.student.about and "cache" not in first.teacher.about
    np.testing.assert_array_equal(np.asarray(first.teacher.image), made(pipeline)[0])
    assert {(each.images, each.total_images) for each in seen} == {(0, 4), (1, 4), (2, 4), (3, 4)}
    assert first.speedup == first.teacher.seconds / first.student.seconds
    folder = ImageFolder(tmp_path, wanted, with_sheet=True)
    folder.write_comparison(first)
    folder.write_last_sheet()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png", "pear_seed0.png", "pear_seed0_comparison.png", "pear_seed0_teacher.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "pear_seed0_comparison.png") as picture:
        assert picture.width > 3 * 256
    other = tiny_pipeline()
    other.vae.register_to_config(latent_channels=8)
    with pytest.raises(AsdmError, match="latents have 8 channels"):
        compare_images(student, other, request())


def test_pipelines_that_share_nothing_take_turns_and_their_images_are_held_no_longer(pipeline):
    seen, wanted = [], request(num_images=3, cache_speedup=1.01)
    pairs = compare_images(tiny_pipeline(), pipeline, wanted, progress=seen.append)
    first = next(pairs)
    assert {each.images for each in seen} == {0, 1}
    held = weakref.ref(first.teacher.image)
    np.testing.assert_array_equal(np.asarray(first.teacher.image), made(pipeline)[0])
    del first
    second = next(pairs)
    gc.collect()
    assert held() is None and second.teacher.seed == second.student.seed == 1
    assert len(list(pairs)) == 1 and {(each.images, each.total_images) for each in seen} == {(n, 6) for n in range(6)}


def test_a_comparison_that_is_cancelled_yields_whole_pairs(pipeline, student):
    seen = []
    pairs = compare_images(
        student, pipeline, request(num_images=2), progress=seen.append, cancelled=lambda: len(seen) >= 7
    )
    assert len(list(pairs)) == 1


def test_a_sheet_enlarges_by_whole_factors_and_cuts_long_labels():
    board = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    (page,) = map(np.asarray, sheets([Tile(board, ("word " * 50, "2"))] * 5, columns=2))
    assert page.shape[1] == 2 * (256 + 12) + 12
    tile = page[12 : 12 + 256, 12 : 12 + 256]
    np.testing.assert_array_equal(tile[::16, ::16], np.asarray(board))
    assert set(np.unique(tile)) == {0, 255}
    assert (page[:, 12 + 256 : 24 + 256] == 255).all()  # no label reaches into the gap
    (wide,) = sheets([Tile(Image.new("RGB", (512, 512)), ("x",))] * 90, columns=90)
    assert max(wide.size) <= 16_000


@pytest.mark.parametrize("size", [(512, 512), (64, 64), (1024, 256), (200, 300), (8, 8192)])
@pytest.mark.parametrize(("tiles", "columns"), [(86 * 4, 4), (100 * 4, 4), (4000, 4), (3000, 3), (100_000, 317)])
def test_tiles_of_a_sheet_stay_legible_and_have_room(size, tiles, columns):
    layout = Layout.of(size, tiles, columns, 3)
    assert max(layout.cell.width, layout.cell.height) >= LEAST_LEGIBLE
    assert max(layout.sides) <= LARGEST_SHEET and layout.columns <= columns


def test_what_one_sheet_has_no_room_for_goes_on_in_others():
    tiles = [Tile(Image.new("RGB", (16, 128), (0, index // 2, 255)), (f"{index // 2}",)) for index in range(2 * 230)]
    pages = sheets(tiles, columns=2)
    layout = Layout.of((16, 128), len(tiles), 2, 1)
    assert len(pages) == 3 and layout.rows == 77 and pages[-1].height < pages[0].height
    last = 230 - 2 * layout.rows
    colours = [
        page.getpixel(layout.place(2 * row))[1]
        for page, rows in zip(pages, (layout.rows, layout.rows, last), strict=True)
        for row in range(rows)
    ]
    assert colours == list(range(230))


def test_a_difference_map_is_black_where_images_agree():
    one, other = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    other.paste("white", (4, 0, 8, 8))
    picture, mean = difference_map(one, other)
    assert mean == pytest.approx(127.5)
    assert np.asarray(picture)[:, :4].max() < 8 and np.asarray(picture)[:, 4:, 0].min() > 200
