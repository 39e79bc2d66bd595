"""Safetensors files that a stranger may have written, or that a crash has cut short; and what tells tensors apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from asdm.errors import AsdmError, one_line


def load_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Load all tensors of a file to the host.

    Raises:
        AsdmError: it is missing, cut short, or no safetensors file; the message ends in the `remedy`.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise AsdmError(f"{path}: damaged or missing ({one_line(error)}); {remedy}") from None


def tensors_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file's tensors, and what its header says beside them."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and all values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(module: nn.Module) -> str:
    """Return the digest of all values of a module. A module whose tensors do not say what it computes (a graph in
    files, several denoisers that take turns) has a `weights_digest` of its own."""
    own: Any = getattr(module, "weights_digest", None)
    return content_digest(module.state_dict()) if own is None else str(own())
