"""What stands in the place of a removed branch: a map of its input that is fitted in closed form.

Beyond the paper. How it is fitted is in `asdm.compensation`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asdm.student.edits import CompensationKind


class Compensation(nn.Module):
    """A map of hidden states (batch, channels, h, w) or (batch, tokens, channels) to their like.

    "bias" adds a constant to each channel, "diagonal" scales each channel too, "linear" maps all channels.
    With `adds`, what comes out is added to the input elsewhere; without, the input is part of it. At the
    start it changes nothing.
    """

    def __init__(self, kind: CompensationKind, channels: int, adds: bool = False):
        super().__init__()
        self.kind, self.adds = kind, adds
        shape = {"linear": (channels, channels), "diagonal": (channels,)}
        self.weight = nn.Parameter(torch.empty(shape[kind])) if kind in shape else None
        self.bias = nn.Parameter(torch.empty(channels))
        with torch.no_grad():
            for name, tensor in self.start().items():
                getattr(self, name).copy_(tensor)

    def start(self) -> dict[str, Tensor]:
        """The tensors with which nothing is changed."""
        channels = len(self.bias)
        tensors = {"bias": torch.zeros(channels)}
        if self.weight is not None:
            weight = torch.eye(channels) if self.kind == "linear" else torch.ones(channels)
            tensors["weight"] = torch.zeros_like(weight) if self.adds else weight
        return tensors

    def add_map(self, weight: Tensor, bias: Tensor) -> None:
        """Add a fitted map: weight as this one's, bias (channels,)."""
        if self.weight is not None:
            self.weight.data.add_(weight)
        self.bias.data.add_(bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        is_map = hidden_states.ndim == 4
        weight: Tensor | None = self.weight
        bias: Tensor = self.bias
        if self.kind == "linear":
            assert weight is not None
            return (
                F.conv2d(hidden_states, weight[..., None, None], bias)
                if is_map
                else F.linear(hidden_states, weight, bias)
            )
        if is_map:
            weight, bias = None if weight is None else weight[:, None, None], bias[:, None, None]
        if weight is not None:
            return hidden_states * weight + bias
        return bias.expand_as(hidden_states) if self.adds else hidden_states + bias


class TimeCompensation(nn.Module):
    """A term linear in the activated time embedding (batch, time channels), for hidden states
    (batch, channels, h, w)."""

    def __init__(self, time_channels: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, time_channels))

    def start(self) -> dict[str, Tensor]:
        return {"weight": torch.zeros(self.weight.shape)}

    def forward(self, temb: Tensor) -> Tensor:
        return F.linear(F.silu(temb), self.weight)[:, :, None, None]
