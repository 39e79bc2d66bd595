"""How the machine is used: memory allocation and floating-point modes."""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

import torch

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


def fastest_precision(device: torch.device | str) -> Literal["no", "bf16", "fp16"]:
    """The mixed precision to train with on `device`.

    On CPUs bfloat16 where they have instructions for its products (AVX512-BF16 or AMX: 1.1 s against 1.4 s a step of
    the embedded UNet, two cores of an AMD EPYC); elsewhere oneDNN's bfloat16 kernels are slower than those of float32
    (1.50 s against 0.85 s).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {}
    return "bf16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "no"


def prepare_for_training() -> None:
    """Settings that make training on CPUs faster and change no result that matters.

    Denormal numbers, which an optimiser's moments of nearly silent layers consist of, count as zero.
    """
    keep_freed_memory()
    torch.set_flush_denormal(True)
