"""Writing a safetensors file tensor by tensor, so that no second copy of the tensors is in memory.

The library's own functions take all tensors at once. The format is a header of 8 bytes and JSON, then the bytes of each
tensor in the header's order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from asdm.errors import AsdmError
from asdm.files import replacing_file
from asdm.pipelines.original_layout import StoredTensor

_NAMES = {torch.float16: "F16", torch.float32: "F32"}
_ALIGNMENT = 8  # bytes, of the header's end, so that a program can map the tensors into memory


def write_safetensors(
    file: Path, tensors: Sequence[StoredTensor], dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file; a reader sees the old file or the new one, never a part.

    Args:
        dtype: float16 or float32, of all tensors.

    Raises:
        AsdmError: a value is not finite, or too large for `dtype`.
    """
    header = _header(tensors, dtype, metadata)
    with replacing_file(file) as partial, partial.open("wb") as out:
        out.write(len(header).to_bytes(8, "little"))
        out.write(header)
        for tensor in tensors:
            out.write(_data(tensor, dtype))


def _header(tensors: Sequence[StoredTensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for tensor in tensors:
        end = start + math.prod(tensor.shape) * dtype.itemsize
        content[tensor.name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    assert len(content) == len(tensors) + 1, "two tensors of one name"
    text = json.dumps(content, separators=(",", ":")).encode()
    return text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)


def _data(tensor: StoredTensor, dtype: torch.dtype) -> memoryview:
    values = tensor.make().detach().to("cpu", dtype).contiguous()
    assert tuple(values.shape) == tensor.shape, (tensor.name, values.shape, tensor.shape)
    if not values.isfinite().all():
        raise AsdmError(
            f"{tensor.name}: has values that are not finite in {str(dtype).removeprefix('torch.')}; write fp32 "
            "(--dtype fp32), or train the model again"
        )
    return values.flatten().numpy().data.cast("B")
