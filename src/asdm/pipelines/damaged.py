"""Guards around the loading of one model, a decoder or an encoder, say, whose files may be damaged or a stranger's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from asdm.errors import AsdmError, memory_error, one_line
from asdm.pipelines.tensor_faults import require_safetensors, require_weights


@contextmanager
def refuse_damaged(name: str | Path, remedy: str = "download it again") -> Iterator[None]:
    """Turn what a library raises for files that are damaged, or another model's, into our error."""
    try:
        yield
    except Exception as error:  # of the libraries, any kind
        if isinstance(error, AsdmError) or memory_error(error) is not None:
            raise
        raise AsdmError(f"{name}: cannot be loaded ({one_line(error, 120)}); {remedy}") from None


def require_readable(folder: Path) -> list[Path]:
    """Return a folder's files of weights.

    Raises:
        AsdmError: one is no whole safetensors file, or its weights are quantised.
    """
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        require_safetensors(path)
        require_weights(path)
    return files


def require_vocabulary(folder: Path) -> None:
    """Raise an AsdmError where a tokenizer's vocabulary is in sentencepiece's file alone, and cannot be read.

    transformers would take the file for one of tiktoken's, and ask for that package.
    """
    path = folder / "spiece.model"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except Exception as error:  # also protobuf's, which may be too old
        remedy = "install them with pip install 'asdm-diffusion[pixart]'"
        raise AsdmError(f"{path}: needs sentencepiece and protobuf ({one_line(error)}); {remedy}") from None
    with refuse_damaged(path):
        if not ModelProto.FromString(path.read_bytes()).pieces:
            raise ValueError("no vocabulary")


def require_finite(module: nn.Module, name: str | Path, remedy: str = "download it again") -> None:
    """Raise an AsdmError where a weight of a loaded model is not finite."""
    if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
        raise AsdmError(f"{name}: its weights are no numbers (NaN); {remedy}")
