"""A model's UNet without its weights: enough for what follows from the architecture alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from asdm.demo import pipeline_folder
from asdm.errors import AsdmError, one_line
from asdm.pipelines.loading import load_pipeline, quiet
from asdm.pipelines.random_models import UNETS
from asdm.student.unet import AsdmUNet2DConditionModel


def unet_without_weights(model: str) -> UNet2DConditionModel:
    """Return the UNet of a model on the meta device, from its configuration; nothing is downloaded but that.

    A single file is loaded, as its tensors are its configuration.

    Args:
        model: as for `load_pipeline`.

    Raises:
        AsdmError: there is no such model, or its configuration cannot be read.
    """
    if Path(model).is_file() or (model.startswith("random:") and model.removeprefix("random:") not in UNETS):
        return load_pipeline(model).unet.to("meta")
    with init_empty_weights():
        return AsdmUNet2DConditionModel.from_config(_unet_config(model))


def _unet_config(model: str) -> dict[str, Any]:
    if model.startswith("random:"):
        return {"edits": (), **UNETS[model.removeprefix("random:")]}
    folder = pipeline_folder() if model == "demo" else Path(model)
    place = folder if folder.is_dir() else model
    try:
        with quiet():
            return dict(UNet2DConditionModel.load_config(place, subfolder="unet"))
    except (OSError, ValueError) as error:
        raise AsdmError(f"{model}: the configuration of its UNet cannot be read ({one_line(error)})") from error
