"""What can be given as MODEL, for messages."""

from __future__ import annotations

from pathlib import Path

from asdm.pipelines.random_models import RANDOM, UNETS
from asdm.registry import PIPELINES, registered_names

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")


def model_help() -> str:
    """Return all that a model's name can be."""
    names = ", ".join(registered_names(PIPELINES))
    return f"{names}, a Hub id, a folder, a .safetensors file, or {' | '.join(f'{RANDOM}{shape}' for shape in UNETS)}"


def looks_like_path(name: str) -> bool:
    """Return whether a name is a path rather than a Hub id."""
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or name.count("/") != 1
        or Path(name).suffix in (".safetensors", *PICKLE_SUFFIXES)
    )
