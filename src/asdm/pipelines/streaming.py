"""Writing a safetensors file tensor by tensor, so that no second copy of the tensors is in memory.

The library's own functions take all tensors at once. The format is a header of 8 bytes and JSON, then the bytes of each
tensor in the header's order.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

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
    header, pages = _header(tensors, dtype, metadata), _MappedPages()
    with replacing_file(file) as partial, partial.open("wb") as out:
        out.write(len(header).to_bytes(8, "little"))
        out.write(header)
        for tensor in tensors:
            out.write(_data(tensor, dtype))
            for source in tensor.sources:
                pages.release(source)


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


class _MappedPages:
    """Gives back the memory of weights in mapped files, which the system can read again. Only Linux is asked for it."""

    _PAGE_OUT = 21  # MADV_PAGEOUT, which loses no data

    def __init__(self) -> None:
        self._files: list[tuple[int, int]] = []
        maps = Path("/proc/self/maps")
        if sys.platform == "linux" and maps.exists():
            lines = (line.split(maxsplit=5) for line in maps.read_text("utf-8", "replace").splitlines())
            places = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith("/")]
            self._files = [(int(start, 16), int(end, 16)) for start, end in places]
            self._advise = ctypes.CDLL(None).madvise
            self._advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def release(self, tensor: Tensor) -> None:
        """Give back the whole pages that a tensor fills, where they are a file's."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(first <= start and end <= last for first, last in self._files):
            start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:
                self._advise(start, end - start, self._PAGE_OUT)
