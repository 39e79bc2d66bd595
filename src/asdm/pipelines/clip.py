"""The CLIPModel beside a pipeline, by which its images are compared with captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPModel, PreTrainedModel

from asdm.pipelines.quiet import quiet
from asdm.registry import PIPELINES, registered_folder


def load_clip(pipeline: DiffusionPipeline) -> CLIPModel | None:
    """Load the CLIPModel saved beside a pipeline (folder `clip`); None where there is none."""
    name = str(pipeline.config.get("_name_or_path"))
    folder = (registered_folder(name, PIPELINES) or Path(name)) / "clip"
    if not folder.is_dir():
        return None
    with quiet():
        return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


def clip_statistics(clip: PreTrainedModel) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by which a model of images from a folder wants pixels in [0, 1] to be normalised."""
    about: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):  # of transformers 4, and of 5
        path = Path(clip.name_or_path) / name
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            about |= found.get("image_processor", found)
    return about.get("image_mean", [0.5] * 3), about.get("image_std", [0.5] * 3)
