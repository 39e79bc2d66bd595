"""The CLIPModel beside a pipeline, by which its images are compared with captions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import CLIPModel, PreTrainedModel

from asdm.errors import AsdmError, one_line
from asdm.pipelines.names import folder_of
from asdm.pipelines.transformers_models import load_transformers_model
from asdm.reading import read_json


def load_clip(pipeline: DiffusionPipeline) -> CLIPModel | None:
    """Load the CLIPModel saved beside a pipeline (folder `clip`); None where there is none."""
    folder = folder_of(str(pipeline.config.get("_name_or_path"))) / "clip"
    if not folder.is_dir():
        return None
    return load_transformers_model(CLIPModel, folder, "remove the folder")  # type: ignore[no-any-return]


def clip_statistics(clip: PreTrainedModel) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by which a model of images from a folder wants pixels in [0, 1] to be normalised."""
    about: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):  # of transformers 4, and of 5
        path = Path(clip.name_or_path) / name
        if path.is_file():
            about |= _image_processor(path)
    return about.get("image_mean", [0.5] * 3), about.get("image_std", [0.5] * 3)


def _image_processor(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        inside: dict[str, Any] = found.get("image_processor", found)
        if not isinstance(inside, dict):
            raise ValueError("no object")
        three = [inside[name] for name in ("image_mean", "image_std") if name in inside]
        if any(len(values) != 3 or not all(math.isfinite(value) for value in values) for values in three):
            raise ValueError("image_mean and image_std are three numbers each")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AsdmError(f"{path}: damaged ({one_line(error)}); download it again") from None
    return inside
