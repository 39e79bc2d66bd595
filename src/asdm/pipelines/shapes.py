"""A model's UNet without its weights, for what follows from the architecture alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from asdm.diffusion.kinds import RANDOM
from asdm.errors import AsdmError, one_line
from asdm.families import Denoiser, UNetFamily, denoiser_of
from asdm.pipelines.loading import load_pipeline
from asdm.pipelines.quiet import quiet
from asdm.pipelines.random_models import UNETS
from asdm.registry import PIPELINES, registered_folder
from asdm.student.unet import AsdmUNet2DConditionModel


def unet_without_weights(model: str) -> Denoiser:
    """Make the UNet of a model on the meta device from its configuration. Nothing else is downloaded.

    A single file is loaded, as its tensors are its configuration.

    Args:
        model: as for `load_pipeline`.

    Raises:
        AsdmError: there is no such model, or its configuration cannot be read.
    """
    if Path(model).is_file() or (model.startswith(RANDOM) and model.removeprefix(RANDOM) not in UNETS):
        return denoiser_of(load_pipeline(model)).to("meta")
    with init_empty_weights():
        return AsdmUNet2DConditionModel.from_config(_unet_config(model))


def _unet_config(model: str) -> dict[str, Any]:
    if model.startswith(RANDOM):
        return {"edits": (), **UNETS[model.removeprefix(RANDOM)]}
    folder = registered_folder(model, PIPELINES) or Path(model)
    place = folder if folder.is_dir() else model
    try:
        with quiet():
            return dict(UNetFamily.model_class.load_config(place, subfolder="unet"))
    except (OSError, ValueError) as error:
        raise AsdmError(f"{model}: the configuration of its UNet cannot be read ({one_line(error)})") from error
