"""Where work runs, and how long processes of a launch wait for each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from asdm.errors import AsdmError, one_line

LONGEST_WAIT = timedelta(days=7)  # of a process for the others: one may sample images, or incubate a block, for hours


def fastest_device() -> str:
    """Return the device to run on by default: a GPU, in a distributed launch this process's own, else the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def on_device(part: Any, device: str | torch.device) -> Any:
    """Move a pipeline or a module to a device.

    Raises:
        AsdmError: there is no such device here.
    """
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        return part.to(device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise AsdmError(f"device {one_line(device, 80)}: not to be had ({one_line(error)}); use cpu") from None
