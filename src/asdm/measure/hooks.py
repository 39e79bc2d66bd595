"""Hooks into a model's calls: record outputs, answer with recorded ones, exchange modules, restore what was changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class CachedOutput(nn.Module):
    """Returns a module's recorded output without computing it."""

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
    """Record the last output of each named module within the block."""
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


@contextmanager
def preserve_module_state(*modules: nn.Module) -> Iterator[None]:
    """Restore the modules' training modes, gradient checkpointing and `requires_grad` after the block."""
    modes = [
        (module, module.training, getattr(module, "gradient_checkpointing", None))
        for root in modules
        for module in root.modules()
    ]
    trainable = [(parameter, parameter.requires_grad) for root in modules for parameter in root.parameters()]
    try:
        yield
    finally:
        for module, training, checkpointing in modes:
            module.training = training
            if checkpointing is not None:
                module.gradient_checkpointing = checkpointing
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
