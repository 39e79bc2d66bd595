"""What can be given as MODEL, and where its files are."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from asdm.errors import AsdmError
from asdm.pipelines.random_models import RANDOM, UNETS, require_shape
from asdm.registry import PIPELINES, registered_folder, registered_names

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


def require_model_named(name: str) -> None:
    """Raise an AsdmError for a name that cannot be a model's, before one is loaded. Whether there is a Hub id is not
    asked."""
    if registered_folder(name, PIPELINES) is not None or os.path.exists(name):
        return
    if name.startswith(RANDOM):
        require_shape(name.removeprefix(RANDOM))
    elif looks_like_path(name):
        raise AsdmError(f"{name}: no such folder or file; MODEL is {model_help()}")


def folder_of(name: str) -> Path:
    """Return the folder with the files of a loaded model: that of a registered name, that of a Hub id in the cache, or
    the path that the name is. It need not exist."""
    registered = registered_folder(name, PIPELINES)
    if registered is not None:
        return registered
    if os.path.exists(name) or looks_like_path(name):
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "model_index.json")
    except ValueError:  # no Hub id
        return Path(name)
    return Path(cached).parent if isinstance(cached, str) else Path(name)
