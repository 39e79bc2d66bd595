"""Pipelines of other classes than Stable Diffusion's for text-to-image: what loads as one, and what is refused."""

import inspect
import json
import warnings

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyDecoderVAE,
    ControlNetModel,
    DDIMInverseScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    RePaintScheduler,
)

from asdm import (
    AsdmError,
    AsdmWarning,
    GenerationRequest,
    analyze,
    calibrate_cache,
    distill,
    evaluate,
    fit_compensation,
    generate,
    generate_images,
    load_pipeline,
    prepare_data,
)
from asdm.diffusion.conditioning import decode_latents, encode_images, unscaled
from asdm.diffusion.kinds import require_text_to_image
from asdm.runtime.graphs import graphs_of
from conftest import (
    tiny_inpainting_pipeline,
    tiny_pipeline,
    tiny_pixart_pipeline,
    tiny_sdxl_pipeline,
    tiny_unet,
)


def made(name, pipeline, **parts):
    """A pipeline of that class of diffusers, of another one's parts."""
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters
    options = {"requires_safety_checker": False, "add_watermarker": False}
    given = {**pipeline.components, **options, **parts}
    return kind(**{name: value for name, value in given.items() if name in taken})


def controlnet(pipeline):
    return {"controlnet": ControlNetModel.from_unet(pipeline.unet)}


VARIANTS = [
    ("StableDiffusionPAGPipeline", tiny_pipeline, {}),
    ("StableDiffusionSAGPipeline", tiny_pipeline, {}),
    ("StableDiffusionPanoramaPipeline", tiny_pipeline, {}),
    ("SemanticStableDiffusionPipeline", tiny_pipeline, {}),
    ("LEditsPPPipelineStableDiffusion", tiny_pipeline, {}),
    ("StableDiffusionDiffEditPipeline", tiny_pipeline, {"inverse_scheduler": DDIMInverseScheduler()}),
    ("StableDiffusionControlNetPipeline", tiny_pipeline, controlnet),
    ("StableDiffusionXLPAGPipeline", tiny_sdxl_pipeline, {}),
    ("StableDiffusionPAGInpaintPipeline", tiny_inpainting_pipeline, {}),
    ("PixArtSigmaPAGPipeline", tiny_pixart_pipeline, {}),
]


@pytest.mark.parametrize(("name", "plain", "parts"), VARIANTS, ids=[variant[0] for variant in VARIANTS])
def test_a_pipeline_with_a_sampling_of_its_own_is_loaded_for_text_to_image(name, plain, parts, tmp_path):
    pipeline = plain()
    parts = parts(pipeline) if callable(parts) else parts
    made(name, pipeline, **parts).save_pretrained(tmp_path)
    with pytest.warns(AsdmWarning, match=f"a {name}; loaded as the plain pipeline of its parts") as told:
        loaded = load_pipeline(tmp_path)
    assert [part for part in parts if f"without its {part}" not in str(told[0].message)] == []
    assert type(loaded).__name__.replace("Sigma", "Alpha") == type(pipeline).__name__
    torch.testing.assert_close(generate(loaded, ["a"], steps=2), generate(pipeline, ["a"], steps=2), atol=1e-4, rtol=0)


def test_consistency_models_from_images_are_loaded_for_text_to_image(tmp_path):
    scheduler = LCMScheduler(original_inference_steps=50)
    unet = tiny_unet(time_cond_proj_dim=16)
    made("LatentConsistencyModelImg2ImgPipeline", tiny_pipeline(), unet=unet, scheduler=scheduler).save_pretrained(
        tmp_path
    )
    with pytest.warns(AsdmWarning, match="loaded as the plain pipeline of its parts"):
        assert type(load_pipeline(tmp_path)) is diffusers.LatentConsistencyModelPipeline


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "StableCascadeCombinedPipeline", "KolorsPipeline", "AnimateDiffPipeline", "DiTPipeline"]
)
def test_other_architectures_are_refused_by_their_index_alone(name, tmp_path, monkeypatch):
    index = {"_class_name": name, "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(AsdmError, match=f"a {name}; use SD 1.x"):
        load_pipeline(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: index)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(AsdmError, match=f"someone/theirs: a {name}; use SD 1.x"):
        load_pipeline("someone/theirs")


def test_a_pipeline_for_edits_is_refused_without_another_word(tmp_path):
    OBJECTS["edits"]().save_pretrained(tmp_path)
    with warnings.catch_warnings(), pytest.raises(AsdmError, match="its UNet takes 8 channels"):
        warnings.simplefilter("error", AsdmWarning)
        load_pipeline(tmp_path)


def test_a_vae_of_depth_maps_is_refused(tmp_path):
    vae = AutoencoderKL(in_channels=6, out_channels=6, block_out_channels=(16,), norm_num_groups=8)
    made("StableDiffusionPipeline", tiny_pipeline(), vae=vae).save_pretrained(tmp_path)
    with pytest.raises(AsdmError, match=r"its VAE makes images of 6 channels; use a checkpoint of 3"):
        load_pipeline(tmp_path)


def test_latents_of_a_vae_with_statistics_are_those_of_the_pipeline():
    pipeline = tiny_sdxl_pipeline()
    pipeline.vae.register_to_config(latents_mean=[0.5, -1.0, 1.5, 2.0], latents_std=[2.0, 3.0, 4.0, 5.0])
    latents, images = (
        pipeline(
            "a",
            num_inference_steps=2,
            height=16,
            width=16,
            output_type=kind,
            generator=torch.Generator().manual_seed(0),
        ).images
        for kind in ("latent", "pt")
    )
    torch.testing.assert_close((decode_latents(pipeline, latents) / 2 + 0.5).clamp(0, 1), images)
    encoded = encode_images(pipeline.vae, images)
    torch.testing.assert_close(unscaled(pipeline.vae, encoded), pipeline.vae.encode(images).latent_dist.mode())


def test_a_vae_that_samples_is_not_exported(pipeline, tmp_path):
    blocks, levels = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), (32, 32)
    pipeline.vae = ConsistencyDecoderVAE(
        encoder_block_out_channels=(16,),
        encoder_down_block_types=("DownEncoderBlock2D",),
        encoder_norm_num_groups=8,
        decoder_block_out_channels=levels,
        decoder_down_block_types=blocks[:1] * 2,
        decoder_up_block_types=blocks[1:] * 2,
        decoder_layers_per_block=1,
    )
    with pytest.raises(AsdmError, match="vae: a ConsistencyDecoderVAE, which samples its images"):
        graphs_of(pipeline, 16, None, [])


@pytest.mark.parametrize(
    ("scheduler", "fault"),
    [
        (FlowMatchEulerDiscreteScheduler(), "no init_noise_sigma"),
        (DDIMInverseScheduler(), "no add_noise"),
        (RePaintScheduler(), "its steps need original_image"),
        (DDPMScheduler(variance_type="learned_range"), "variance_type learned_range, and no variance is predicted"),
    ],
)
def test_a_scheduler_for_other_pipelines_is_refused(scheduler, fault, tmp_path):
    made("StableDiffusionPipeline", tiny_pipeline(), scheduler=scheduler).save_pretrained(tmp_path / "model")
    with pytest.raises(AsdmError, match=f"cannot be sampled by its {type(scheduler).__name__} .{fault}.; write"):
        load_pipeline(tmp_path / "model")
    EulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    assert type(load_pipeline(tmp_path / "model", config=tmp_path / "scheduler").scheduler) is EulerDiscreteScheduler


OBJECTS = {
    "edits": lambda: made("StableDiffusionInstructPix2PixPipeline", tiny_pipeline(), unet=tiny_unet(in_channels=8)),
    "guided": lambda: made("StableDiffusionPAGPipeline", tiny_pipeline()),
    "from images": lambda: made("StableDiffusionImg2ImgPipeline", tiny_pipeline()),
    "no mask": lambda: made("StableDiffusionInpaintPipeline", tiny_pipeline()),
    "channels": lambda: made("StableDiffusionPipeline", tiny_pipeline(), unet=tiny_unet(in_channels=8)),
    "variance": lambda: made("StableDiffusionPipeline", tiny_pipeline(), unet=tiny_unet(out_channels=8)),
    "classes": lambda: made("StableDiffusionPipeline", tiny_pipeline(), unet=tiny_unet(num_class_embeds=7)),
}


@pytest.mark.parametrize("of", OBJECTS)
def test_a_pipeline_that_prompts_do_not_suffice_for_is_refused_before_any_work(of, data_folder, tmp_path):
    pipeline = OBJECTS[of]()
    for use in (
        lambda: analyze(pipeline),
        lambda: calibrate_cache(pipeline, speedup=1.5),
        lambda: distill(pipeline, pipeline.unet, data_folder, tmp_path / "run"),
        lambda: evaluate({"teacher": pipeline}),
        lambda: fit_compensation(pipeline, pipeline.unet),
        lambda: generate(pipeline, ["a"]),
        lambda: generate_images(pipeline, GenerationRequest(prompts=["a"])),
        lambda: prepare_data(pipeline, data_folder, tmp_path / "prepared"),
    ):
        with pytest.raises(AsdmError, match=r"^(a \w+Pipeline:? |its UNet )") as error:
            use()
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_pipeline_of_ones_own_is_taken_at_its_word():
    class Community(DiffusionPipeline):
        """As by `custom_pipeline`: diffusers does not bring it."""

    pipeline = Community()
    pipeline.register_modules(**tiny_pipeline().components)
    require_text_to_image(pipeline)
    pipeline.register_modules(unet=tiny_unet(in_channels=8))
    with pytest.raises(AsdmError, match="its UNet takes 8 channels"):
        require_text_to_image(pipeline)


def test_plain_pipelines_are_loaded_without_a_word(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AsdmWarning)
        load_pipeline(tmp_path)
