"""The CLIPModel beside a pipeline and its tokenizer, by which images are compared with captions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer, PreTrainedModel

from asdm.errors import AsdmError, one_line
from asdm.pipelines.damaged import refuse_damaged, require_vocabulary
from asdm.pipelines.names import folder_of
from asdm.pipelines.quiet import quiet
from asdm.pipelines.transformers_models import load_transformers_model
from asdm.pipelines.untrusted import without_network
from asdm.reading import read_json

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json")  # one of these is in a tokenizer's folder


def clip_folder(pipeline: DiffusionPipeline) -> Path | None:
    """Return the folder `clip` beside a pipeline; None where there is none."""
    folder = folder_of(str(pipeline.config.get("_name_or_path"))) / "clip"
    return folder if folder.is_dir() else None


def load_clip(pipeline: DiffusionPipeline) -> CLIPModel | None:
    """Load the CLIPModel saved beside a pipeline (folder `clip`); None where there is none."""
    folder = clip_folder(pipeline)
    return None if folder is None else load_transformers_model(CLIPModel, folder, "remove the folder")


def load_clip_tokenizer(folder: str | Path, pipeline: DiffusionPipeline) -> Any:
    """Load the tokenizer from a CLIPModel's folder; where there is none, return the pipeline's.

    Raises:
        AsdmError: it is damaged; or there is none, and the pipeline's is not CLIP's.
    """
    if str(folder) and any((Path(folder) / name).is_file() for name in _TOKENIZER):
        return load_tokenizer(Path(folder))
    own = getattr(pipeline, "tokenizer", None)
    if not isinstance(own, CLIPTokenizer):
        raise AsdmError(
            f"{folder}: has no tokenizer, and the pipeline's is a {type(own).__name__}, not CLIP's; save a "
            "CLIPTokenizer into it"
        )
    return own


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from a folder.

    Raises:
        AsdmError: it is damaged, or there is none.
    """
    require_vocabulary(folder)
    with refuse_damaged(folder), quiet(), without_network():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


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
