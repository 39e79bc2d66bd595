"""Which pipelines this package works on, and in which of diffusers' classes it takes them."""

from __future__ import annotations

from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from asdm.diffusion.kinds import image_to_image, is_inpainting, is_sdxl, text_to_image
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of

_FROM_IMAGES = (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
_SUPPORTED = (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    LatentConsistencyModelPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    *_FROM_IMAGES,
)


def require_supported(pipeline: DiffusionPipeline, name: str) -> None:
    """Raise an AsdmError unless the pipeline is for text-to-image or inpainting, and its denoiser needs no inputs but
    those that prompts and masks give.

    Args:
        name: of the model, for the message.
    """
    if not isinstance(pipeline, _SUPPORTED):
        raise AsdmError(
            f"{name}: a {type(pipeline).__name__}; use SD 1.x, 2.x, SDXL or PixArt, for text-to-image or inpainting"
        )
    denoiser, family = denoiser_of(pipeline), family_of(pipeline)
    config, label = denoiser.config, family.label
    if pipeline.text_encoder is None:
        raise AsdmError(f"{name}: has no first text encoder, as SDXL's refiner; use a base model")
    if config.sample_size is None:
        raise AsdmError(
            f"{name}: its {label} does not say for which size it is; write sample_size into "
            f"{family.component}/config.json"
        )
    channels = config.in_channels
    if channels != pipeline.vae.config.latent_channels and not is_inpainting(pipeline):
        raise AsdmError(
            f"{name}: its {label} takes {channels} channels, as those for upscaling or edits do; use a checkpoint for "
            "text-to-image or inpainting"
        )
    family.require_known_inputs(denoiser, name)
    added = config.get("addition_embed_type")
    if (added == "text_time") != is_sdxl(pipeline):
        raise AsdmError(
            f"{name}: a {type(pipeline).__name__} whose {label} has addition_embed_type {added}; SDXL has text_time, "
            "SD 1.x and 2.x none; correct its configs"
        )


def as_supported(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline, or one of the class for inpainting or text-to-image that shares its parts."""
    if is_inpainting(pipeline) and "Inpaint" not in type(pipeline).__name__:
        return image_to_image(pipeline, with_mask=True)
    if isinstance(pipeline, _FROM_IMAGES) and not is_inpainting(pipeline):
        return text_to_image(pipeline)
    if isinstance(pipeline, LatentConsistencyModelPipeline) and denoiser_of(pipeline).config.time_cond_proj_dim is None:
        return text_to_image(pipeline)  # theirs embeds the guidance scale
    return pipeline
