"""Low-rank changes of a student's layers (LoRA, arXiv 2106.09685) for the length of a stage, by peft.

The student's weights are frozen. Where the computation is in half precision, its layers hold their weights in that
precision, as autocast would cast them at each use; the weights in float32 wait in the host's memory. At the end the
changes are added to those, and modules and names are what they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from asdm.distillation.stages import Stage
from asdm.edits.expert_adapters import experts_following
from asdm.edits.expert_kernels import CondConv2d
from asdm.errors import AsdmError, needs_extra
from asdm.families import Denoiser
from asdm.measure.hooks import set_module

NAME = "distillation"  # peft's, of the changes


@contextmanager
def low_rank(student: Denoiser, stage: Stage, precision: torch.dtype | None) -> Iterator[LowRankChanges | None]:
    """Put low-rank changes around the student's layers for the length of the block, where the stage trains them.

    What was not merged within the block is dropped.

    Args:
        precision: the half precision of the computation; None for float32.

    Raises:
        AsdmError: peft is not installed, or the student has an adapter already.
    """
    if stage.trained != "lora":
        yield None
        return
    changes = LowRankChanges(student, stage.lora_rank)
    try:
        if precision is not None:
            changes.freeze_in(precision)
        yield changes
    finally:
        changes.remove()


class LowRankChanges:
    """Low-rank changes around all convolutions and linear layers of a student; at first they change nothing."""

    def __init__(self, student: Denoiser, rank: int):
        with needs_extra("lora", "trained=lora"):
            import peft
        if getattr(student, "peft_config", None):
            raise AsdmError("trained=lora: the student has an adapter already; merge or unload it first")
        self.student = student
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_changeable(student)))
        peft.inject_adapter_in_model(config, student, NAME)
        self.layers: dict[str, Any] = {
            name: module for name, module in student.named_modules() if hasattr(module, "lora_A")
        }
        generator = torch.Generator().manual_seed(0)  # so that every run, and every process of a launch, begins alike
        for layer in self.layers.values():
            _start(layer, generator)
        self._waiting: list[tuple[nn.Module, str, nn.Parameter]] = []

    def freeze_in(self, precision: torch.dtype) -> None:
        """Hold the frozen weights in half precision, and those in float32 in the host's memory."""
        for layer in self.layers.values():
            base = layer.base_layer
            if isinstance(base, CondConv2d):  # it mixes its kernels in float32
                continue
            for name, parameter in list(base.named_parameters(recurse=False)):
                self._waiting.append((base, name, parameter))
                base.register_parameter(name, nn.Parameter(parameter.detach().to(precision), requires_grad=False))
                if parameter.device.type not in ("cpu", "meta"):
                    parameter.data = parameter.data.cpu()

    def merge(self) -> None:
        """Add the changes to the weights, in float32; to those of expert kernels too."""
        self._restore()
        with torch.no_grad(), experts_following(self.student):
            for layer in self.layers.values():
                layer.merge(adapter_names=[NAME])

    def remove(self) -> None:
        """Restore the student's own modules."""
        self._restore()
        for name, layer in self.layers.items():
            set_module(self.student, name, layer.base_layer)
        self.layers = {}
        if hasattr(self.student, "peft_config"):
            del self.student.peft_config

    def _restore(self) -> None:
        """Put the weights in float32 back, where the layers are now."""
        while self._waiting:
            base, name, parameter = self._waiting.pop()
            device = base.get_parameter(name).device
            if parameter.device != device:
                parameter.data = parameter.data.to(device)
            base.register_parameter(name, parameter)


def _start(layer: Any, generator: torch.Generator) -> None:
    """Give a layer's change weights, so that it changes nothing: A is random and B zero (LoRA, Sec. 4.1)."""
    device = layer.base_layer.weight.device
    for part in (layer.lora_A[NAME], layer.lora_B[NAME]):
        weight = torch.zeros(part.weight.shape)
        if part is layer.lora_A[NAME]:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        part.weight = nn.Parameter(weight.to(device))


def _changeable(student: Denoiser) -> Iterator[str]:
    """Paths of the layers that get a change. A router is trained itself; a change cannot be added to kernels that are
    mixed by a sigmoid, nor by peft to a depthwise convolution."""
    for name, module in student.named_modules():
        if name.endswith(".router") or (isinstance(module, nn.Conv2d) and module.groups > 1):
            continue
        if isinstance(module, CondConv2d) and module.sources and module.activation != "softmax":
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name
