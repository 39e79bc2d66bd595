"""Guidance ends where it is told to, in every kind of Stable Diffusion pipeline and for any number of prompts."""

import inspect

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from asdm import AsdmError, CfgCutoff, cache_features, generate
from asdm.diffusion.guidance import guided_steps
from conftest import load_ip_adapter, tiny_inpainting_pipeline, tiny_pipeline, tiny_sdxl_pipeline, tiny_unet

PICTURE = Image.new("RGB", (16, 16), "red")
MASK = Image.new("L", (16, 16), 0)
MASK.paste(255, (0, 0, 8, 16))
PROMPTS = ["octopus", "gorilla"]


def batches(unet, draw):
    """The batch of each UNet call while `draw` runs."""
    found = []
    handle = unet.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(len(kwargs["sample"] if "sample" in kwargs else args[0])), with_kwargs=True
    )
    draw()
    handle.remove()
    return found


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline, tiny_inpainting_pipeline])
@pytest.mark.parametrize("given", [{}, {"image": PICTURE}, {"image": PICTURE, "mask": MASK}])
def test_the_later_steps_take_one_branch(make, given):
    pipeline = make()
    given = {**given, "strength": 1.0} if given else {}
    seen = batches(pipeline.unet, lambda: generate(pipeline, PROMPTS, steps=5, cfg_cutoff=0.5, **given))
    assert seen == [4, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("cfg_cutoff", "steps", "guided"),
    [(0.07, 100, 7), (0.28, 25, 7), (0.56, 25, 14), (0.5, 5, 3), (0.501, 100, 51), (1.0, 3, 3), (1e-9, 25, 1)],
)
def test_a_fraction_that_is_a_whole_number_of_steps_guides_no_more(cfg_cutoff, steps, guided):
    assert guided_steps(cfg_cutoff, steps) == guided


def test_one_prompt_is_drawn_as_by_diffusers_own_cutoff(pipeline):
    of = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    ours, theirs = (
        pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **of).images
        for callback in (CfgCutoff(pipeline, 0.6), SDCFGCutoffCallback(None, 2))
    )
    assert torch.equal(ours, theirs)
    whole = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **of).images
    assert not torch.equal(ours, whole)


def test_a_batch_is_drawn_as_its_prompts_alone(pipeline):
    together = generate(pipeline, PROMPTS, steps=4, cfg_cutoff=0.5)
    alone = [generate(pipeline, prompt, steps=4, cfg_cutoff=0.5, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    # The next image of the same pipeline is guided again.
    assert batches(pipeline.unet, lambda: generate(pipeline, PROMPTS[0], steps=2)) == [2, 2]


def test_images_of_a_controlnet_are_halved_too(pipeline):
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    guided = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    guided.set_progress_bar_config(disable=True)
    for guess_mode in (False, True):
        seen = batches(
            controlnet,
            lambda guess_mode=guess_mode: guided(
                PROMPTS,
                image=[PICTURE, PICTURE],
                num_inference_steps=4,
                guess_mode=guess_mode,
                callback_on_step_end=CfgCutoff(guided, 0.5),
            ),
        )
        assert seen == ([2, 2, 2, 2] if guess_mode else [4, 4, 2, 2])


def of_kind(kind, **more):
    """A pipeline of another kind from the tiny ones' parts."""
    parts = (tiny_sdxl_pipeline if "XL" in kind.__name__ else tiny_pipeline)().components
    if "controlnet" in more:
        more["controlnet"] = ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(16, 32), controlnet_conditioning_channel_order="rgb"
        )
    options = {} if "XL" in kind.__name__ else {"requires_safety_checker": False}
    wanted = inspect.signature(kind.__init__).parameters
    pipeline = kind(**{name: part for name, part in (parts | more).items() if name in wanted}, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("kind", "parts", "given", "branches"),
    [
        (StableDiffusionInstructPix2PixPipeline, {"unet": lambda: tiny_unet(in_channels=8)}, {"image": PICTURE}, 3),
        *(
            (kind, {"controlnet": None}, {"image": PICTURE, "control_image": PICTURE, "strength": 1.0}, 2)
            for kind in (StableDiffusionControlNetImg2ImgPipeline, StableDiffusionXLControlNetImg2ImgPipeline)
        ),
        (StableDiffusionXLControlNetPipeline, {"controlnet": None}, {"image": PICTURE}, 2),
    ],
)
def test_other_kinds_of_guidance_end_too(kind, parts, given, branches):
    pipeline = of_kind(kind, **{name: make() if make else None for name, make in parts.items()})
    many = {name: [value] * 2 if "image" in name and branches == 2 else value for name, value in given.items()}
    seen = batches(
        pipeline.unet,
        lambda: pipeline(PROMPTS, num_inference_steps=4, callback_on_step_end=CfgCutoff(pipeline, 0.5), **many),
    )
    assert seen == [2 * branches, 2 * branches, 2, 2]


def test_features_of_both_branches_are_not_reused_for_one(pipeline):
    with cache_features(pipeline, every=4) as session:
        assert generate(pipeline, PROMPTS, steps=6, cfg_cutoff=0.5).isfinite().all()
    assert session.full_steps == 2 + 1  # the first, the first of one branch, and the fourth behind that


def test_without_guidance_nothing_changes(pipeline):
    drawn = [generate(pipeline, "octopus", steps=3, guidance_scale=1.0, cfg_cutoff=end) for end in (1.0, 0.4)]
    assert torch.equal(*drawn)


REFUSED = [
    *(
        f"StableDiffusion{kind}Pipeline"
        for kind in ("PAG", "PAGImg2Img", "PAGInpaint", "ControlNetPAG", "ControlNetPAGInpaint", "ControlNetInpaint")
    ),
    *(f"StableDiffusionXL{kind}Pipeline" for kind in ("PAG", "PAGImg2Img", "PAGInpaint", "ControlNetPAG")),
    *(f"StableDiffusionXLControlNet{kind}Pipeline" for kind in ("PAGImg2Img", "Union", "Inpaint", "XS")),
    *("StableDiffusionControlNetXSPipeline", "StableDiffusionSAGPipeline", "StableDiffusionXLInstructPix2PixPipeline"),
    *("StableDiffusionDepth2ImgPipeline", "StableDiffusionLDM3DPipeline", "StableDiffusionAdapterPipeline"),
    *("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL", "AnimateDiffPipeline"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_guidance_that_a_callback_cannot_end_is_refused_before_sampling(name):
    kind = getattr(diffusers, name)
    with pytest.raises(AsdmError, match=f"^{name}: its guidance cannot end early; leave cfg_cutoff out"):
        CfgCutoff(kind.__new__(kind), 0.5)


def test_a_pipeline_of_another_kind_than_it_was_made_for_is_refused(pipeline):
    other = of_kind(StableDiffusionPAGPipeline)
    with pytest.raises(AsdmError, match="StableDiffusionPAGPipeline: its guidance cannot end early"):
        CfgCutoff(other, 0.5)
    other = tiny_inpainting_pipeline()
    given = {"image": PICTURE, "mask_image": MASK, "height": 16, "width": 16}
    with pytest.raises(AsdmError, match="for another kind of pipeline than StableDiffusionInpaintPipeline"):
        other("octopus", num_inference_steps=2, callback_on_step_end=CfgCutoff(pipeline, 0.5), **given)


def test_a_pipeline_with_a_loop_of_its_own_is_refused(pipeline):
    class Other(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    with pytest.raises(AsdmError, match="Other: its guidance cannot end early"):
        CfgCutoff(Other.__new__(Other), 0.5)


def test_what_cannot_end_is_told(pipeline):
    for end in (0.0, 1.5, float("nan")):
        with pytest.raises(AsdmError, match=r"cfg_cutoff=.*must be a finite number above 0 and at most 1"):
            generate(pipeline, "octopus", cfg_cutoff=end)
    load_ip_adapter(pipeline)
    with pytest.raises(AsdmError, match="IP-Adapter"):
        CfgCutoff(pipeline, 0.5)
    pipeline.unload_ip_adapter()
    CfgCutoff(pipeline, 0.5)
