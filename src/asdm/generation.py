"""Images from prompts with fixed seeds: the same noise for the same prompt whatever pipeline draws it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from asdm.errors import AsdmError
from asdm.pipelines import image_to_image


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 25,
    guidance_scale: float | None = None,
    seed: int = 0,
    image: Image.Image | None = None,
    strength: float = 0.6,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Images (prompts, 3, height, width) in [-1, 1], on the CPU; with `image`, image-to-image.

    Args:
        guidance_scale: the pipeline's recommended one by default (`default_guidance`).
        seed: the n-th prompt's noise is that of seed + n, whatever the batch.
        strength: how far from `image` the result may go, in (0, 1].
        batch_size: prompts at a time; by default 32 at small sizes and 1 at 512 pixels or more.

    Raises:
        AsdmError: `strength` is out of range, or so small that no step would be taken.
    """
    if image is not None and not (0 < strength <= 1 and int(steps * strength) >= 1):
        raise AsdmError(
            f"strength={strength:g}: must be in (0, 1] and leave at least one of the {steps} steps; "
            f"raise it to {1 / steps:.2f} or more"
        )
    guidance = default_guidance(pipeline) if guidance_scale is None else guidance_scale
    small = pipeline.unet.config.sample_size <= 32
    batch_size = batch_size or (32 if small else 1)
    target = image_to_image(pipeline) if image is not None else pipeline
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        extra = {} if image is None else {"image": [image] * len(batch), "strength": strength}
        result = target(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
            **extra,
        ).images
        images.append(torch.from_numpy(np.asarray(result)).permute(0, 3, 1, 2).float() * 2 - 1)
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return torch.cat(images)


def default_guidance(pipeline: DiffusionPipeline) -> float:
    """Stable Diffusion's usual 7.5; 3 for small latents, whose details a stronger one burns out."""
    return 3.0 if pipeline.unet.config.sample_size <= 32 else 7.5
