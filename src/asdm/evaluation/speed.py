"""The speed of several pipelines, measured in turns in one run: denoiser calls, whole images, parameters and MACs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm.diffusion.conditioning import encode_images, image_size
from asdm.diffusion.generation import generate, samples_per_call
from asdm.evaluation.image_timing import IMAGES, ImageJob, ImageTiming, encoder_key, time_images
from asdm.evaluation.results import SpeedMetrics
from asdm.evaluation.sampling import Sampling, sampling_of
from asdm.families import denoiser_call, denoiser_of, macs_of_call
from asdm.measure.latency import Timing, measure_interleaved
from asdm.measure.load import LoadMeter

DENOISER_ROUNDS = 10
LONGEST_TIMED_IMAGE_MS = 10_000
EXTRAPOLATED_STEPS = 2


@dataclass(frozen=True)
class Speed:
    """Each pipeline's speed, and the machine's load while it was measured."""

    rows: list[SpeedMetrics]
    other_cores: float
    contention: float


def measure_speed(
    pipelines: Mapping[str, DiffusionPipeline],
    *,
    steps: int,
    guidance_scale: float,
    rounds: int | None,
    strength: float | None = None,
) -> Speed:
    """Measure the latency of the denoiser call and of an image, each in interleaved rounds; parameters; MACs.

    Few-step pipelines sample in their own number of steps, without guidance.

    Args:
        strength: of image-to-image; None where it is not timed. The only part of such an image that is timed for it is
            the VAE's encoder. The others are those of an image from text.
    """
    meter = LoadMeter()
    samplings = {name: sampling_of(pipeline, steps, guidance_scale) for name, pipeline in pipelines.items()}
    first = next(iter(pipelines.values()))
    calls = {name: denoiser_call(denoiser_of(pipeline)) for name, pipeline in pipelines.items()}
    denoisers = measure_interleaved(calls, rounds=rounds or DENOISER_ROUNDS, device=first.device)
    slowest = max(latency.ms for latency in denoisers.values())
    too_long = slowest * steps > LONGEST_TIMED_IMAGE_MS and steps > EXTRAPOLATED_STEPS
    extrapolated = {name for name, sampling in samplings.items() if too_long and not sampling.is_few_step}
    images = _time_images(pipelines, samplings, extrapolated, denoisers, rounds, with_encoder=strength is not None)
    meter.mark()
    rows = [
        _metrics(name, pipeline, denoisers, images, samplings[name].steps, name in extrapolated)
        for name, pipeline in pipelines.items()
    ]
    if strength is not None:
        counts = {name: denoiser_calls(each, samplings[name].steps, strength) for name, each in pipelines.items()}
        from_images = images.from_images(counts, {name: encoder_key(each) for name, each in pipelines.items()})
        rows = [row.model_copy(update=_image_to_image(row.name, from_images)) for row in rows]
    return Speed(rows, meter.other_cores(), meter.contention())


def _time_images(
    pipelines: Mapping[str, DiffusionPipeline],
    samplings: Mapping[str, Sampling],
    extrapolated: set[str],
    denoisers: Timing,
    rounds: int | None,
    with_encoder: bool,
) -> ImageTiming:
    """Time images of all pipelines in turns; of the `extrapolated` ones a few steps."""
    jobs = {}
    for name, pipeline in pipelines.items():
        sampling = samplings[name]
        timed = EXTRAPOLATED_STEPS if name in extrapolated else sampling.steps
        one_image = partial(generate, pipeline, ["a photograph"], steps=timed, guidance_scale=sampling.guidance_scale)
        encode = partial(encode_images, pipeline.vae, _blank_image(pipeline)) if with_encoder else None
        jobs[name] = ImageJob(pipeline, one_image, denoiser_calls(pipeline, sampling.steps), encode=encode)
    # The timed calls are of one image with guidance, so their ratios are those of samplings with as many samples alone.
    guided = [name for name, each in samplings.items() if samples_per_call(pipelines[name], each.guidance_scale) == 2]
    first = next(iter(pipelines))
    ratios = {(first, name): denoisers.speedup(first, name) for name in guided if first in guided}
    return time_images(jobs, rounds=min(IMAGES, rounds or IMAGES), denoiser_ratios=ratios)


def _metrics(
    name: str, pipeline: DiffusionPipeline, denoisers: Timing, images: ImageTiming, steps: int, is_extrapolated: bool
) -> SpeedMetrics:
    """Put one pipeline's results together. The first call in `denoisers` is the teacher's."""
    first, denoiser = next(iter(denoisers)), denoiser_of(pipeline)
    count = macs_of_call(denoiser)
    denoiser_ratio, image_ratio = denoisers.speedup(first, name), images.speedup(first, name)
    return SpeedMetrics(
        name=name,
        unet_parameters=sum(p.numel() for p in denoiser.parameters()) or None,
        unet_megabytes=weight_megabytes(denoiser),
        gmacs=count.below() / 1e9 or None,
        gmacs_without_attention=count.below(with_attention=False) / 1e9 or None,
        unet=denoisers[name],
        unet_speedup=denoiser_ratio.value,
        unet_speedup_interval=denoiser_ratio.interval,
        pipeline=images.latency(name),
        pipeline_speedup=image_ratio.value,
        pipeline_speedup_interval=image_ratio.interval,
        pipeline_parts_ms=images.by_part(name),
        pipeline_extrapolated=is_extrapolated,
        steps=steps,
    )


def weight_megabytes(denoiser: nn.Module) -> float:
    """Return the size of a denoiser's weights. A graph of another runtime says it itself: it has no parameters."""
    own = sum(p.numel() * p.element_size() for p in denoiser.parameters()) / 1e6
    return float(getattr(denoiser, "megabytes", own))


def _image_to_image(name: str, images: ImageTiming) -> dict[str, Any]:
    """Return the fields of `SpeedMetrics` about images that start from an image."""
    ratio = images.speedup(next(iter(images.parts)), name)
    return {
        "image_to_image": images.latency(name),
        "image_to_image_speedup": ratio.value,
        "image_to_image_speedup_interval": ratio.interval,
    }


def _blank_image(pipeline: DiffusionPipeline) -> Tensor:
    side = image_size(pipeline)
    return torch.zeros(1, 3, side, side)


def denoiser_calls(pipeline: DiffusionPipeline, steps: int, strength: float = 1.0) -> int:
    """Return how often a sampling calls the denoiser: second-order schedulers do it twice in a step. From an image it
    skips the first steps."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    skipped = steps - int(steps * strength)
    return len(scheduler.timesteps) - skipped * getattr(scheduler, "order", 1)
