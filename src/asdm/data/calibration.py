"""Calls that a denoiser is observed in: noisy latents of images at stratified time steps, with their prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.data.examples import load_pixels
from asdm.data.prepared import is_prepared, open_prepared
from asdm.data.sources import open_data, require_usable
from asdm.diffusion.conditioning import (
    Conditioning,
    decode_latents,
    embed_prompts,
    encode_images,
    image_size,
    latent_shape,
    masked_latents,
)
from asdm.diffusion.generation import default_guidance, faults_in_one_line, pipeline_arguments
from asdm.diffusion.kinds import is_inpainting, is_random, require_text_to_image
from asdm.diffusion.parameterization import parameterization_of
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of, require_torch

UNAFFORDABLE = 1e6  # the error of a prediction that overflows: plans choose all other edits first
# Prompts such as users write, where no data has any.
DEFAULT_PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a bowl of fruit on a wooden table, still life",
    "a castle on a hill at sunset, oil painting",
    "portrait of an old fisherman, studio light",
    "a red bicycle leaning against a brick wall",
    "a cat sleeping on a pile of books",
    "a city street in the rain at night, neon signs",
    "a mountain lake with pine trees, morning mist",
)


@dataclass(frozen=True)
class CalibrationCall:
    """Arguments of one call of the denoiser at one time step."""

    timestep: int
    arguments: dict[str, Any]


def calibration_calls(
    pipeline: DiffusionPipeline,
    data: str | Path | None,
    prompts: Sequence[str] | None,
    timesteps: int,
    samples: int | None,
    seed: int,
) -> list[CalibrationCall]:
    """Make the calls: noisy latents of real or generated images, one call for each time step, with the same prompts.

    Args:
        data: images with captions (as for `open_source`, or prepared). Without it, the pipeline generates latents from
            `prompts` (pure noise where its weights are random).
        prompts: captions; `DEFAULT_PROMPTS` where neither they nor `data` are given.
        timesteps: how many time steps, the middles of equal parts of the schedule.
        samples: how many images or prompts; the default is 16 at up to 32x32 latents, else 1.

    Raises:
        AsdmError: the data cannot be used, or was prepared by another model; or the denoiser reads what no prompt
            brings.
    """
    require_text_to_image(pipeline)
    denoiser = denoiser_of(pipeline)
    require_torch(denoiser)
    generator = torch.Generator().manual_seed(seed)
    samples = samples or calibration_samples(pipeline)
    latents, conditioning = _latents_and_prompts(pipeline, data, prompts, samples, seed, generator)
    if not (torch.isfinite(latents).all() or is_random(pipeline)):
        raise AsdmError(
            "the latents to calibrate on are no numbers (NaN): the pipeline's weights are damaged, or its precision "
            "overflows; load it in float32"
        )
    latents = latents.to(denoiser.device, denoiser.dtype)
    scales = torch.full((len(latents),), default_guidance(pipeline))
    embedding = family_of(denoiser).guidance_embedding(denoiser, scales)
    conditioning = replace(conditioning, timestep_cond=embedding).to(denoiser.device, denoiser.dtype)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    parameterization = parameterization_of(pipeline.scheduler)
    count = parameterization.num_timesteps
    calls = []
    for index in range(timesteps):
        timestep = int((index + 0.5) * count / timesteps)
        steps = torch.full((len(latents),), timestep, device=latents.device)
        noisy = parameterization.add_noise(latents, noise, steps)
        calls.append(CalibrationCall(timestep, {**conditioning.denoiser_arguments(denoiser, noisy), "timestep": steps}))
    return calls


def relative_error(prediction: Tensor, reference: Tensor, call: CalibrationCall) -> float:
    """Return |prediction - reference|^2 / |reference|^2 in a call; `UNAFFORDABLE` where the prediction overflows.

    Raises:
        AsdmError: `reference` is zero or not finite.
    """
    error = float((prediction.float() - reference.float()).square().sum() / squared_norm(reference, call))
    return error if math.isfinite(error) else UNAFFORDABLE


def squared_norm(prediction: Tensor, call: CalibrationCall) -> Tensor:
    """Return |prediction|^2 in a call, which errors are relative to.

    Raises:
        AsdmError: it is zero or not finite.
    """
    square = prediction.float().square().sum()
    if not 0 < float(square) < math.inf:
        dtype = str(prediction.dtype).removeprefix("torch.")
        raise AsdmError(
            f"the prediction at time step {call.timestep} is not finite, or all zero, in {dtype}: the weights are "
            "damaged, or the precision overflows; use float32 and undamaged weights"
        )
    return square


def calibration_samples(pipeline: DiffusionPipeline) -> int:
    """Return how many samples a calibration call has by default."""
    return 16 if latent_shape(pipeline)[1] <= 32 else 1


def require_calibration(pipeline: DiffusionPipeline, data: str | Path | None) -> None:
    """Raise an AsdmError unless the pipeline can be calibrated on the data; for a check before anything is measured."""
    require_text_to_image(pipeline)
    require_torch(denoiser_of(pipeline))
    if data is not None and is_prepared(data):
        open_prepared(pipeline, data)
    elif data is not None:
        require_usable(data)


def _latents_and_prompts(
    pipeline: DiffusionPipeline,
    data: str | Path | None,
    prompts: Sequence[str] | None,
    samples: int,
    seed: int,
    generator: torch.Generator,
) -> tuple[Tensor, Conditioning]:
    """Return latents (samples, channels, h, w) and their prompts."""
    if data is not None and is_prepared(data):
        prepared = open_prepared(pipeline, data)
        return prepared.batch(random.Random(seed).choices(range(len(prepared)), k=samples))
    examples = [] if data is None else open_data(data).sample(samples, seed)
    images = None
    if examples and examples[0].file is not None:
        examples, pixels = load_pixels(examples, image_size(pipeline), {})
        if not pixels:
            raise AsdmError(f"{data}: none of the images for calibration can be decoded; repair the data")
        conditioning = embed_prompts(pipeline, [example.caption for example in examples])
        images = torch.stack(pixels)
        latents = encode_images(pipeline.vae, images)
    else:
        chosen = [example.caption for example in examples] or list(prompts or DEFAULT_PROMPTS)
        chosen = [chosen[i % len(chosen)] for i in range(samples)]
        conditioning = embed_prompts(pipeline, chosen)
        latents = _own_latents(pipeline, chosen, generator)
    if is_inpainting(pipeline):
        images = decode_latents(pipeline, latents) if images is None else images
        conditioning = replace(conditioning, masked=masked_latents(pipeline, images, generator))
    return latents, conditioning


def _own_latents(pipeline: DiffusionPipeline, prompts: list[str], generator: torch.Generator) -> Tensor:
    """Generate latents from the prompts in ten steps; noise where the pipeline's weights are random."""
    if is_random(pipeline):
        return torch.randn(len(prompts), *latent_shape(pipeline), generator=generator)
    options = {"num_inference_steps": 10, "guidance_scale": default_guidance(pipeline), "output_type": "latent"}
    with faults_in_one_line(pipeline):
        latents: Tensor = pipeline(prompts, generator=generator, **options, **pipeline_arguments(pipeline)).images
    return latents
