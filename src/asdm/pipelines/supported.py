"""Which pipelines this package works on, and in which of diffusers' classes it takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    PixArtSigmaPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)

from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.kinds import (
    INPAINTING,
    TEXT_TO_IMAGE,
    image_to_image,
    is_inpainting,
    is_sdxl,
    require_channels,
    text_to_image,
)
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of
from asdm.student.classes import student_class

_FROM_IMAGES = (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline, *INPAINTING)
_SUPPORTED = TEXT_TO_IMAGE + _FROM_IMAGES
# Pipelines of a kind that has others' parts, but a sampling of its own.
_OF_ANOTHER_KIND = {
    "LatentConsistencyModelImg2ImgPipeline": LatentConsistencyModelPipeline,
    "PixArtSigmaPAGPipeline": PixArtSigmaPipeline,
}
_OF_A_STEP = {"model_output", "timestep", "sample", "args", "kwargs"}
# The classes of Stable Diffusion's parts.
_PARTS: dict[str, tuple[str, ...]] = {
    "vae": ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "ConsistencyDecoderVAE"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
}


def class_for(index: Mapping[str, Any], folder: str | Path) -> type[Any]:
    """Return the class in which a pipeline is loaded, by its index: mostly its own. Pipelines of Stable Diffusion's
    parts that sample in other ways (PAG, ControlNet, LEdits++ ..) are loaded for text-to-image.

    Raises:
        AsdmError: it is of another architecture.
    """
    name = str(index.get("_class_name"))
    known = getattr(diffusers, name, None)
    if not (isinstance(known, type) and "Pipeline" in name):
        return DiffusionPipeline  # which says what is wrong
    if issubclass(known, _SUPPORTED):
        return known
    if name in _OF_ANOTHER_KIND:
        return _OF_ANOTHER_KIND[name]
    if not all(_class_in(index, part) in kinds or _is_student(index, part) for part, kinds in _PARTS.items()):
        raise _unsupported(name, folder)
    return StableDiffusionXLPipeline if _class_in(index, "text_encoder_2") is not None else StableDiffusionPipeline


def left_out(index: Mapping[str, Any], kind: type[Any]) -> list[str]:
    """Return the parts that a pipeline's index names, and that the class in which it is loaded has no place for."""
    places = kind._get_signature_keys(kind)[0]
    return [part for part in index if _class_in(index, part) is not None and part not in places]


def _class_in(index: Mapping[str, Any], part: str) -> str | None:
    """Return the name of the class of a part in a pipeline's index; None where it has none."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else None


def _is_student(index: Mapping[str, Any], part: str) -> bool:
    return student_class(_class_in(index, part)) is not None


def _unsupported(kind: str, name: str | Path) -> AsdmError:
    return AsdmError(f"{name}: a {kind}; use SD 1.x, 2.x, SDXL or PixArt, for text-to-image or inpainting")


def require_supported(pipeline: DiffusionPipeline, name: str) -> None:
    """Raise an AsdmError unless the pipeline is for text-to-image or inpainting, and its denoiser needs no inputs but
    those that prompts and masks give.

    Args:
        name: of the model, for the message.
    """
    if not isinstance(pipeline, _SUPPORTED):
        raise _unsupported(type(pipeline).__name__, name)
    denoiser, family = denoiser_of(pipeline), family_of(pipeline)
    config, label = denoiser.config, family.label
    if pipeline.text_encoder is None:
        raise AsdmError(f"{name}: has no first text encoder, as SDXL's refiner; use a base model")
    if config.sample_size is None:
        raise AsdmError(
            f"{name}: its {label} does not say for which size it is; write sample_size into "
            f"{family.component}/config.json"
        )
    require_channels(pipeline, name)
    colours = pipeline.vae.config.get("out_channels", 3)
    if colours != 3:
        raise AsdmError(f"{name}: its VAE makes images of {colours} channels; use a checkpoint of 3 (RGB)")
    _require_scheduler(pipeline, name)
    family.require_known_inputs(denoiser, name)
    added = config.get("addition_embed_type")
    if (added == "text_time") != is_sdxl(pipeline):
        raise AsdmError(
            f"{name}: a {type(pipeline).__name__} whose {label} has addition_embed_type {added}; SDXL has text_time, "
            "SD 1.x and 2.x none; correct its configs"
        )


def _require_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    """Raise an AsdmError where the pipeline cannot sample by its scheduler, which is one for other pipelines."""
    scheduler = pipeline.scheduler
    lacking = [f"no {each}" for each in ("init_noise_sigma", "add_noise", "order") if not hasattr(scheduler, each)]
    needed = inspect.signature(scheduler.step).parameters.values()
    others = [each.name for each in needed if each.default is each.empty and each.name not in _OF_A_STEP]
    faults = lacking + [f"its steps need {each}" for each in others]
    variance = str(scheduler.config.get("variance_type"))
    if variance.startswith("learned") and denoiser_of(pipeline).config.out_channels == latent_shape(pipeline)[0]:
        faults.append(f"variance_type {variance}, and no variance is predicted")
    if faults:
        raise AsdmError(
            f"{name}: cannot be sampled by its {type(scheduler).__name__} ({faults[0]}); write the config of the "
            "scheduler that it was trained for into scheduler/scheduler_config.json, or name one (config, --config)"
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
