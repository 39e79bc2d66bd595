"""Modules observed, exchanged or preserved for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class CachedOutput(nn.Module):
    """Answers with what a module answered before, without computing it."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path below `root`."""
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


@contextmanager
def swapped(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules at dotted paths below `root` for the length of the block, then restore those that were there."""
    originals = {path: root.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            set_module(root, path, module)
        yield
    finally:
        for path, module in originals.items():
            set_module(root, path, module)


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the named modules put out in the calls within the block, the last of each."""
    outputs: dict[str, Any] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: outputs.__setitem__(name, output)
        )
        for name in names
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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
