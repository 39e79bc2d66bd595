"""Images of a request, one after another, with progress by steps; the command line and other interfaces call it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

from asdm import checks
from asdm.caching.features import cache_features
from asdm.diffusion.conditioning import image_size, require_size
from asdm.diffusion.generation import (
    default_guidance,
    default_steps,
    is_few_step,
    is_small,
    pipeline_arguments,
    require_finite,
    require_steps,
    require_strength,
    sample_batch,
    samples_per_call,
)
from asdm.diffusion.guidance import CfgCutoff
from asdm.diffusion.kinds import controlled, image_to_image, is_inpainting, is_random, require_text_to_image
from asdm.errors import AsdmError, one_line
from asdm.families import family_of
from asdm.generation.controlnet import load_controlnet
from asdm.generation.image import GeneratedImage, description
from asdm.generation.lora import with_loras
from asdm.generation.prompts import prompt_arguments, warn_of_lost_text, warn_of_unread_weights
from asdm.generation.request import MOST_IMAGES, GenerationRequest
from asdm.generation.schedulers import scheduler_named
from asdm.images import fitted, to_images
from asdm.measure.latency import synchronise
from asdm.pipelines.derived import with_scheduler


@dataclass(frozen=True)
class GenerationProgress:
    """How far a request is: finished images, and the finished steps of the `batch` of images in work."""

    images: int
    total_images: int
    batch: int
    step: int
    total_steps: int

    @property
    def image_steps(self) -> tuple[int, int]:
        """The finished steps of all images, and how many all images need."""
        return self.images * self.total_steps + self.batch * self.step, self.total_images * self.total_steps


Progress = Callable[[GenerationProgress], Any]
Cancelled = Callable[[], bool]


class _CancelledError(Exception):
    """Sampling was cancelled after a step."""


@checks.arguments(
    pipeline=checks.PIPELINE,
    request=checks.a(GenerationRequest),
    progress=checks.function,
    cancelled=checks.function,
    batch_size=checks.whole(1, MOST_IMAGES),
)
def generate_images(
    pipeline: DiffusionPipeline,
    request: GenerationRequest,
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    batch_size: int | None = None,
) -> Iterator[GeneratedImage]:
    """Generate the images of a request, and yield each when its batch is finished.

    The pipeline is as before when the iterator ends, is closed or raises. With LoRA files or CLIP skip, no other thread
    may use the pipeline meanwhile. An `AsdmWarning` says what of a prompt is lost.

    Args:
        progress: called after each step. What it raises ends the iteration.
        cancelled: called after each step; if it returns true, the iteration ends. The batch in work is lost.
        batch_size: images at a time; by default 32 for latents of up to 32x32, else 1. Of weighted prompts, images of
            one prompt.

    Raises:
        AsdmError: the pipeline does not take what the request has, at once; or images are no numbers (NaN).
    """
    require_for(pipeline, request)
    return _generated(pipeline, request, progress, cancelled, batch_size)


def require_for(pipeline: DiffusionPipeline, request: GenerationRequest) -> None:
    """
    Raises:
        AsdmError: the pipeline does not take what a request has.
    """
    require_text_to_image(pipeline)
    family = family_of(pipeline)
    wanted = {
        "image": request.image,
        "mask": request.mask,
        "lora": request.loras or None,
        "controlnet": request.controlnet,
        "clip_skip": request.clip_skip,
        "weighted": request.weighted or None,
    }
    for name, value in wanted.items():
        if value is not None and name not in family.takes:
            raise AsdmError(f"{name}: a {type(pipeline).__name__} does not take it; leave it out")
    sampler = _with_requested_scheduler(pipeline, request)
    steps, guidance = _steps_and_guidance(pipeline, sampler, request)
    require_steps(sampler, steps)
    if request.image is not None:
        require_strength(request.image_strength, steps)
    for name in ("width", "height"):
        if getattr(request, name) is not None:
            require_size(pipeline, getattr(request, name), name)
    is_guided = samples_per_call(pipeline, guidance) == 2
    if request.cfg_cutoff != 1:
        CfgCutoff(pipeline, request.cfg_cutoff)
        if not is_guided:
            raise AsdmError(f"cfg_cutoff={request.cfg_cutoff}: has no effect, as no step has guidance; leave it out")
    if request.negative and not (is_guided and "negative_prompt" in _call_parameters(pipeline)):
        shown = one_line(request.negative, 40)
        raise AsdmError(f"negative={shown}: has no effect, as this pipeline samples without it; leave it out")


def sides_of(pipeline: DiffusionPipeline, request: GenerationRequest) -> tuple[int, int]:
    """Return width and height of a request's images in pixels."""
    native = image_size(pipeline)
    return request.width or native, request.height or native


def steps_of(pipeline: DiffusionPipeline, request: GenerationRequest) -> int:
    """Return the steps of a request's sampling."""
    return _steps_and_guidance(pipeline, _with_requested_scheduler(pipeline, request), request)[0]


def _with_requested_scheduler(pipeline: DiffusionPipeline, request: GenerationRequest) -> DiffusionPipeline:
    if request.scheduler is None:
        return pipeline
    return with_scheduler(pipeline, scheduler_named(request.scheduler, pipeline.scheduler))


def _steps_and_guidance(
    pipeline: DiffusionPipeline, sampler: DiffusionPipeline, request: GenerationRequest
) -> tuple[int, float]:
    """Return a request's steps and guidance scale. Their defaults are those of a few-step model whatever its sampler,
    else the sampler's."""
    usual = pipeline if is_few_step(pipeline) else sampler
    steps = default_steps(usual) if request.steps is None else request.steps
    return steps, default_guidance(usual) if request.guidance_scale is None else request.guidance_scale


def _call_parameters(pipeline: DiffusionPipeline) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters


def _generated(
    pipeline: DiffusionPipeline,
    request: GenerationRequest,
    progress: Progress | None,
    cancelled: Cancelled | None,
    batch_size: int | None,
) -> Iterator[GeneratedImage]:
    """Yield the images of a request that `require_for` has passed."""
    items, done = request.items(), 0
    batch: list[tuple[str, int]] = []
    batch_size = batch_size or (32 if is_small(pipeline) else 1)
    # Weighted prompts have any length, and padding to another one's would change their images.
    alike = [list(group) for _, group in groupby(items, itemgetter(0))] if request.weighted else [items]
    width, height = sides_of(pipeline, request)

    def after_step(step: int, steps: int) -> None:
        if progress is not None:
            progress(GenerationProgress(done, len(items), len(batch), step, steps))
        if cancelled is not None and cancelled():
            raise _CancelledError

    sampler = _with_requested_scheduler(pipeline, request)
    steps, guidance = _steps_and_guidance(pipeline, sampler, request)
    request = request.model_copy(update={"steps": steps, "guidance_scale": guidance})
    common = {**description(sampler, request), "width": width, "height": height}
    with _prepared(sampler, request) as (target, shared):
        for batch in (group[at : at + batch_size] for group in alike for at in range(0, len(group), batch_size)):
            try:
                images, seconds = _sampled(target, request, batch, shared, after_step)
            except _CancelledError:
                return
            done += len(batch)
            for image, (prompt, seed) in zip(images, batch, strict=True):
                yield GeneratedImage(image, prompt, seed, seconds, {"prompt": prompt, "seed": seed, **common})


@contextmanager
def _prepared(
    pipeline: DiffusionPipeline, request: GenerationRequest
) -> Iterator[tuple[DiffusionPipeline, dict[str, Any]]]:
    """Yield the pipeline that generates a request's images, and the arguments of all its calls but for prompts.

    Args:
        pipeline: with the request's scheduler.
        request: with its steps and guidance scale.
    """
    if not request.weighted:
        warn_of_lost_text(pipeline, [*request.prompts, request.negative])
        warn_of_unread_weights([*request.prompts, request.negative])
    with ExitStack() as stack:
        stack.enter_context(with_loras(pipeline, request.loras))
        if request.cache_speedup is not None or request.cache_schedule is not None:
            settings = {"speedup": request.cache_speedup, "schedule": request.cache_schedule}
            stack.enter_context(cache_features(pipeline, **settings))  # type: ignore[arg-type]
        arguments = {"num_inference_steps": request.steps, "guidance_scale": request.guidance_scale}
        target, inputs = _with_inputs(pipeline, request)
        yield target, {**inputs, **arguments, "output_type": "np"}


def _with_inputs(pipeline: DiffusionPipeline, request: GenerationRequest) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return the pipeline that reads a request's images, and the arguments that hold them."""
    sides = sides_of(pipeline, request)
    fills = is_inpainting(pipeline)
    with_image, with_mask = fills or request.image is not None, fills or request.mask is not None
    arguments = pipeline_arguments(pipeline, sides)
    if request.image is not None:
        arguments |= {"image": fitted(request.image, sides), "strength": request.image_strength}
    if request.mask is not None:
        arguments |= {"mask_image": fitted(request.mask, sides)}
    target = pipeline
    if request.controlnet is not None:
        assert request.control_image is not None
        target = controlled(pipeline, load_controlnet(request.controlnet, pipeline), with_image, with_mask)
        name = "control_image" if with_image else "image"
        arguments |= {name: request.control_image.resize(sides, Image.Resampling.LANCZOS)}
        arguments["controlnet_conditioning_scale"] = 1.0 if request.control_scale is None else request.control_scale
    elif with_image and not fills:
        target = image_to_image(pipeline, with_mask=with_mask)
    parameters = _call_parameters(target)
    arguments |= {name: side for name, side in zip(("width", "height"), sides, strict=True) if name in parameters}
    return target, arguments


def _sampled(
    target: DiffusionPipeline,
    request: GenerationRequest,
    batch: list[tuple[str, int]],
    shared: dict[str, Any],
    after_step: Callable[[int, int], None],
) -> tuple[list[Image.Image], float]:
    """Return the images of one batch, and the seconds that each took."""
    prompts, seeds = [prompt for prompt, _ in batch], [seed for _, seed in batch]
    synchronise(target.device)
    start = time.perf_counter()
    texts = prompt_arguments(target, prompts, request.negative, request.clip_skip, request.weighted)
    known = _call_parameters(target)
    arguments = {name: value for name, value in texts.items() if name in known}
    arguments |= shared | _callbacks(target, request, after_step)
    pixels = sample_batch(target, seeds, arguments)
    seconds = (time.perf_counter() - start) / len(batch)
    if not is_random(target):
        require_finite(pixels, target, shared["guidance_scale"])
    return to_images(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * 2 - 1), seconds


class _StepCallback(PipelineCallback):
    """Calls a function with the number of finished steps and of all."""

    def __init__(self, after_step: Callable[[int, int], None]):
        super().__init__()
        self._after_step = after_step

    @property
    def tensor_inputs(self) -> list[str]:
        return []

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        self._after_step(step_index + 1, pipeline.num_timesteps)
        return callback_kwargs


def _callbacks(
    target: DiffusionPipeline, request: GenerationRequest, after_step: Callable[[int, int], None]
) -> dict[str, Any]:
    """Return the arguments by which a pipeline calls back after each step."""
    if "callback_on_step_end" not in _call_parameters(target):  # PixArt's

        def legacy(step: int, _timestep: Any, _latents: Any) -> None:
            after_step(step + 1, len(target.scheduler.timesteps))

        return {"callback": legacy, "callback_steps": 1}
    callbacks: list[PipelineCallback] = [_StepCallback(after_step)]
    if request.cfg_cutoff != 1:
        callbacks.insert(0, CfgCutoff(target, request.cfg_cutoff))
    return {"callback_on_step_end": MultiPipelineCallbacks(callbacks)}
