"""The peak arithmetic rate of a machine, for comparison with the rate that a model achieves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from asdm.measure.latency import seconds_of
from asdm.measure.machine import computes_in_bfloat16


@torch.no_grad()
def machine_limits(
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] | None = None,
    repeats: int = 5,
    size: int | None = None,
) -> dict[str, dict[str, float]]:
    """Measure the GFLOP/s (two for a multiply and add) of the fastest matrix product and 3x3 convolution, by dtype.

    Args:
        dtypes: by default those that the device computes in.
        size: rows and columns of the matrices. The default keeps the device busy. The convolutions do as much work.
    """
    on_cpu = torch.device(device).type == "cpu"
    size = size or (2048 if on_cpu else 8192)
    half = (torch.bfloat16,) if on_cpu else (torch.bfloat16, torch.float16)
    limits = {}
    for dtype in dtypes or (torch.float32, *half):
        emulated = on_cpu and dtype is torch.bfloat16 and not computes_in_bfloat16()
        part = max(1, size // 8) if emulated else size  # the whole would take minutes
        products = [_product(part, dtype, device)]
        # The channels and pixels of Stable Diffusion's highest, middle and lowest resolutions.
        convolutions = [
            _convolution(channels, max(1, round((part**3 / 9) ** 0.5 / channels)), dtype, device, memory_format)
            for channels in (320, 640, 1280)
            for memory_format in (torch.contiguous_format, torch.channels_last)
        ]
        limits[str(dtype).removeprefix("torch.")] = {
            "matrix product": max(_gflops(*call, repeats, device) for call in products),
            "3x3 convolution": max(_gflops(*call, repeats, device) for call in convolutions),
        }
    return limits


def _product(size: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Callable[[], Any], float]:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right, size**3


def _convolution(
    channels: int, side: int, dtype: torch.dtype, device: torch.device | str, memory_format: torch.memory_format
) -> tuple[Callable[[], Any], float]:
    image = torch.randn(1, channels, side, side, device=device).to(dtype, memory_format=memory_format)
    kernel = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=memory_format)
    return lambda: F.conv2d(image, kernel, padding=1), 9 * channels**2 * side**2


def _gflops(call: Callable[[], Any], macs: float, repeats: int, device: torch.device | str) -> float:
    call()
    return 2 * macs / min(seconds_of(call, device) for _ in range(repeats)) / 1e9
