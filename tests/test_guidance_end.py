"""Guidance ends where it is told to, in every kind of Stable Diffusion pipeline and for any number of prompts."""

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from asdm import AsdmError, GuidanceEnd, generate, inherit_features
from conftest import tiny_inpainting_pipeline, tiny_pipeline, tiny_sdxl_pipeline

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
    seen = batches(pipeline.unet, lambda: generate(pipeline, PROMPTS, steps=5, guidance_end=0.5, **given))
    assert seen == [4, 4, 4, 2, 2]


def test_one_prompt_is_drawn_as_by_diffusers_own_cutoff(pipeline):
    of = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "latent"}
    ours, theirs = (
        pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **of).images
        for callback in (GuidanceEnd(pipeline, 0.6), SDCFGCutoffCallback(None, 2))
    )
    assert torch.equal(ours, theirs)
    whole = pipeline(PROMPTS[0], generator=torch.Generator().manual_seed(0), **of).images
    assert not torch.equal(ours, whole)


def test_a_batch_is_drawn_as_its_prompts_alone(pipeline):
    together = generate(pipeline, PROMPTS, steps=4, guidance_end=0.5)
    alone = [generate(pipeline, prompt, steps=4, guidance_end=0.5, seed=seed) for seed, prompt in enumerate(PROMPTS)]
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
                callback_on_step_end=GuidanceEnd(guided, 0.5),
            ),
        )
        assert seen == ([2, 2, 2, 2] if guess_mode else [4, 4, 2, 2])


def test_features_are_not_inherited_from_both_branches(pipeline):
    with inherit_features(pipeline, every=4) as session:
        assert generate(pipeline, PROMPTS, steps=6, guidance_end=0.5).isfinite().all()
    assert session.computed == 2 + 1  # the first, the first of one branch, and the fourth behind that


def test_without_guidance_nothing_changes(pipeline):
    drawn = [generate(pipeline, "octopus", steps=3, guidance_scale=1.0, guidance_end=end) for end in (1.0, 0.4)]
    assert torch.equal(*drawn)


def test_what_cannot_end_is_told(pipeline):
    for end in (0.0, 1.5, float("nan")):
        with pytest.raises(AsdmError, match=r"guidance_end=.*must be a finite number above 0 and at most 1"):
            generate(pipeline, "octopus", guidance_end=end)
    pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as load_ip_adapter does
    with pytest.raises(AsdmError, match="IP-Adapter"):
        GuidanceEnd(pipeline, 0.5)
