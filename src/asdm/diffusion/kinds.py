"""What kind a pipeline is, and pipelines of another kind that share its parts."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of

# By whether they start from an image, and whether a mask says what of it is replaced.
_WITH_CONTROLNET: dict[tuple[bool, bool], tuple[Any, Any]] = {
    (False, False): (StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline),
    (True, False): (StableDiffusionControlNetImg2ImgPipeline, StableDiffusionXLControlNetImg2ImgPipeline),
    (True, True): (StableDiffusionControlNetInpaintPipeline, StableDiffusionXLControlNetInpaintPipeline),
}
RANDOM = "random:"  # how names of pipelines with random weights begin


def is_sdxl(pipeline: DiffusionPipeline) -> bool:
    """Return whether it is an SDXL pipeline."""
    return hasattr(pipeline, "text_encoder_2")


def is_random(pipeline: DiffusionPipeline) -> bool:
    """Return whether its weights are random: good for measurements of speed and memory only."""
    return str(pipeline.config.get("_name_or_path")).startswith(RANDOM)


def is_inpainting(pipeline: DiffusionPipeline) -> bool:
    """Return whether its denoiser also reads a mask and the latents of a masked image."""
    return denoiser_of(pipeline).config.in_channels == 2 * pipeline.vae.config.latent_channels + 1


def image_to_image(pipeline: DiffusionPipeline, with_mask: bool = False) -> DiffusionPipeline:
    """Return the pipeline for image-to-image, or for inpainting, that shares this pipeline's parts.

    `from_pipe` does not serve: it leaves out a component whose class is a subclass of the one expected.

    Raises:
        AsdmError: diffusers has none for this architecture.
    """
    require_image_to_image(pipeline)
    if with_mask:
        kind = StableDiffusionXLInpaintPipeline if is_sdxl(pipeline) else StableDiffusionInpaintPipeline
    else:
        kind = StableDiffusionXLImg2ImgPipeline if is_sdxl(pipeline) else StableDiffusionImg2ImgPipeline
    other = kind(**pipeline.components, **extra_arguments(pipeline))
    other.set_progress_bar_config(disable=True)
    return other


def require_image_to_image(pipeline: DiffusionPipeline) -> None:
    """
    Raises:
        AsdmError: diffusers has no image-to-image for the pipeline's architecture.
    """
    if "image" not in family_of(pipeline).takes:
        raise AsdmError(
            f"{type(pipeline).__name__}: diffusers has no image-to-image for this architecture; start from text alone"
        )


def controlled(
    pipeline: DiffusionPipeline, controlnet: Any, with_image: bool = False, with_mask: bool = False
) -> DiffusionPipeline:
    """Return the pipeline with a ControlNet that shares this pipeline's parts."""
    kind = _WITH_CONTROLNET[with_image, with_mask][is_sdxl(pipeline)]
    other = kind(**pipeline.components, controlnet=controlnet, **extra_arguments(pipeline, kind))
    other.set_progress_bar_config(disable=True)
    return other


def text_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline for text-to-image that shares this pipeline's parts."""
    kind = StableDiffusionXLPipeline if is_sdxl(pipeline) else StableDiffusionPipeline
    return kind(**pipeline.components, **extra_arguments(pipeline, kind))


def extra_arguments(pipeline: DiffusionPipeline, kind: Any = None) -> dict[str, Any]:
    """Return the arguments of its class that are no components, as its config has them; of SDXL's, whether its images
    get a watermark.

    Args:
        kind: another class, to which those are limited that it has, too.
    """
    allowed = ["requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score"]
    found = {name: pipeline.config[name] for name in allowed if name in pipeline.config}
    if hasattr(pipeline, "watermark"):
        found["add_watermarker"] = pipeline.watermark is not None
    if kind is None:
        return found
    taken = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in found.items() if name in taken}
