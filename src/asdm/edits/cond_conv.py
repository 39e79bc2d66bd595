"""The edit `cond_conv` (CLME-CondConv): a kept convolution inherits the kernels of removed ones as experts.

Cross-layer multi-expert conditional convolution (named in the abstract of arXiv 2312.15516; the mixing of
kernels before one convolution is CondConv's, arXiv 1904.04971, Sec. 3; the rest is inferred): y = conv(x, sum_i
a_i W_i), W_0 the convolution's own kernel, W_1.. those of convolutions elsewhere in the teacher.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from asdm.choices import Router
from asdm.edits.base import EditedFamily, UnitEdit, register_edit
from asdm.edits.prompted_blocks import prompted
from asdm.edits.recast import Overlay, recast
from asdm.errors import AsdmError

_RESNETS = ".resnets."  # between the path of a block and its resnets'
_IN_EXPERTS = "merged_into_experts"  # an attribute of an adapter's layer: the adapters merged into the experts
Channels = tuple[int, int]  # of a convolution's input: of hidden states, and of the skip connection behind them


@register_edit
@dataclass(frozen=True)
class CondConv(UnitEdit):
    """Give a convolution expert kernels, mixed with its own (CLME-CondConv).

    `unit` names a resnet's `conv1` or `conv2` that stays, `experts` the teacher's convolutions, mostly of removed
    units, whose kernels join the own one. `router`: what the mixture depends on: "input", the input's average;
    "prompt", the prompt's; "time", the time embedding; "input+time" or "prompt+time". `activation`: "softmax", or
    "sigmoid" for weights that do not compete.
    """

    edit = "cond_conv"
    no_split_modules: ClassVar = ("CondResnetBlock2D",)
    experts: list[str]
    router: Router = "input"
    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experts:
            raise AsdmError("experts is empty; name the convolutions to inherit from")

    def replacements(self, model: Any, family: EditedFamily) -> dict[str, nn.Module]:
        resnet_name = self.unit.rpartition(".")[0]
        self._require_known(family.conv_channels(model))
        resnet, conv = model.get_submodule(resnet_name), model.get_submodule(self.unit)
        for name in self.experts:
            expert = model.get_submodule(name)
            if not (isinstance(conv, nn.Conv2d) and isinstance(expert, nn.Conv2d)):
                raise AsdmError(f"{self.unit}: has expert kernels already, or {name} has; drop the edit")
            if name == self.unit or expert.weight.shape[0] != conv.weight.shape[0]:
                raise AsdmError(
                    f"{self.unit}: cannot inherit from {name}: an expert is another convolution with as many output "
                    f"channels, here {conv.out_channels} and not {expert.out_channels}"
                )
        read = self._read_channels(model, family, resnet)
        around = recast(CondResnetBlock2D, resnet)
        around.expert_convs = (*around.expert_convs, self.unit.rpartition(".")[2])
        assert isinstance(conv, nn.Conv2d)
        found: dict[str, nn.Module] = {resnet_name: around, self.unit: CondConv2d.around(conv, self, read)}
        if "prompt" in read:
            block_name = self.unit.partition(_RESNETS)[0]
            found = {block_name: prompted(model.get_submodule(block_name)), **found}
        if self.router == "time":
            found["time_embedding"] = recast(OneTimestepEmbedding, model.time_embedding)
        return found

    def changed_paths(self, model: Any, family: EditedFamily) -> list[str]:
        """Return the convolution: the modules around it only pass on what it reads."""
        return [self.unit]

    @classmethod
    def adapted(cls, path: str, module: nn.Module, student: Any) -> nn.Module:
        """Return a convolution without experts as one of the class that a `CondResnetBlock2D` expects there."""
        return recast(CondConv2d, module) if type(module) is nn.Conv2d else module

    def _read_channels(self, model: Any, family: EditedFamily, resnet: Any) -> dict[str, int]:
        """Return the channels of each part of what the router reads.

        Raises:
            AsdmError: there is no time embedding or prompt at this convolution.
        """
        time = 0 if resnet.time_emb_proj is None else resnet.time_emb_proj.in_features
        channels = {
            "input": model.get_submodule(self.unit).in_channels,
            "prompt": family.prompt_channels(model, self.unit),
            "time": time,
        }
        read = {name: channels[name] for name in self.router.split("+")}
        missing = next((name for name, width in read.items() if not width), None)
        if missing is not None:
            what = "time embedding" if missing == "time" else "cross-attention in its block, hence no prompt"
            others = [name for name in ("input", "time") if channels[name]]
            raise AsdmError(f"{self.unit}: has no {what} to route by; use router {' or '.join(others)}")
        return read

    def _require_known(self, channels: Mapping[str, Channels]) -> None:
        for name in (self.unit, *self.experts):
            if name not in channels:
                near = difflib.get_close_matches(name, channels, n=1, cutoff=0.0)
                raise AsdmError(
                    f"{name}: no convolution for expert kernels in this model; those are conv1 and conv2 of its "
                    f"resnets, the nearest is {near[0] if near else 'none'}"
                )

    def covers(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        """None: the resnet around the convolution stays as removable as it is."""
        return []

    def gives_way_to(self, units: Collection[str], family: EditedFamily) -> bool:
        """Return False for an edit of the same convolution, which is an error."""
        return family.is_covered_by(self.unit, [unit for unit in units if unit != self.unit])


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
    def around(cls, conv: nn.Conv2d, edit: CondConv, read: Mapping[str, int]) -> CondConv2d:
        """Return a convolution with empty experts for `edit`, whose router reads so many channels of each of "input",
        "prompt" and "time"; its own kernel is shared."""
        assert conv.bias is not None and conv.groups == 1
        places: Any = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "device": "meta"}
        kernel_size: Any = conv.kernel_size
        mixed = cls(conv.in_channels, conv.out_channels, kernel_size, **places)
        mixed.weight, mixed.bias = conv.weight, conv.bias
        mixed.router_kind, mixed.activation, mixed.sources = edit.router, edit.activation, list(edit.experts)
        experts = len(edit.experts)
        # One matrix of all experts' kernels (experts * out, in * k * k): optimisers for matrices reshape kernels so,
        # and `.to(memory_format=torch.channels_last)` rejects tensors of five dimensions.
        mixed.expert_weight = nn.Parameter(torch.zeros(experts * conv.out_channels, conv.weight[0].numel()))
        mixed.expert_bias = nn.Parameter(torch.zeros(experts, conv.out_channels))
        mixed.router = nn.Linear(sum(read.values()), experts + 1)
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

        It is one row where the router reads the time step alone and all samples have the same one.
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


def is_traced() -> bool:
    """Return whether the call is traced into a graph for batches of any size."""
    return torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def _aligned(kernel: Tensor, has: Channels, wanted: Channels) -> Tensor:
    """Return a kernel (out, in, k, k) on other input channels.

    Those of hidden states go to hidden states, those of the skip connection to the skip connection; the rest is zero.
    """
    aligned = kernel.new_zeros(kernel.shape[0], sum(wanted), *kernel.shape[2:])
    hidden, skip = (min(pair) for pair in zip(has, wanted, strict=True))
    aligned[:, :hidden] = kernel[:, :hidden]
    aligned[:, wanted[0] : wanted[0] + skip] = kernel[:, has[0] : has[0] + skip]
    return aligned


class CondResnetBlock2D(ResnetBlock2D):
    """A ResnetBlock2D that passes the time embedding, and the pooled prompt (batch, channels) where its block gives it
    one, to its convolutions with expert kernels, `expert_convs`."""

    expert_convs: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        # As peft and diffusers do when they unload adapters, whether these were merged or not.
        if name in self.expert_convs and name in self._modules and _has_experts(self._modules[name]):
            _require_followed(self._modules[name])
        super().__setattr__(name, value)

    @property
    def reads_prompt(self) -> bool:
        """Whether the mixture of a convolution's kernels depends on the prompt."""
        parts = [part for conv in (self.conv1, self.conv2) for part in conv.modules()]
        return any(isinstance(part, CondConv2d) and part.sources and "prompt" in part.router_kind for part in parts)

    def forward(
        self, input_tensor: Tensor, temb: Tensor, *args: Any, prompt: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        conditional = {}
        for name in self.expert_convs:
            conv = self.get_submodule(name)
            _require_kept(name, conv)
            _require_followed(conv)
            if _has_experts(conv):
                conditional[name] = partial(conv, temb=temb, prompt=prompt)
        # The stock forward; in this call, `self.conv1` and `self.conv2` get two more arguments.
        return ResnetBlock2D.forward(Overlay(self, conditional), input_tensor, temb, *args, **kwargs)  # type: ignore[arg-type]


def _has_experts(conv: nn.Module) -> bool:
    """Return whether a convolution has expert kernels, or is peft's layer around one that has."""
    return any(isinstance(module, CondConv2d) and module.sources for module in conv.modules())


def _require_kept(name: str, conv: nn.Module) -> None:
    """Raise an AsdmError where a tool has put another layer, without experts, in the place of a `CondConv2d`."""
    if not any(isinstance(module, CondConv2d) for module in conv.modules()):
        raise AsdmError(
            f"{name}: a {type(conv).__name__} is in the place of a CondConv2d, and has no expert kernels; leave layers "
            "of this class out where a tool replaces layers (quanto: quantize(.., exclude=[..]))"
        )


def _require_followed(conv: nn.Module) -> None:
    """Raise an AsdmError where a LoRA was merged into the own kernel alone."""
    merged = _merged(conv)
    if merged != _followed(conv):
        names = ", ".join(merged or _followed(conv))
        raise AsdmError(
            f"a LoRA ({names}) was merged into a convolution's own kernel, or out of it, and not "
            "its expert kernels: merge and unmerge by fuse_lora() and unfuse_lora() of the UNet or the pipeline"
        )


def require_fusable(unet: nn.Module) -> None:
    """Raise an AsdmError where an adapter cannot be merged into a convolution with expert kernels.

    The kernels must be mixed by a softmax, and the adapter must do no more than add to a kernel.
    """
    for name, layer in _adapted(unet).items():
        _require_followed(layer)
        if layer.base_layer.activation != "softmax" or not _only_adds(layer):
            raise AsdmError(
                f"{name}: expert kernels mixed by {layer.base_layer.activation} and an adapter of type "
                f"{type(layer).__name__} cannot be fused; softmax and a plain LoRA can: leave the adapter unfused"
            )


@contextmanager
def experts_following(unet: nn.Module) -> Iterator[None]:
    """Repeat on the expert kernels what adapters add to the own kernel, or subtract, within the block.

    The weights of a softmax add up to 1, so the result equals that of the adapter beside the convolution.
    """
    with ExitStack() as stack:
        for layer in _adapted(unet).values():
            if _merged(layer) == _followed(layer):
                stack.enter_context(_experts_following(layer))
        yield


@contextmanager
def _experts_following(layer: Any) -> Iterator[None]:
    conv = layer.base_layer
    weight, bias = conv.weight.clone(), conv.bias.clone()
    yield
    conv.expert_weight.data += (conv.weight.data - weight.data).flatten(1).repeat(len(conv.sources), 1)
    conv.expert_bias.data += conv.bias.data - bias.data
    setattr(layer, _IN_EXPERTS, _merged(layer))
    # A pipeline's `unfuse_lora`, and peft for a disabled adapter, call this of each layer.
    layer.unmerge = partial(_unmerge_with_experts, layer)


def _unmerge_with_experts(layer: Any) -> None:
    """Take adapters out of the own kernel, as peft's layer does, and out of the expert kernels if they are there."""
    with _experts_following(layer) if _merged(layer) == _followed(layer) else nullcontext():
        type(layer).unmerge(layer)


def _adapted(unet: nn.Module) -> dict[str, Any]:
    """Return peft's layers around convolutions with expert kernels, by name."""
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "merged_adapters")}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer.base_layer, CondConv2d) and layer.base_layer.sources
    }


def _merged(layer: nn.Module) -> tuple[str, ...]:
    """Return the adapters merged into the own kernel."""
    return tuple(getattr(layer, "merged_adapters", ()))


def _followed(layer: nn.Module) -> tuple[str, ...]:
    """Return the adapters merged into the expert kernels."""
    return tuple(getattr(layer, _IN_EXPERTS, ()))


def _only_adds(layer: nn.Module) -> bool:
    """Return whether peft's layer only adds to the kernel; by class names, as a student loads without peft."""
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    return bool(kinds & {"LoraLayer", "LycorisLayer"}) and not getattr(layer, "lora_variant", None)


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
