"""The processes of a launch: an Accelerator of the right device and precision."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from asdm.devices import LONGEST_WAIT
from asdm.errors import AsdmError
from asdm.measure.machine import fastest_precision


def require_precision(device: torch.device | str, mixed_precision: str) -> None:
    """Raise an AsdmError for a precision that a device does not train in: Accelerate would take float32 instead."""
    if mixed_precision == "fp16" and torch.device(device).type == "cpu":
        raise AsdmError("mixed_precision=fp16: not on a CPU; choose bf16, no, or auto for the faster of the two")


def make_accelerator(
    device: torch.device | str, mixed_precision: str = "no", *, some_unused: bool = False
) -> Accelerator:
    """Make an Accelerator with a precision of its own; Accelerate keeps one for the whole process until it is reset.

    Args:
        device: with an index, the one that is used.
        mixed_precision: "auto" is the device's fastest, for all processes as rank 0 finds it.
        some_unused: parts of what is trained have no share in the loss.
    """
    device = torch.device(device)
    require_precision(device, mixed_precision)
    if mixed_precision == "auto":
        found = [fastest_precision(device) if make_accelerator(device).is_main_process else None]
        mixed_precision = broadcast_object_list(found)[0]
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate takes the current one
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            DistributedDataParallelKwargs(find_unused_parameters=some_unused),
        ],
    )
