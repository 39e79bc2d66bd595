"""Calls of a UNet that are looked into, or of which a part is known already and not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class CachedOutput(nn.Module):
    """Answers with what a module answered before, without computing it."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


@contextmanager
def outputs_of(unet: UNet2DConditionModel, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the named modules put out in the calls within the block, the last of each."""
    outputs: dict[str, Any] = {}
    handles = [
        unet.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def input_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a module is called with."""
    return args[0] if args else kwargs["hidden_states"]


def tensor_of(output: Any) -> Tensor:
    """The hidden states in what a module put out."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def preserve_module_state(*modules: nn.Module) -> Iterator[None]:
    """After the block the modules' modes and wishes for gradients are those of before, however it ends."""
    modes = [
        (module, module.training, getattr(module, "gradient_checkpointing", None))
        for whole in modules
        for module in whole.modules()
    ]
    wanted = [(parameter, parameter.requires_grad) for whole in modules for parameter in whole.parameters()]
    try:
        yield
    finally:
        for module, training, checkpointing in modes:
            module.training = training
            if checkpointing is not None:
                module.gradient_checkpointing = checkpointing
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)
