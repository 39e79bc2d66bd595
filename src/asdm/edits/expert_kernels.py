"""A convolution whose kernel is a mixture of its own and of those that it inherits.

The mixing of kernels before one convolution is CondConv's (arXiv 1904.04971, Sec. 3); the start at exactly the own
kernel is inferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from asdm.choices import Router
from asdm.edits.base import EditedFamily
from asdm.errors import AsdmError

Activation = Literal["softmax", "sigmoid"]
Channels = tuple[int, int]  # of a convolution's input: of hidden states, and of the skip connection behind them


class CondConv2d(nn.Conv2d):
    """A convolution whose kernel is a mixture, by the input, the prompt or the time embedding.

    `weight` and `bias` are the own kernel, under their original names. The mixture starts at exactly the own kernel,
    and has a gradient there: a = (1, 0, ..) + softmax(logits) - 1/E, or (1, 0, ..) + 2 sigmoid(logits) - 1, with
    logits of 0 at the start. Constructed as an `nn.Conv2d` it has no experts and computes as one, because peft
    constructs a LoRA's layers from the class of the layer that it adapts.
    """

    sources: Sequence[str] = ()
    router_kind: str
    activation: str
    expert_weight: nn.Parameter
    expert_bias: nn.Parameter
    router: nn.Linear
    bias: Any

    @classmethod
    def around(
        cls, conv: nn.Conv2d, experts: Sequence[str], router: Router, activation: Activation, read: Mapping[str, int]
    ) -> CondConv2d:
        """Return a convolution with empty kernels for those of `experts`, whose router reads so many channels of each
        of "input", "prompt" and "time"; its own kernel is shared."""
        assert conv.bias is not None and conv.groups == 1
        places: Any = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "device": "meta"}
        kernel_size: Any = conv.kernel_size
        mixed = cls(conv.in_channels, conv.out_channels, kernel_size, **places)
        mixed.weight, mixed.bias = conv.weight, conv.bias
        mixed.router_kind, mixed.activation, mixed.sources = router, activation, list(experts)
        count = len(experts)
        # One matrix of all experts' kernels (experts * out, in * k * k): optimisers for matrices reshape kernels so,
        # and `.to(memory_format=torch.channels_last)` rejects tensors of five dimensions.
        mixed.expert_weight = nn.Parameter(torch.zeros(count * conv.out_channels, conv.weight[0].numel()))
        mixed.expert_bias = nn.Parameter(torch.zeros(count, conv.out_channels))
        mixed.router = nn.Linear(sum(read.values()), count + 1)
        nn.init.zeros_(mixed.router.weight)
        nn.init.zeros_(mixed.router.bias)
        return mixed

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """Convolve (batch, in, h, w), with the time embedding (batch, time channels) and the pooled prompt (batch,
        prompt channels), to (batch, out, h, w).

        It is one convolution, for any number of experts.
        """
        if not self.sources:
            return super().forward(hidden_states)
        routing = self.routing(hidden_states, temb, prompt)
        is_traced_apart = is_traced() and not self._mixes_once(temb)
        if is_traced_apart or len(routing) > 2 * routing.shape[1] or (len(routing) > 1 and not self._pads_with_zeros()):
            return self._mixed_outputs(routing, hidden_states)
        weight = self._mixed(routing, self.weight, self.expert_weight)
        bias = self._mixed(routing, self.bias, self.expert_bias)
        if len(routing) == 1:
            return self._conv_forward(hidden_states, weight[0], bias[0])
        batch = hidden_states.shape[0]
        apart = hidden_states.reshape(1, -1, *hidden_states.shape[2:])
        output = F.conv2d(
            apart, weight.flatten(0, 1), bias.flatten(), self.stride, self.padding, self.dilation, groups=batch
        )
        return output.unflatten(1, (batch, self.out_channels)).squeeze(0)

    def routing(self, hidden_states: Tensor, temb: Tensor | None, prompt: Tensor | None = None) -> Tensor:
        """Return the weights of the kernels (batch, experts + 1), the own kernel's first.

        It is one row where the router reads the time embedding alone and that is the same for all samples: never in
        SDXL, which adds the pooled prompt and the sizes to it.
        """
        kinds, read = self.router_kind.split("+"), []
        if "input" in kinds:
            read.append(hidden_states.mean(dim=(2, 3)))
        if "prompt" in kinds:
            assert prompt is not None
            read.append(prompt)
        if "time" in kinds:
            assert temb is not None
            activated = F.silu(temb)
            read.append(activated[:1] if self._mixes_once(temb) else activated)
        logits = self.router(torch.cat(read, dim=1))
        if self.activation == "softmax":
            moved = logits.softmax(dim=1) - 1 / logits.shape[1]
        else:
            moved = 2 * logits.sigmoid() - 1
        return torch.cat([moved[:, :1] + 1, moved[:, 1:]], dim=1)

    def probabilities(self, routing: Tensor) -> Tensor:
        """Return routing weights (.., experts + 1) as shares of the kernels, which add up to 1: a softmax without the
        offset of its start, or sigmoids relative to their sum."""
        moved = torch.cat([routing[..., :1] - 1, routing[..., 1:]], dim=-1)
        if self.activation == "softmax":
            return (moved + 1 / routing.shape[-1]).clamp(min=0)
        gates = (moved + 1) / 2
        return gates / gates.sum(dim=-1, keepdim=True)

    def _mixes_once(self, temb: Tensor | None) -> bool:
        return self.router_kind == "time" and temb is not None and repeats_one_row(temb)

    def _pads_with_zeros(self) -> bool:
        """Return whether nobody has set another padding, or replaced `_conv_forward`, as for images that tile."""
        return self.padding_mode == "zeros" and "_conv_forward" not in vars(self)

    def _mixed(self, routing: Tensor, own: Tensor, experts: Tensor) -> Tensor:
        """Return the mixtures (rows of routing, *own.shape) of tensors."""
        rows, flat = routing.to(own.dtype), own.flatten()
        experts = experts.view(-1, len(flat))
        if len(experts) == 1 and self.activation == "softmax":
            # The weights add up to 1. Kernels are larger than caches, and lerp passes over them once.
            return torch.lerp(flat, experts[0], rows[:, 1:]).view(-1, *own.shape)
        return (rows[:, 1:] @ experts + rows[:, :1] * flat).view(-1, *own.shape)

    def _mixed_outputs(self, routing: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the same by linearity: the mixtures of all kernels' outputs.

        It is for a batch that would need more mixed kernels than there are experts, for graphs of any batch size, and
        for convolutions that pad in their own way.
        """
        weight = torch.cat([self.weight, self.expert_weight.view(-1, *self.weight.shape[1:])])
        bias = torch.cat([self.bias, self.expert_bias.flatten()])
        outputs = self._conv_forward(hidden_states, weight, bias)
        return torch.einsum("be,beohw->bohw", routing.to(outputs.dtype), outputs.unflatten(1, (routing.shape[1], -1)))

    def starting_tensors(self, path: str, teacher: nn.Module, family: EditedFamily) -> dict[str, Tensor]:
        """Return the experts, inherited from `teacher`, and the router; nothing where the teacher has them at `path`.

        Raises:
            AsdmError: an expert is not in the teacher.
        """
        state = teacher.state_dict()
        if f"{path}.expert_weight" in state:
            return {}
        gone = next((expert for expert in self.sources if f"{expert}.weight" not in state), None)
        if gone is not None:
            raise AsdmError(f"{path}: its expert {gone} is gone from this model; plan the edit with its removal")
        channels = family.conv_channels(teacher)
        kernels = [_aligned(state[f"{source}.weight"], channels[source], channels[path]) for source in self.sources]
        like = state[f"{path}.weight"]
        router = torch.zeros(self.router.weight.shape, device=like.device, dtype=like.dtype)
        return {
            "expert_weight": torch.cat(kernels).flatten(1),
            "expert_bias": torch.stack([state[f"{source}.bias"] for source in self.sources]),
            "router.weight": router,
            "router.bias": router.new_zeros(len(router)),
        }


def _aligned(kernel: Tensor, has: Channels, wanted: Channels) -> Tensor:
    """Return a kernel (out, in, k, k) on other input channels.

    Those of hidden states go to hidden states, those of the skip connection to the skip connection; the rest is zero.
    """
    aligned = kernel.new_zeros(kernel.shape[0], sum(wanted), *kernel.shape[2:])
    hidden, skip = (min(pair) for pair in zip(has, wanted, strict=True))
    aligned[:, :hidden] = kernel[:, :hidden]
    aligned[:, wanted[0] : wanted[0] + skip] = kernel[:, has[0] : has[0] + skip]
    return aligned


def is_traced() -> bool:
    """Return whether the call is traced into a graph for batches of any size."""
    return torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


class OneTimestepEmbedding(TimestepEmbedding):
    """A TimestepEmbedding whose output shows whether all time steps are equal: it is then one row, repeated."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        embedded = super().forward(sample.contiguous(), condition)
        return repeated_row(embedded) if condition is None and repeats_one_row(sample) else embedded


def repeated_row(rows: Tensor) -> Tensor:
    """Return equal rows (batch, channels) as views of the first one, which `repeats_one_row` recognizes."""
    return rows[:1].expand_as(rows)


def repeats_one_row(rows: Tensor) -> bool:
    """Return whether all rows (batch, channels) are one in memory. Adding another embedding to them makes them
    several."""
    return rows.stride(0) == 0
