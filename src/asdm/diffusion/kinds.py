"""What kind a pipeline is, and pipelines of another kind that share its parts."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
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
TEXT_TO_IMAGE = (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    LatentConsistencyModelPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
INPAINTING = (StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline)
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


def require_text_to_image(pipeline: DiffusionPipeline) -> None:
    """Raise an AsdmError unless the pipeline generates from prompts alone, or inpaints by a denoiser made for that, and
    its denoiser has no other inputs. Families of other packages, and pipelines that diffusers does not bring, say
    themselves what they need."""
    kind = type(pipeline).__name__
    if not type(family_of(pipeline)).__module__.startswith("asdm."):
        return
    if type(pipeline).__module__.startswith("diffusers.") and not isinstance(pipeline, TEXT_TO_IMAGE + INPAINTING):
        raise AsdmError(
            f"a {kind}: has other inputs or another sampling than text-to-image; give asdm.load_pipeline's, or a "
            "StableDiffusionPipeline, StableDiffusionXLPipeline or PixArt's of the same parts"
        )
    require_channels(pipeline)
    if isinstance(pipeline, INPAINTING) and not is_inpainting(pipeline):
        raise AsdmError(f"a {kind} whose denoiser reads no mask; give the pipeline for text-to-image of the same parts")
    family_of(pipeline).require_known_inputs(denoiser_of(pipeline))


def require_channels(pipeline: DiffusionPipeline, name: str = "") -> None:
    """Raise an AsdmError unless the denoiser reads noisy latents alone, or as one for inpainting also a mask, and
    predicts as many channels as latents have.

    Args:
        name: of the model, for the message.
    """
    denoiser, family, before = denoiser_of(pipeline), family_of(pipeline), f"{name}: " if name else ""
    channels, latents = denoiser.config.in_channels, pipeline.vae.config.latent_channels
    if channels != latents and not is_inpainting(pipeline):
        raise AsdmError(
            f"{before}its {family.label} takes {channels} channels, as those for upscaling or edits do; "
            "use a checkpoint for text-to-image or inpainting"
        )
    if family.predicted_channels(denoiser) != latents:
        written = denoiser.config.out_channels
        raise AsdmError(
            f"{before}its {family.label} predicts {written} channels, and its VAE's latents have {latents}; use a "
            "checkpoint whose parts belong together"
        )


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
