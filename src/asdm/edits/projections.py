"""Projections that replace a removed branch: functions of its input, fitted in closed form (`asdm.compensation`).

Beyond the paper. Every projection is an `nn.Conv2d` or `nn.Linear`, so tools that find layers by their type (casting,
offloading, quantisation, LoRA) find it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asdm.choices import CompensationKind


class Projection(nn.Module):
    """A projection of hidden states to states of the same shape: a layer with `weight` and `bias`.

    With `adds`, the output is added to the input elsewhere; without it, the output contains the input. Its starting
    tensors change nothing.
    """

    adds = False
    weight: Any
    bias: Any

    def starting_tensors(self, *_: Any) -> dict[str, Tensor]:
        """Return the tensors with which nothing is changed."""
        identity = self._identity()
        weight = torch.zeros_like(identity) if self.adds else identity
        return {"weight": weight, "bias": torch.zeros(len(self.bias))}

    def _identity(self) -> Tensor:
        return torch.ones(len(self.bias), 1, 1, 1)

    def reset_parameters(self) -> None:
        if self.bias is None:  # a LoRA's layer, which peft constructs from the class of the layer that it adapts
            super().reset_parameters()  # type: ignore[misc]
            return
        with torch.no_grad():
            for name, tensor in self.starting_tensors().items():
                getattr(self, name).copy_(tensor)

    def add_projection(self, weight: Tensor, bias: Tensor) -> None:
        """Add a fitted projection: weight (channels, channels), or (channels,) of a diagonal one; bias (channels,)."""
        self.weight.data.add_(weight.view(self.weight.shape))
        self.bias.data.add_(bias)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        reshape_saved({prefix.removesuffix("."): self}, state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearProjection(Projection, nn.Conv2d):
    """A linear projection of all channels, for hidden states (batch, channels, h, w): a 1x1 convolution."""

    def _identity(self) -> Tensor:
        return torch.eye(len(self.bias))[..., None, None]


class LinearTokenProjection(Projection, nn.Linear):
    """A linear projection of all channels, for hidden states (batch, tokens, channels)."""

    def __init__(self, channels: int, adds: bool = False):
        self.adds = adds
        super().__init__(channels, channels)

    def _identity(self) -> Tensor:
        return torch.eye(len(self.bias))


class ScaleProjection(Projection, nn.Conv2d):
    """A scale and a constant for each channel: a depthwise 1x1 convolution; for tokens too."""

    def __init__(self, channels: int, adds: bool = False):
        self.adds = adds
        super().__init__(channels, channels, 1, groups=channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.ndim == 4:
            return hidden_states * self.weight[:, 0] + self.bias[:, None, None]
        return hidden_states * self.weight.flatten() + self.bias


class ConstantProjection(Projection, nn.Conv2d):
    """A constant for each channel: a depthwise 1x1 convolution whose weight is no parameter; for tokens too."""

    def __init__(self, channels: int, adds: bool = False):
        self.adds = adds
        super().__init__(channels, channels, 1, groups=channels)
        del self.weight
        self.register_buffer("weight", super().starting_tensors()["weight"], persistent=False)

    def starting_tensors(self, *_: Any) -> dict[str, Tensor]:
        return {"bias": torch.zeros(len(self.bias))}

    def add_projection(self, weight: Tensor, bias: Tensor) -> None:
        self.bias.data.add_(bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias = self.bias[:, None, None] if hidden_states.ndim == 4 else self.bias
        return bias.expand_as(hidden_states) if self.adds else hidden_states + bias


def projection_of(kind: CompensationKind, channels: int, *, tokens: bool = False) -> nn.Module | None:
    """Return the projection that replaces a branch: of a feature map, or of tokens, whose output is added to them."""
    if kind == "none":
        return None
    if kind == "linear":
        return LinearTokenProjection(channels, adds=True) if tokens else LinearProjection(channels, channels, 1)
    return (ScaleProjection if kind == "diagonal" else ConstantProjection)(channels, adds=tokens)


def reshape_saved(projections: Mapping[str, Any], state_dict: dict[str, Tensor]) -> None:
    """Give the weights of these projections, by module path, the shape of a convolution's.

    Folders of version 0.1 have them as (channels, channels) and (channels,).
    """
    for path, module in projections.items():
        key = f"{path}.weight" if path else "weight"
        if key not in state_dict or state_dict[key].shape == module.weight.shape:
            continue  # quantised tensors cannot be viewed
        if state_dict[key].numel() == module.weight.numel():
            state_dict[key] = state_dict[key].view(module.weight.shape)


class TimeProjection(nn.Linear):
    """A term linear in the activated time embedding: (batch, time channels) to (batch, channels)."""

    def __init__(self, time_channels: int, channels: int):
        super().__init__(time_channels, channels, bias=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def starting_tensors(self, *_: Any) -> dict[str, Tensor]:
        return {"weight": torch.zeros(self.weight.shape)}
