"""The speed of several pipelines, measured in turns in one run: denoiser calls, whole images, parameters and MACs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from diffusers import DiffusionPipeline

from asdm.diffusion.generation import generate
from asdm.evaluation.image_timing import IMAGES, ImageJob, ImageTiming, time_images
from asdm.evaluation.results import SpeedMetrics
from asdm.evaluation.sampling import Sampling, sampling_of
from asdm.families import denoiser_call, denoiser_of
from asdm.measure.latency import Timing, measure_interleaved
from asdm.measure.load import LoadMeter
from asdm.measure.macs import counting_macs

DENOISER_ROUNDS = 10
_LONGEST_TIMED_IMAGE_MS = 10_000
_EXTRAPOLATED_STEPS = 2


@dataclass(frozen=True)
class Speed:
    """Each pipeline's speed, and the machine's load while it was measured."""

    rows: list[SpeedMetrics]
    other_cores: float
    contention: float


def measure_speed(
    pipelines: Mapping[str, DiffusionPipeline], *, steps: int, guidance_scale: float, rounds: int | None
) -> Speed:
    """Measure the latency of the denoiser call and of an image, each in interleaved rounds; parameters; MACs.

    Few-step pipelines sample in their own number of steps, without guidance.
    """
    meter = LoadMeter()
    samplings = {name: sampling_of(pipeline, steps, guidance_scale) for name, pipeline in pipelines.items()}
    first = next(iter(pipelines.values()))
    calls = {name: denoiser_call(denoiser_of(pipeline)) for name, pipeline in pipelines.items()}
    denoisers = measure_interleaved(calls, rounds=rounds or DENOISER_ROUNDS, device=first.device)
    slowest = max(latency.ms for latency in denoisers.values())
    too_long = slowest * steps > _LONGEST_TIMED_IMAGE_MS and steps > _EXTRAPOLATED_STEPS
    extrapolated = {name for name, sampling in samplings.items() if too_long and not sampling.is_few_step}
    images = _time_images(pipelines, samplings, extrapolated, denoisers, rounds)
    meter.mark()
    rows = [
        _metrics(name, pipeline, denoisers, images, samplings[name].steps, name in extrapolated)
        for name, pipeline in pipelines.items()
    ]
    return Speed(rows, meter.other_cores(), meter.contention())


def _time_images(
    pipelines: Mapping[str, DiffusionPipeline],
    samplings: Mapping[str, Sampling],
    extrapolated: set[str],
    denoisers: Timing,
    rounds: int | None,
) -> ImageTiming:
    """Time images of all pipelines in turns; of the `extrapolated` ones a few steps."""
    jobs = {}
    for name, pipeline in pipelines.items():
        sampling = samplings[name]
        timed = _EXTRAPOLATED_STEPS if name in extrapolated else sampling.steps
        one_image = partial(generate, pipeline, ["a photograph"], steps=timed, guidance_scale=sampling.guidance_scale)
        jobs[name] = ImageJob(pipeline, one_image, denoiser_calls(pipeline, sampling.steps))
    # The timed calls are of one image with guidance, so their ratios are those of guided samplings alone.
    guided = [name for name, sampling in samplings.items() if sampling.guidance_scale > 1]
    first = next(iter(pipelines))
    ratios = {(first, name): denoisers.speedup(first, name) for name in guided if first in guided}
    return time_images(jobs, rounds=min(IMAGES, rounds or IMAGES), denoiser_ratios=ratios)


def _metrics(
    name: str, pipeline: DiffusionPipeline, denoisers: Timing, images: ImageTiming, steps: int, is_extrapolated: bool
) -> SpeedMetrics:
    """Put one pipeline's results together. The first call in `denoisers` is the teacher's."""
    first, denoiser = next(iter(denoisers)), denoiser_of(pipeline)
    with counting_macs(denoiser) as count:
        denoiser_call(denoiser, batch_size=1)()
    denoiser_ratio, image_ratio = denoisers.speedup(first, name), images.speedup(first, name)
    return SpeedMetrics(
        name=name,
        unet_parameters=sum(p.numel() for p in denoiser.parameters()),
        unet_megabytes=sum(p.numel() * p.element_size() for p in denoiser.parameters()) / 1e6,
        gmacs=count.below() / 1e9,
        gmacs_without_attention=count.below(with_attention=False) / 1e9,
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


def denoiser_calls(pipeline: DiffusionPipeline, steps: int) -> int:
    """Return how often a sampling calls the denoiser: second-order schedulers do it twice in a step."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)
