"""A student's images beside the teacher's, from the same noise."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from asdm import checks
from asdm.diffusion.conditioning import decode_latents, latent_shape
from asdm.errors import AsdmError
from asdm.families import denoiser_call, denoiser_of
from asdm.generation.generate import Cancelled, GenerationProgress, Progress, generate_images, require_for, sides_of
from asdm.generation.image import GeneratedImage
from asdm.generation.request import GenerationRequest
from asdm.generation.sheets import FULL_DIFFERENCE, Tile, difference_map, sheets
from asdm.measure.latency import synchronise


@dataclass(frozen=True)
class Comparison:
    """A teacher's and a student's image of one prompt and seed."""

    teacher: GeneratedImage
    student: GeneratedImage

    @property
    def speedup(self) -> float:
        """How many times faster the student's image was; of single images, each timed once."""
        return self.teacher.seconds / self.student.seconds

    def tiles(self) -> list[Tile]:
        """Return both images and the map of their difference, with labels."""
        difference, mean = difference_map(self.teacher.image, self.student.image)
        names = [each.about.get("model", "") for each in (self.teacher, self.student)]
        of_teacher = (f"teacher {self.teacher.seconds:.2f} s", names[0], self.student.prompt)
        of_student = (
            f"student {self.student.seconds:.2f} s, {self.speedup:.2f}x",
            names[1],
            f"seed {self.student.seed}",
        )
        return [
            Tile(self.teacher.image, of_teacher),
            Tile(self.student.image, of_student),
            Tile(difference, (f"difference {mean:.1f} of 255", f"brightest from {FULL_DIFFERENCE} on")),
        ]

    def picture(self) -> Image.Image:
        """Return both images beside each other, with the map of their difference and both times."""
        (page,) = sheets(self.tiles(), columns=3)
        return page


@checks.arguments(
    pipeline=checks.PIPELINE,
    teacher=checks.PIPELINE,
    request=checks.a(GenerationRequest),
    progress=checks.function,
    cancelled=checks.function,
)
def compare_images(
    pipeline: DiffusionPipeline,
    teacher: DiffusionPipeline,
    request: GenerationRequest,
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> Iterator[Comparison]:
    """Generate each image of a request by a student and by its teacher, from the same noise, and time both.

    The teacher has the same prompts, size, scheduler and additions, but neither feature caching nor `cfg_cutoff`. Steps
    and guidance that the request leaves open are each pipeline's usual ones. Before its first image each pipeline is
    called once, untimed. Of pipelines that share modules, the teacher generates all its images first, and memory holds
    them; others take turns.

    Args:
        pipeline: of the student, or any other one that is compared.
        progress: called after each step of either.
        cancelled: as `generate_images` takes it.

    Raises:
        AsdmError: as `generate_images`, for both; or their latents differ, so that no noise is the same for both.
    """
    shapes = [(latent_shape(each)[0], each.vae_scale_factor) for each in (teacher, pipeline)]
    if shapes[0] != shapes[1]:
        raise AsdmError(
            f"teacher: its latents have {shapes[0][0]} channels and 1/{shapes[0][1]} of an image's side, the student's "
            f"{shapes[1][0]} and 1/{shapes[1][1]}; name the model that it was pruned from"
        )
    width, height = sides_of(pipeline, request)
    request = request.changed(width=width, height=height)
    of_teacher = request.changed(cfg_cutoff=1.0, cache_speedup=None, cache_schedule=None)
    require_for(pipeline, request)
    require_for(teacher, of_teacher)
    return _compared((teacher, of_teacher), (pipeline, request), progress, cancelled)


def _compared(
    teacher: tuple[DiffusionPipeline, GenerationRequest],
    student: tuple[DiffusionPipeline, GenerationRequest],
    progress: Progress | None,
    cancelled: Cancelled | None,
) -> Iterator[Comparison]:
    """Yield the comparisons. Each image is generated alone, so that its time is its own."""
    total, done = student[1].total, 0

    def images(pipeline: DiffusionPipeline, request: GenerationRequest) -> Generator[GeneratedImage, None, None]:
        nonlocal done

        def after_step(now: GenerationProgress) -> None:
            if progress is not None:
                progress(replace(now, images=done, total_images=2 * total))

        _warm_up(pipeline)
        for image in generate_images(pipeline, request, progress=after_step, cancelled=cancelled, batch_size=1):
            done += 1
            yield image

    with closing(images(*teacher)) as of_teacher, closing(images(*student)) as of_student:
        first: Iterable[GeneratedImage] = of_teacher
        if _share_modules(teacher[0], student[0]):  # which hold the LoRA or the caching of one request at a time
            first = list(of_teacher)
            if len(first) < total:  # it was cancelled
                return
        for one, other in zip(first, of_student, strict=False):
            yield Comparison(one, other)


def _share_modules(one: DiffusionPipeline, other: DiffusionPipeline) -> bool:
    return not _modules(one).isdisjoint(_modules(other))


def _modules(pipeline: DiffusionPipeline) -> set[torch.nn.Module]:
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return {module for part in parts for module in part.modules()}


@torch.no_grad()
def _warm_up(pipeline: DiffusionPipeline) -> None:
    """Let a pipeline's denoiser and decoder allocate what they need."""
    denoiser_call(denoiser_of(pipeline))()
    channels, height, width = latent_shape(pipeline)
    decode_latents(pipeline, torch.zeros(1, channels, height, width))
    synchronise(pipeline.device)
