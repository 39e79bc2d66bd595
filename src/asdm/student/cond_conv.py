"""CLME-CondConv: a kept convolution beside removed units inherits their kernels as experts.

Cross-layer multi-expert conditional convolution (named in the abstract of arXiv 2312.15516; the mixing of
kernels before one convolution is CondConv's, arXiv 1904.04971, Sec. 3; the rest is inferred): y = conv(x, sum_i
a_i W_i), W_0 the convolution's own kernel, W_1.. those of convolutions elsewhere in the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from asdm.student.edits import CondConv

Channels = tuple[int, int]  # of a convolution's input: of hidden states, and of the skip connection behind them


class CondConv2d(nn.Module):
    """A convolution whose kernel is a mixture, by the input, the time embedding or both.

    `weight` and `bias` are the own kernel, under the names they had. The mixture starts at the own kernel
    alone, exactly, and yet learns: a = (1, 0, ..) + softmax(logits) - 1/E, or (1, 0, ..) + 2 sigmoid(logits) - 1,
    with logits of 0 at the start.
    """

    def __init__(self, conv: nn.Conv2d, edit: CondConv, time_channels: int | None):
        super().__init__()
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size = conv.kernel_size
        self.router_kind, self.activation, self.sources = edit.router, edit.activation, list(edit.experts)
        assert conv.bias is not None
        self.weight, self.bias = conv.weight, conv.bias
        experts = len(edit.experts)
        # A matrix of all experts' kernels, one below the other (experts * out, in * k * k), as optimisers for matrices
        # take kernels; `.to(memory_format=torch.channels_last)` refuses tensors of five dimensions.
        self.expert_weight = nn.Parameter(torch.zeros(experts * conv.out_channels, conv.weight[0].numel()))
        self.expert_bias = nn.Parameter(torch.zeros(experts, conv.out_channels))
        inputs = conv.in_channels * (edit.router != "time") + (time_channels or 0) * (edit.router != "input")
        self.router = nn.Linear(inputs, experts + 1)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        # Told by the resnet before each call: the time embedding (batch, channels), and whether all samples
        # of the batch are at one time step.
        self.temb: Tensor | None = None
        self.one_timestep = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, in, h, w) to (batch, out, h, w): one convolution, whatever the number of experts."""
        routing = self.routing(hidden_states)
        if len(routing) > 2 * routing.shape[1]:
            return self._mixed_outputs(routing, hidden_states)
        weight = self._mixed(routing, self.weight, self.expert_weight)
        bias = self._mixed(routing, self.bias, self.expert_bias)
        if len(routing) == 1:
            return F.conv2d(hidden_states, weight[0], bias[0], self.stride, self.padding, self.dilation)
        batch = hidden_states.shape[0]
        apart = hidden_states.reshape(1, -1, *hidden_states.shape[2:])
        output = F.conv2d(
            apart, weight.flatten(0, 1), bias.flatten(), self.stride, self.padding, self.dilation, groups=batch
        )
        return output.unflatten(1, (batch, self.out_channels)).squeeze(0)

    def routing(self, hidden_states: Tensor) -> Tensor:
        """The experts' parts (batch, experts + 1), the own kernel's first; one row where all are at one time step
        and nothing else is looked at."""
        seen = []
        if self.router_kind != "time":
            seen.append(hidden_states.mean(dim=(2, 3)))
        if self.router_kind != "input":
            assert self.temb is not None
            activated = F.silu(self.temb)
            seen.append(activated[:1] if self.router_kind == "time" and self.one_timestep else activated)
        logits = self.router(torch.cat(seen, dim=1))
        if self.activation == "softmax":
            moved = logits.softmax(dim=1) - 1 / logits.shape[1]
        else:
            moved = 2 * logits.sigmoid() - 1
        return torch.cat([moved[:, :1] + 1, moved[:, 1:]], dim=1)

    def _mixed(self, routing: Tensor, own: Tensor, experts: Tensor) -> Tensor:
        """Mixtures (rows of routing, *own.shape) of tensors."""
        rows, flat = routing.to(own.dtype), own.flatten()
        experts = experts.view(-1, len(flat))
        if len(rows) == 1 and len(experts) == 1 and self.activation == "softmax":
            # The parts' sum is 1. Kernels are larger than caches, and this reads each but once.
            return torch.lerp(flat, experts[0], rows[0, 1]).view(1, *own.shape)
        return (rows[:, 1:] @ experts + rows[:, :1] * flat).view(-1, *own.shape)

    def _mixed_outputs(self, routing: Tensor, hidden_states: Tensor) -> Tensor:
        """The same by linearity, for a batch that would need more mixed kernels than there are experts: mixtures of
        what each kernel gives."""
        weight = torch.cat([self.weight, self.expert_weight.view(-1, *self.weight.shape[1:])])
        bias = torch.cat([self.bias, self.expert_bias.flatten()])
        outputs = F.conv2d(hidden_states, weight, bias, self.stride, self.padding, self.dilation)
        return torch.einsum("be,beohw->bohw", routing.to(outputs.dtype), outputs.unflatten(1, (routing.shape[1], -1)))

    def start(self, teacher: Mapping[str, Tensor], channels: Mapping[str, Channels], name: str) -> dict[str, Tensor]:
        """The tensors that a new bank has beside its own kernel's: experts inherited from `teacher`."""
        kernels = [_aligned(teacher[f"{source}.weight"], channels[source], channels[name]) for source in self.sources]
        like = teacher[f"{name}.weight"]
        router = torch.zeros(self.router.weight.shape, device=like.device, dtype=like.dtype)
        return {
            "expert_weight": torch.cat(kernels).flatten(1),
            "expert_bias": torch.stack([teacher[f"{source}.bias"] for source in self.sources]),
            "router.weight": router,
            "router.bias": router.new_zeros(len(router)),
        }


def _aligned(kernel: Tensor, has: Channels, wanted: Channels) -> Tensor:
    """A kernel (out, in, k, k) on other input channels: hidden states on hidden states, the skip connection on the
    skip connection, zero where there is nothing to inherit."""
    aligned = kernel.new_zeros(kernel.shape[0], sum(wanted), *kernel.shape[2:])
    hidden, skip = (min(pair) for pair in zip(has, wanted, strict=True))
    aligned[:, :hidden] = kernel[:, :hidden]
    aligned[:, wanted[0] : wanted[0] + skip] = kernel[:, has[0] : has[0] + skip]
    return aligned


class CondResnetBlock2D(ResnetBlock2D):
    """A ResnetBlock2D that tells its conditional convolutions the time embedding."""

    @classmethod
    def around(cls, resnet: ResnetBlock2D) -> CondResnetBlock2D:
        """The same resnet, its modules shared."""
        same = cls.__new__(cls)
        same.__setstate__({**vars(resnet), "_modules": dict(resnet._modules)})
        return same

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        banks = [conv for conv in (self.conv1, self.conv2) if isinstance(conv, CondConv2d)]
        for conv in banks:
            conv.temb = temb
        output = super().forward(input_tensor, temb, *args, **kwargs)
        for conv in banks:
            conv.temb = None
        return output
