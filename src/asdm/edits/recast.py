"""A module as an instance of a subclass of its class, its parts shared."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def recast(kind: type[Kind], module: nn.Module) -> Kind:
    """Return a module as one of a subclass of its class; what it consists of is shared."""
    same = kind.__new__(kind)
    same.__setstate__({**vars(module), "_modules": dict(module._modules)})
    return same
