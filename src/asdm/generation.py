"""Images from prompts with fixed seeds: the same noise for the same prompt whatever pipeline draws it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from torch import Tensor

from asdm.conditioning import image_size, latent_shape, require_size
from asdm.errors import AsdmError
from asdm.inference.guidance_end import GuidanceEnd
from asdm.pipelines import image_to_image, is_inpainting


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_end: float = 1.0,
    seed: int = 0,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    strength: float = 0.6,
    size: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Images (prompts, 3, height, width) in [-1, 1], on the CPU; with `image`, image-to-image; with `mask`, inpainting.

    Args:
        mask: of the size of `image`, white where something else shall be drawn. A UNet made for inpainting reads it;
            with any other, what it leaves of the image is put back after each step.
        steps: the pipeline's recommended ones by default (`default_steps`).
        guidance_scale: the pipeline's recommended one by default (`default_guidance`).
        guidance_end: part of the steps, in (0, 1], that are guided; the others take half the work (`GuidanceEnd`).
        seed: the n-th prompt's noise is that of seed + n, whatever the batch.
        strength: how far from `image` the result may go, in (0, 1].
        size: side of the images in pixels, by default what the pipeline was made for; with an image, its own counts.
        batch_size: prompts at a time; by default 32 for latents of up to 32x32, else 1.

    Raises:
        AsdmError: `strength` or `guidance_end` is out of range, or `strength` so small that no step would be taken; a
            mask without an image; a size that the VAE cannot draw, or that `image` decides.
    """
    if mask is not None and image is None:
        raise AsdmError("a mask says what of an image shall be drawn anew; give the image too")
    if size is not None and image is not None:
        raise AsdmError(f"size={size}: image-to-image draws at the image's own size; scale the image instead")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    steps = default_steps(pipeline) if steps is None else steps
    if image is not None and not (0 < strength <= 1 and int(steps * strength) >= 1):
        raise AsdmError(
            f"strength={strength:g}: must be in (0, 1] and leave at least one of the {steps} steps; "
            f"raise it to {math.ceil(100 / steps) / 100:g} or more"
        )
    guidance = default_guidance(pipeline) if guidance_scale is None else guidance_scale
    batch_size = batch_size or (32 if _is_small(pipeline) else 1)
    if size is not None:
        require_size(pipeline, size)
    target, extra = pipeline, nothing_to_keep(pipeline, size)
    if image is not None:
        target = pipeline if is_inpainting(pipeline) else image_to_image(pipeline, with_mask=mask is not None)
        extra |= {"image": image, "strength": strength}
    if mask is not None:
        extra |= {"mask_image": mask}
    if guidance_end != 1:
        extra |= {"callback_on_step_end": GuidanceEnd(target, guidance_end)}
    sides = {} if size is None else {"height": size, "width": size}
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        given = {name: [value] * len(batch) if "image" in name else value for name, value in extra.items()}
        result = target(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            **sides,
            **given,
        )
        blacked_out = sum(getattr(result, "nsfw_content_detected", None) or [])
        if blacked_out:
            warnings.warn(f"the safety checker blacked out {blacked_out} of {len(batch)} images", stacklevel=3)
        images.append(torch.from_numpy(np.asarray(result.images)).permute(0, 3, 1, 2).float() * 2 - 1)
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return torch.cat(images)


def nothing_to_keep(pipeline: DiffusionPipeline, size: int | None = None) -> dict[str, Any]:
    """What a pipeline made for inpainting needs to draw from text alone, at this size; nothing for all others."""
    if not is_inpainting(pipeline):
        return {}
    sides = (size or image_size(pipeline),) * 2
    return {"image": Image.new("RGB", sides, "gray"), "mask_image": Image.new("L", sides, 255), "strength": 1.0}


def is_few_step(pipeline: DiffusionPipeline) -> bool:
    """Whether it is a consistency model, which its scheduler tells."""
    return isinstance(pipeline.scheduler, LCMScheduler)


def default_steps(pipeline: DiffusionPipeline) -> int:
    """25, or 4 for a few-step pipeline."""
    return 4 if is_few_step(pipeline) else 25


def default_guidance(pipeline: DiffusionPipeline) -> float:
    """Stable Diffusion's usual 7.5; 3 for small latents, whose details a stronger one burns out; 1, none, for few-step
    UNets that have it baked in."""
    if is_few_step(pipeline) and pipeline.unet.config.time_cond_proj_dim is None:
        return 1.0
    return 3.0 if _is_small(pipeline) else 7.5


def _is_small(pipeline: DiffusionPipeline) -> bool:
    return max(latent_shape(pipeline)[1:]) <= 32
