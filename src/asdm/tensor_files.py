"""Safetensors files that a stranger may have written, or that a crash has cut short."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

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
