"""Settings of the machine: memory allocation and floating-point modes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Literal

import torch
from torch import nn

from asdm.measure.latency import measure_interleaved

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next allocation instead of returning them to the system.

    Activations of a UNet are allocated and freed in each step; page faults on fresh memory cost 10 to
    20% of a training step on two cores. Returns whether the C library took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30) and libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30))
    except (OSError, AttributeError):
        return False


def device_name(device: torch.device | str) -> str:
    """Return a GPU's name, or the kind of another device."""
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind


def fastest_precision(device: torch.device | str) -> Literal["no", "bf16", "fp16"]:
    """Return the mixed precision to train with on `device`.

    On CPUs bfloat16 where they have instructions for its products (AVX512-BF16 or AMX) and a convolution shows that
    these are faster: a step of the embedded UNet takes 1.1 s instead of 1.4 s on two cores of an AMD EPYC, while there
    are Xeons on which it takes longer than in float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if kind == "cpu" and computes_in_bfloat16() and _bfloat16_trains_faster() else "no"


def computes_in_bfloat16() -> bool:
    """Return whether the CPU has instructions for products in bfloat16. Without them one takes up to a hundred times as
    long as in float32."""
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.11, which knew of x86 processors alone
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@cache
def _bfloat16_trains_faster() -> bool:
    """Measure whether autocast makes a convolution, forward and backward, faster on this CPU."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Conv2d(128, 128, 3, padding=1)
    images = torch.ones(8, 128, 16, 16)

    @torch.enable_grad()
    def step(in_bfloat16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            layer(images).sum().backward()

    times = measure_interleaved({"float32": partial(step, False), "bfloat16": partial(step, True)})
    return times["bfloat16"].ms < times["float32"].ms


@contextmanager
def fast_training() -> Iterator[None]:
    """Use settings that make training on CPUs faster, and change no result that matters, within the block.

    Denormal numbers count as zero. An optimiser's moments have many of them in layers with tiny gradients. Freed memory
    is kept, afterwards too.
    """
    keep_freed_memory()
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def fast_products() -> Iterator[None]:
    """Compute float32 products on GPUs in TF32 (10 bits of mantissa) within the block, as torch's convolutions do."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
