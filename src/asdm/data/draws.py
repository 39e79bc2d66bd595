"""Tensors of numbered draws on disk: each draw a safetensors file, in float32, float16 or 8 bits.

A draw's file is whole or absent. What the tensors are is their reader's affair.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asdm.choices import FeatureDtype
from asdm.errors import AsdmError, one_line
from asdm.files import replacing_file

FOLDER_SIZE = 1000  # draws in a folder
HEADER = 128  # bytes of a file's header for each tensor, at most
RESERVE = 1 << 30  # bytes of the disk that stay free
_SCALE = ".scale"


class Draws:
    """A folder of draws; the tensors named in `reduced` are stored in `dtype`, all others as they are.

    8 bits are integers of one scale for each channel of each draw: a rounding error of at most 1/254 of the channel's
    largest value.
    """

    def __init__(self, folder: Path, dtype: FeatureDtype, reduced: Collection[str]):
        self.folder, self.dtype, self.reduced = folder, dtype, frozenset(reduced)

    def path(self, number: int) -> Path:
        """Return the file of a draw."""
        return self.folder / f"{number // FOLDER_SIZE:05d}" / f"{number:08d}.safetensors"

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a draw's tensors, without the dimension of the batch.

        Raises:
            AsdmError: a value is too large for float16.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            stored |= self._encoded(name, tensor.detach().cpu())
        with replacing_file(self.path(number)) as partial:
            save_file({name: tensor.contiguous() for name, tensor in stored.items()}, partial)

    def read(self, numbers: Tensor, name: str) -> Tensor:
        """Return a tensor (draws, ...) of the draws with these numbers (draws,), as it is stored; 8 bits as float32.

        Raises:
            AsdmError: a file is missing or damaged.
        """
        with torch.autocast("cpu", enabled=False):  # which stacks no float16 where the computation is in bfloat16
            tensors = [self._decoded(number, name) for number in numbers.tolist()]
            try:
                return torch.stack(tensors)
            except (RuntimeError, TypeError) as error:
                fault = f"draws of several shapes ({one_line(error)})"
                raise AsdmError(f"{self.folder}: {fault}; record them again") from None

    def _encoded(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in self.reduced or self.dtype == "float32":
            return {name: tensor.float() if name in self.reduced else tensor}
        if self.dtype == "float16":
            half = tensor.half()
            if not half.isfinite().all() and tensor.isfinite().all():
                raise AsdmError(
                    f"teacher features: values up to {float(tensor.abs().max()):.3g} are too large for float16; "
                    "store them as int8"
                )
            return {name: half}
        values = tensor.float()
        axes = [axis for axis in range(values.ndim) if axis != _channel_axis(values)]
        scale = values.abs().amax(dim=axes, keepdim=True) / 127
        rounded = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return {name: rounded, name + _SCALE: scale}

    def _decoded(self, number: int, name: str) -> Tensor:
        path = self.path(number)
        try:
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(name)
                if name in self.reduced and self.dtype == "int8":
                    return tensor.float() * file.get_tensor(name + _SCALE)
                return tensor
        except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: a scale of another shape
            raise AsdmError(
                f"{path}: damaged or missing ({one_line(error)}); remove it and run prepare-data again, which "
                "computes what is missing"
            ) from None


def stored_bytes(shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], draws: Draws) -> int:
    """Return the size of one draw's file at most, of tensors with these shapes and dtypes."""
    total = 0
    for name, (shape, dtype) in shapes.items():
        count = torch.Size(shape).numel()
        total += HEADER
        if name not in draws.reduced:
            total += count * dtype.itemsize
        elif draws.dtype == "int8":
            total += HEADER + count + 4 * shape[_channel_axis(shape)]
        else:
            total += count * (4 if draws.dtype == "float32" else 2)
    return total


def require_space(folder: Path, needed: int, each: int) -> int:
    """Return the bytes that are free where `folder` is or will be.

    Args:
        needed: bytes that will be written.
        each: bytes of one draw, for the message.

    Raises:
        AsdmError: they do not suffice.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > max(0, free - RESERVE):
        fits = max(0, free - RESERVE) // each
        raise AsdmError(
            f"{folder}: the teacher's features need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            f"{fits} draws fit: give fewer --draws, or --teacher-features int8"
        )
    return free


def _channel_axis(tensor: Tensor | Sequence[int]) -> int:
    """Return which dimension of a draw's tensor are its channels: the first of a feature map, else the last."""
    shape = tensor.shape if isinstance(tensor, Tensor) else tensor
    return 0 if len(shape) == 3 else len(shape) - 1
