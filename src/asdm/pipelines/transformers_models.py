"""Models of transformers beside a pipeline: its CLIP, networks of metrics, encoders of semantics. Strangers may have
written their folders too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from asdm.errors import AsdmError
from asdm.pipelines.damaged import refuse_damaged, require_finite, require_readable
from asdm.pipelines.quiet import quiet
from asdm.pipelines.untrusted import (
    bounded_modules,
    require_as_large_as_its_files,
    require_plain_files,
    require_safe_config,
    without_network,
    without_weights,
)

_NAMED = 3  # tensors that a message names


def local_folder(name: str | Path) -> Path:
    """Return the folder of a model of transformers; a Hub id's is downloaded, so that it is checked as others are.

    Raises:
        OSError: there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.txt", "*.model", "model*.safetensors"]))


def load_transformers_model(kind: Any, folder: Path, remedy: str = "download it again", *, whole: bool = True) -> Any:
    """Load a model of transformers in float32, to infer with.

    Args:
        kind: its class, or AutoModel for the one that its config names.
        remedy: what to do if it cannot be loaded, for the message.
        whole: refuse one that lacks a tensor; some models of images have no weights for a pooling layer.

    Raises:
        AsdmError: there is none, it is damaged, a pickle, or another kind's, lacks a tensor, or asks for others' code.
    """
    require_safe_weights(folder)
    with refuse_damaged(folder, remedy), quiet(), bounded_modules(str(folder)), without_network():
        require_as_large_as_its_files(without_weights(kind, folder), folder)
        model, found = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    absent = sorted(found["missing_keys"]) if whole else []  # which transformers draws at random
    if absent:
        some = ", ".join(absent[:_NAMED])
        raise AsdmError(f"{folder}: lacks {len(absent)} of its tensors, among them {some}; {remedy}")
    require_finite(model, folder, remedy)
    return model.eval()


def require_safe_weights(folder: Path) -> None:
    """Raise an AsdmError where the folder of a model asks for code or weights of others, or holds no whole safetensors:
    what can be told without loading it."""
    require_plain_files(folder)
    require_safe_config(folder / "config.json")
    if not require_readable(folder):
        raise AsdmError(
            f"{folder}: no .safetensors weights; pickles are not loaded, convert them first: load and save_pretrained"
        )
