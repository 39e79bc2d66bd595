"""A module as an instance of a subclass of its class, or with other attributes; its parts are shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def recast(kind: type[Kind], module: nn.Module) -> Kind:
    """Return a module as one of a subclass of its class; what it consists of is shared."""
    same = kind.__new__(kind)
    same.__setstate__({**vars(module), "_modules": dict(module._modules)})
    return same


class Overlay:
    """A module with some attributes replaced, for one call of a stock forward."""

    def __init__(self, module: nn.Module, attributes: Mapping[str, Any]):
        self._module = module
        for name, value in attributes.items():  # torch 2.6 cannot compile vars(self)
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
