"""The work of sampling images, of encoding data, and of making calibration calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from asdm.data.preparation import BATCH_SIZE, STEPS
from asdm.data.prepared import is_prepared
from asdm.data.sources import count_of_examples, open_data
from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.generation import default_guidance, is_small, samples_per_call
from asdm.diffusion.kinds import is_inpainting, is_random
from asdm.estimates.work import Network, Work, calls, total
from asdm.evaluation.sampling import EvaluationSet
from asdm.evaluation.speed import denoiser_calls
from asdm.evaluation.starting_images import ImageToImageSet

OWN_STEPS = 10  # in which the calibration samples latents where it has no data
SMALL_BATCH = 32  # images that are sampled together where they are small


def sampling(
    pipeline: DiffusionPipeline,
    images: int,
    steps: int,
    guidance_scale: float,
    *,
    at_once: int | None = None,
    strength: float = 1.0,
    network: Network = "teacher",
) -> Work:
    """Return the denoiser calls that images take.

    Args:
        at_once: images in a call; by default as many as `generate` has.
    """
    at_once = at_once or (SMALL_BATCH if is_small(pipeline) else 1)
    each, samples = denoiser_calls(pipeline, steps, strength), samples_per_call(pipeline, guidance_scale)
    batches = [min(at_once, images - start) for start in range(0, images, at_once)]
    return total(calls(each, samples * batch, network) for batch in batches)


def judged_images(
    pipeline: DiffusionPipeline,
    sets: Sequence[EvaluationSet],
    starts: Sequence[ImageToImageSet],
    steps: int,
    guidance_scale: float,
    *,
    strength: float,
    network: Network = "teacher",
) -> Work:
    """Return the work of one pipeline's images in an evaluation: from prompts, and from images."""
    work = Work()
    for each in sets:
        count = len(each.prompts)
        work += sampling(pipeline, count, steps, guidance_scale, network=network) + Work(decodes=count)
    for start in starts:
        count = len(start.sources)
        from_images = sampling(pipeline, count, steps, guidance_scale, strength=strength, network=network)
        work += from_images + Work(encodes=count, decodes=count)
    return work


def preparation(pipeline: DiffusionPipeline, data: str | Path) -> Work:
    """Return the work of preparing data for a training: its images are encoded, or generated from captions alone."""
    if is_prepared(data):
        return Work()
    count, has_images = count_of_examples(data)
    passes = 2 if is_inpainting(pipeline) else 1
    if has_images:
        return Work(encodes=passes * count)
    guidance = default_guidance(pipeline)
    generated = sampling(pipeline, count, STEPS, guidance, at_once=BATCH_SIZE)
    return generated + Work(encodes=count, decodes=count) if is_inpainting(pipeline) else generated


def calibration(pipeline: DiffusionPipeline, data: str | Path | None, samples: int) -> Work:
    """Return the work of making latents to calibrate on."""
    if data is not None and is_prepared(data):
        return Work()
    masks = Work(encodes=samples) if is_inpainting(pipeline) else Work()
    if data is not None and open_data(data).examples[0].file is not None:
        return Work(encodes=samples) + masks
    if masks.encodes:
        masks += Work(decodes=samples)
    if is_random(pipeline):
        return masks
    return masks + sampling(pipeline, samples, OWN_STEPS, default_guidance(pipeline), at_once=samples)


def calibration_timesteps(pipeline: DiffusionPipeline) -> int:
    """Return at how many time steps an analysis calibrates by default."""
    return 2 if latent_shape(pipeline)[1] > 32 else 4
