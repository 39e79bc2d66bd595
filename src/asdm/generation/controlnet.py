"""A ControlNet that is added to a pipeline for a request."""

from __future__ import annotations

import math
import os
from pathlib import Path

from diffusers import ControlNetModel, DiffusionPipeline
from huggingface_hub import hf_hub_download

from asdm.errors import AsdmError, one_line
from asdm.families import denoiser_of, family_of
from asdm.pipelines.damaged import refuse_damaged
from asdm.pipelines.names import looks_like_path
from asdm.pipelines.quiet import quiet
from asdm.pipelines.tensor_faults import require_loaded
from asdm.pipelines.untrusted import (
    bounded_modules,
    require_no_more_than_its_files,
    require_plain_files,
    require_safe_config,
)
from asdm.reading import read_json


def require_controlnet_folder(folder: Path) -> None:
    """
    Raises:
        AsdmError: a path that is no folder with a ControlNet in diffusers' format. A Hub id passes.
    """
    if not folder.is_dir():
        if folder.exists() or looks_like_path(os.fspath(folder)):
            raise AsdmError(f"{folder}: no such folder of a ControlNet; name one in diffusers' format, or a Hub id")
        return
    require_plain_files(folder)
    try:
        config = read_json(folder / "config.json")
        found = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AsdmError(f"{folder}: not a ControlNet in diffusers' format ({one_line(error)})") from None
    if found != ControlNetModel.__name__:
        raise AsdmError(f"{folder}: a {found}; must be a {ControlNetModel.__name__}")


def load_controlnet(folder: Path, pipeline: DiffusionPipeline) -> ControlNetModel:
    """Load a ControlNet in a pipeline's precision, on its device.

    Raises:
        AsdmError: it is damaged, a pickle, or for another kind of denoiser.
    """
    require_controlnet_folder(folder)
    denoiser = denoiser_of(pipeline)
    with refuse_damaged(folder), quiet(), bounded_modules(str(folder)):
        is_here = folder.is_dir()
        require_safe_config(folder / "config.json" if is_here else Path(hf_hub_download(str(folder), "config.json")))
        if is_here:
            require_no_more_than_its_files(ControlNetModel, folder)
        controlnet = ControlNetModel.from_pretrained(
            os.fspath(folder), torch_dtype=denoiser.dtype, use_safetensors=True
        )
    require_loaded(controlnet, str(folder), "ControlNet", sorted(folder.glob("*.safetensors")))
    family_of(pipeline).require_controlnet(denoiser, controlnet, str(folder))
    factor = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if factor != pipeline.vae_scale_factor:
        raise AsdmError(
            f"{folder}: a ControlNet that makes images smaller by {factor}, and this model's VAE does by "
            f"{pipeline.vae_scale_factor}; use one with {int(math.log2(pipeline.vae_scale_factor)) + 1} "
            "conditioning_embedding_out_channels"
        )
    return controlnet.eval().to(pipeline.device)
