"""Images from prompts with fixed seeds: the same noise for the same prompt, whatever the pipeline."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from torch import Tensor

from asdm import checks
from asdm.diffusion.conditioning import (
    LARGEST_IMAGE,
    PIPELINES_MULTIPLE,
    image_size,
    latent_shape,
    require_size,
    size_multiple,
)
from asdm.diffusion.guidance import CFG_CUTOFF, CfgCutoff
from asdm.diffusion.kinds import image_to_image, is_inpainting, is_random, require_text_to_image
from asdm.errors import AsdmError, one_line
from asdm.families import denoiser_of, family_of
from asdm.images import as_mask, in_rgb


@checks.arguments(
    pipeline=checks.PIPELINE,
    prompts=checks.any_of(checks.text, checks.each(checks.text, 1, "a text or a list of texts")),
    guidance_scale=checks.GUIDANCE,
    cfg_cutoff=CFG_CUTOFF,
    seed=checks.IMAGE_SEED,
    image=checks.any_of(checks.each(checks.a(Image.Image), 1), checks.a(Image.Image)),
    mask=checks.a(Image.Image),
    strength=checks.number(above=0, high=1),
    batch_size=checks.whole(),
    progress=checks.function,
)
@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    cfg_cutoff: float = 1.0,
    seed: int = 0,
    image: Image.Image | Sequence[Image.Image] | None = None,
    mask: Image.Image | None = None,
    strength: float = 0.6,
    size: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generate images (prompts, 3, height, width) in [-1, 1], on the CPU; with `image`, image-to-image; with `mask`,
    inpainting.

    Args:
        image: where to start from: one image for all prompts, or one for each prompt, all of one size. Its EXIF turns
            it, as the mask's does.
        mask: of the size of `image`, white where it is replaced. A denoiser made for inpainting reads it; with any
            other, the rest of the image is restored after each step.
        steps: by default 25, and 4 for few-step pipelines; at most as many as the scheduler has time steps.
        guidance_scale: by default 7.5 for Stable Diffusion, 4.5 for PixArt, 3 for latents of up to 32x32, and 1 (no
            guidance) for few-step pipelines.
        cfg_cutoff: part of the steps, in (0, 1], that are guided; the others take half the work (`CfgCutoff`).
        seed: the n-th prompt's noise is that of seed + n, whatever the batch; the last one is at most 2**32 - 1.
        strength: how far from `image` the result may go, in (0, 1].
        size: side of the images in pixels, by default the pipeline's native one; with an image, its size counts.
        batch_size: prompts at a time; by default 32 for latents of up to 32x32, else 1.
        progress: called with images done and in all, after each batch.

    Raises:
        AsdmError: an argument is out of range: `steps` more than the scheduler has, `strength` so small that no step
            would be taken, a size that the pipeline cannot generate, or that `image` decides; a mask without an image,
            or of another size; not as many images as prompts; an image for a pipeline without image-to-image; or the
            generated images are no numbers (NaN).
    """
    require_text_to_image(pipeline)
    if mask is not None and image is None:
        raise AsdmError("a mask says what of an image is replaced; give the image too")
    if size is not None and image is not None:
        raise AsdmError(f"size={size}: image-to-image generates at the image's own size; scale the image instead")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    require_seeds(seed, len(prompts))
    if image is not None:
        image = in_rgb(image) if isinstance(image, Image.Image) else [in_rgb(each) for each in image]
        mask = None if mask is None else as_mask(mask)
        _require_images(image, mask, len(prompts))
    steps = default_steps(pipeline) if steps is None else steps
    require_steps(pipeline, steps)
    if image is not None:
        require_strength(strength, steps)
    if size is not None:
        require_size(pipeline, size)
    guidance = default_guidance(pipeline) if guidance_scale is None else guidance_scale
    batch_size = batch_size or (32 if is_small(pipeline) else 1)
    target, arguments = _target(pipeline, image, mask, strength, size)
    if cfg_cutoff != 1:
        arguments |= {"callback_on_step_end": CfgCutoff(target, cfg_cutoff)}
    arguments |= {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        seeds = range(seed + start, seed + start + len(batch))
        pixels = sample_batch(target, seeds, {**_of_batch(arguments, start, len(batch)), "prompt": batch})
        if not is_random(pipeline):
            require_finite(pixels, pipeline, guidance)
        images.append(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * 2 - 1)
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return torch.cat(images)


def _target(
    pipeline: DiffusionPipeline,
    image: Image.Image | Sequence[Image.Image] | None,
    mask: Image.Image | None,
    strength: float,
    size: int | None,
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """Return the pipeline that reads these inputs, and the arguments that hold them."""
    sides = None if size is None else (size, size)
    arguments = pipeline_arguments(pipeline, sides)
    if sides is not None:
        arguments |= {"height": size, "width": size}
    if image is None:
        return pipeline, arguments
    fills = is_inpainting(pipeline)
    target = pipeline if fills else image_to_image(pipeline, with_mask=mask is not None)
    arguments |= {"image": image, "strength": strength}
    if mask is not None:
        arguments |= {"mask_image": mask}
    if fills or mask is not None:  # other pipelines take the image's size by themselves
        width, height = (image if isinstance(image, Image.Image) else image[0]).size
        multiple = size_multiple(pipeline)
        arguments |= {"width": width // multiple * multiple, "height": height // multiple * multiple}
    return target, arguments


def _of_batch(arguments: dict[str, Any], start: int, count: int) -> dict[str, Any]:
    """Return the arguments of a batch, which has its own part of a list of images."""
    images = arguments.get("image")
    return arguments | {"image": images[start : start + count]} if isinstance(images, list) else arguments


def sample_batch(pipeline: DiffusionPipeline, seeds: Sequence[int], arguments: Mapping[str, Any]) -> np.ndarray:
    """Return images (seeds, height, width, 3) in [0, 1], the n-th from the noise of the n-th seed.

    Args:
        arguments: of the pipeline's call. Images are repeated for all seeds.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {
        name: [value] * len(seeds) if isinstance(value, Image.Image) else value for name, value in arguments.items()
    }
    with faults_in_one_line(pipeline):
        result = pipeline(generator=generators, **given)
    blacked_out = sum(getattr(result, "nsfw_content_detected", None) or [])
    if blacked_out:
        warnings.warn(f"the safety checker blacked out {blacked_out} of {len(seeds)} images", stacklevel=4)
    return np.asarray(result.images)


@contextmanager
def faults_in_one_line(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Turn what a pipeline refuses into our error."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, AsdmError):
            raise
        raise AsdmError(f"{type(pipeline).__name__} refuses this: {one_line(error, 300)}") from error


def _require_images(image: Image.Image | Sequence[Image.Image], mask: Image.Image | None, prompts: int) -> None:
    images = [image] if isinstance(image, Image.Image) else image
    if not isinstance(image, Image.Image) and len(images) != prompts:
        raise AsdmError(f"{len(images)} images for {prompts} prompts: give one for each, or one for all")
    if len({each.size for each in images}) > 1:
        raise AsdmError("the images have different sizes; scale them to one")
    require_image(images[0], mask)


def require_image(image: Image.Image, mask: Image.Image | None) -> None:
    """
    Raises:
        AsdmError: the image is too small or too large, or the mask has another size.
    """
    if mask is not None and mask.size != image.size:
        raise AsdmError(f"the mask has {mask.size} pixels, the image {image.size}; give both in one size")
    if min(image.size) < PIPELINES_MULTIPLE or max(image.size) > LARGEST_IMAGE:
        raise AsdmError(
            f"an image of {image.size} pixels: its sides must be from {PIPELINES_MULTIPLE} to {LARGEST_IMAGE}; scale it"
        )


def require_seeds(seed: int, images: int) -> None:
    """
    Raises:
        AsdmError: the last of so many images would have a seed that torch's CPU generator does not tell from another.
    """
    if seed + images - 1 > checks.LARGEST_SEED:
        raise AsdmError(
            f"seed={seed}: the last of {images} images must have at most {checks.LARGEST_SEED}; "
            f"give {checks.LARGEST_SEED - images + 1} at most"
        )


def require_strength(strength: float, steps: int) -> None:
    """
    Raises:
        AsdmError: image-to-image of this strength would take none of so many steps.
    """
    if int(steps * strength) < 1:
        raise AsdmError(
            f"strength={strength:g}: must leave at least one of the {steps} steps; "
            f"raise it to {math.ceil(100 / steps) / 100:g} or more"
        )


def require_finite(images: np.ndarray, pipeline: DiffusionPipeline, guidance: float) -> None:
    """Raise an AsdmError for images (count, height, width, 3) that would be saved as black ones."""
    broken = int((~np.isfinite(images)).reshape(len(images), -1).any(axis=1).sum())
    if broken:
        dtype = str(denoiser_of(pipeline).dtype).removeprefix("torch.")
        raise AsdmError(
            f"{broken} of {len(images)} images are no numbers (NaN): the weights are damaged, the guidance scale "
            f"{guidance:g} is too strong, or {dtype} overflows; try float32 and the default guidance"
        )


def most_steps(pipeline: DiffusionPipeline) -> int:
    """Return the most sampling steps that the scheduler can take; for a consistency model, those of its solver."""
    config = pipeline.scheduler.config
    # from_config carries fields of other classes along.
    own = inspect.signature(type(pipeline.scheduler).__init__).parameters
    limits = [name for name in ("num_train_timesteps", "original_inference_steps") if name in own]
    return min((config.get(name) or 1000 for name in limits), default=1000)


def require_steps(pipeline: DiffusionPipeline, steps: int) -> None:
    """
    Raises:
        AsdmError: the pipeline's scheduler cannot sample in so many steps.
    """
    checks.STEPS("steps", steps)
    kind, most = type(pipeline.scheduler).__name__, most_steps(pipeline)
    if steps > most:
        raise AsdmError(f"steps={steps}: this pipeline's {kind} has {most}; give as many at most")
    try:
        copy.deepcopy(pipeline.scheduler).set_timesteps(steps)
    except (ValueError, ArithmeticError, IndexError, RuntimeError) as error:
        raise AsdmError(f"steps={steps}: {kind} refuses it ({one_line(error)}); give another number") from None


def pipeline_arguments(pipeline: DiffusionPipeline, sides: tuple[int, int] | None = None) -> dict[str, Any]:
    """Arguments that this kind of pipeline needs to generate from text alone, at this width and height: for one made
    for inpainting, an image and a mask; and those of the denoiser's family."""
    arguments = family_of(pipeline).sampling_arguments()
    if is_inpainting(pipeline):
        sides = sides or (image_size(pipeline),) * 2
        images = {"image": Image.new("RGB", sides, "gray"), "mask_image": Image.new("L", sides, 255)}
        arguments |= {**images, "strength": 1.0}
    return arguments


def is_few_step(pipeline: DiffusionPipeline) -> bool:
    """Return whether it is a consistency model, by its scheduler."""
    return isinstance(pipeline.scheduler, LCMScheduler)


def default_steps(pipeline: DiffusionPipeline) -> int:
    """25, or 4 for a few-step pipeline."""
    return min(4 if is_few_step(pipeline) else 25, most_steps(pipeline))


def default_guidance(pipeline: DiffusionPipeline) -> float:
    """Return the family's usual scale, 7.5 for Stable Diffusion; 3 for small latents, whose details a larger one
    burns out; 1, none, for few-step denoisers with built-in guidance."""
    if is_few_step(pipeline) and not family_of(pipeline).embeds_guidance(denoiser_of(pipeline)):
        return 1.0
    return 3.0 if is_small(pipeline) else family_of(pipeline).guidance_scale


def samples_per_call(pipeline: DiffusionPipeline, guidance_scale: float) -> int:
    """Return how many samples a denoiser call has for each image: two with guidance, unless the denoiser
    embeds it."""
    denoiser = denoiser_of(pipeline)
    return 2 if guidance_scale > 1 and not family_of(denoiser).embeds_guidance(denoiser) else 1


def is_small(pipeline: DiffusionPipeline) -> bool:
    """Return whether its latents have at most 32x32 pixels."""
    return max(latent_shape(pipeline)[1:]) <= 32
