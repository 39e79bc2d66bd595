"""stable-diffusion.cpp, which shares no code with this package, loads what is exported and draws what torch draws."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from asdm import export_checkpoint
from asdm.families import UNetFamily
from asdm.pipelines import random_models
from asdm.pipelines.random_models import random_denoiser, random_pipeline
from asdm.student.build import empty_student
from asdm.student.plan import PruningPlan

sdcpp = pytest.importorskip("stable_diffusion_cpp")

# "a photo of a cat" in CLIP's vocabulary, which stable-diffusion.cpp has inside; the random pipeline has another one.
START, END, IDS = 49406, 49407, [320, 1125, 539, 320, 2368]
SIDE, STEPS, SEED, GUIDANCE = 64, 4, 7, 3.0
# Of 255, on average over the image's pixels: stable-diffusion.cpp computes convolutions in half precision.
TOLERANCE = 1.0


def bk_tiny(shape, monkeypatch):
    """A pipeline of a known shape's widths with a UNet as BK-SDM's smallest, of random weights."""
    family = UNetFamily()
    with torch.device("meta"):
        unet = family.model_class(**random_models.UNETS[shape])
    edit = family.preset("bk-tiny", family.units(unet)).edit
    student = random_denoiser(family, dict(empty_student(unet, PruningPlan.for_unet(unet, [edit])).config))
    config = {key: value for key, value in student.config.items() if not key.startswith("_") and key != "edits"}
    monkeypatch.setitem(random_models.UNETS, shape, config)
    return random_pipeline(shape, torch.float32)


def embedded(pipeline, ids, padding):
    tokens = torch.tensor([[START, *ids, END, *[padding] * (75 - len(ids))]])
    with torch.no_grad():
        return pipeline.text_encoder(tokens)[0]


def by_torch(pipeline, padding):
    """The image that k-diffusion's Euler sampler gives, from the noise of torch's generator on CPUs."""
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    image = pipeline(
        prompt_embeds=embedded(pipeline, IDS, padding),
        negative_prompt_embeds=embedded(pipeline, [], padding),
        latents=latents,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
    ).images[0]
    return 255 * image


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "padding", "prediction"),
    [("sd15", END, None), ("sd21", 0, "v")],  # SD 2.x's tokenizer pads with "!"
)
def test_a_bk_tiny_student_draws_what_torch_draws(tmp_path, monkeypatch, shape, padding, prediction):
    pipeline = bk_tiny(shape, monkeypatch)
    made = export_checkpoint(pipeline, tmp_path / "tiny.safetensors", "sdcpp", dtype="fp32")
    expected = by_torch(pipeline, padding)
    told = {} if prediction is None else {"prediction": prediction}
    model = sdcpp.StableDiffusion(
        model_path=str(made.file), rng_type="cpu", sampler_rng_type="cpu", n_threads=2, verbose=False, **told
    )
    (image,) = model.generate_image(
        prompt="a photo of a cat",
        width=SIDE,
        height=SIDE,
        cfg_scale=GUIDANCE,
        sample_method="euler",
        scheduler="discrete",
        sample_steps=STEPS,
        seed=SEED,
    )
    found = np.asarray(image.convert("RGB"), dtype=np.float32)
    difference = np.abs(found - expected).mean()
    print(f"mean difference {difference:.3f} of 255; the image's spread is {expected.std():.1f}")
    assert expected.std() > 10 * TOLERANCE  # an image that shows a difference
    assert difference < TOLERANCE
