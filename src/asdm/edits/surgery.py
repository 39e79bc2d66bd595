"""One handler per kind of edit: what an edit does to a UNet's modules. Names of what stays never change."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from asdm.edits.base import CondConv, GriAttention, Remove, UnitEdit
from asdm.edits.cond_conv import CondConv2d, CondResnetBlock2D, is_traced
from asdm.edits.maps import TimeCompensation, compensation_of
from asdm.edits.regional_attention import AttentionOnMap, GriAttnProcessor, GriTransformer2DModel
from asdm.errors import AsdmError
from asdm.families.unet_structure import TRANSFORMER_BRANCHES, conv_channels, is_branch, layers, recast, removable_units


class RemovedResnet(nn.Module):
    """The shortcut of a removed ResnetBlock2D: the identity, or its pretrained 1x1 convolution.

    A compensation for the removed branch folds into that convolution, or stands in the identity's place.
    """

    def __init__(self, resnet: ResnetBlock2D, edit: Remove):
        super().__init__()
        self.conv_shortcut = resnet.conv_shortcut
        self.output_scale_factor = resnet.output_scale_factor
        needs_map = self.conv_shortcut is None
        self.compensation: Any = compensation_of(edit.compensate, resnet.in_channels) if needs_map else None
        self.kind = edit.compensate
        self.time_compensation: TimeCompensation | None = None
        if edit.compensate_time:
            if resnet.time_emb_proj is None:
                raise AsdmError(f"{edit.unit}: has no time embedding to compensate with; drop compensate_time")
            self.time_compensation = TimeCompensation(resnet.time_emb_proj.in_features, resnet.out_channels)

    def add_map(self, weight: Tensor, bias: Tensor) -> None:
        """Add a fitted map of the input, and of the time embedding behind it: weight (out, in + time) or, for
        a diagonal one, (channels,); bias (out,)."""
        if self.time_compensation is not None:
            channels = self.time_compensation.weight.shape[1]
            weight, by_time = weight[:, :-channels], weight[:, -channels:]
            self.time_compensation.weight.data.add_(by_time)
        if self.compensation is not None:
            self.compensation.add_map(weight, bias)
            return
        shortcut = self.conv_shortcut
        if self.kind == "diagonal":
            shortcut.weight.data.mul_(1 + weight[:, None, None, None])
            shortcut.bias.data.mul_(1 + weight)
        elif self.kind == "linear":
            shortcut.weight.data.add_(weight[:, :, None, None])
        shortcut.bias.data.add_(bias)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        if self.compensation is not None:
            hidden_states = self.compensation(hidden_states)
        if self.time_compensation is not None and temb is not None:
            hidden_states = hidden_states + self.time_compensation(F.silu(temb))[:, :, None, None]
        return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor


class RemovedAttention(nn.Module):
    """The identity in place of a Transformer2DModel, or a compensation."""

    def __init__(self, compensation: nn.Module | None = None):
        super().__init__()
        self.compensation = compensation

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        if self.compensation is not None:
            hidden_states = self.compensation(hidden_states)
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


class RemovedBranch(nn.Module):
    """Adds nothing in place of an attention or feed-forward branch of a transformer block, or a compensation."""

    def __init__(self, compensation: nn.Module | None = None):
        super().__init__()
        self.compensation = compensation

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.compensation is not None:
            return self.compensation(hidden_states)
        nothing = hidden_states.new_zeros(())
        # Of the shape that token merging expects; a graph's runtime would compute it.
        return nothing if is_traced() else nothing.expand(hidden_states.shape)


class RemovedMidBlock(nn.Module):
    """The identity in place of the mid block, or a compensation."""

    has_cross_attention = False

    def __init__(self, compensation: nn.Module | None = None):
        super().__init__()
        self.compensation = compensation

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.compensation is None else self.compensation(hidden_states)


class RemovedDownBlock(nn.Module):
    """The identity in place of the innermost down block; still hands on as many skip connections."""

    has_cross_attention = False

    def __init__(self, skips: int):
        super().__init__()
        self.skips = skips

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states, (hidden_states,) * self.skips


class RemovedDownsampler(nn.Module):
    """The identity in place of what halves the map for the innermost stage: a convolution, or a resnet."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        # What follows may be added to in place (by a T2I-Adapter), and what came in is a skip connection.
        return hidden_states.clone()


class RemovedUpBlock(nn.Module):
    """The identity in place of the innermost up block; takes as many skip connections and leaves them."""

    has_cross_attention = False

    def __init__(self, skips: int):
        super().__init__()
        self.resnets = nn.ModuleList(nn.Identity() for _ in range(skips))  # the UNet counts them

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def apply_edits(unet: UNet2DConditionModel, edits: Sequence[UnitEdit]) -> None:
    """Change `unet` in place.

    Raises:
        AsdmError: an edit names a unit that is not there, one named before, or one inside another.
    """
    names = [edit.unit for edit in edits]
    for name in names:
        if names.count(name) > 1:
            raise AsdmError(f"{name}: named twice by the plan; name it once")
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise AsdmError(f"{name}: lies inside {outer}, which the plan removes as a whole; drop one of them")
    # Removals last: banks look at the convolutions of units that go.
    for edit in sorted(edits, key=lambda edit: isinstance(edit, Remove)):
        for path, module in _HANDLERS[type(edit)](unet, edit).items():
            set_module(unet, path, module)


@contextmanager
def edited(unet: UNet2DConditionModel, edit: UnitEdit) -> Iterator[None]:
    """Apply one edit for the length of the block, then put the original modules back."""
    with swapped(unet, _HANDLERS[type(edit)](unet, edit)):
        yield


@contextmanager
def swapped(root: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules at dotted paths below `root` for the length of the block, then those back that were there."""
    originals = {path: root.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            set_module(root, path, module)
        yield
    finally:
        for path, module in originals.items():
            set_module(root, path, module)


def replaced_paths(unet: UNet2DConditionModel, edit: UnitEdit) -> list[str]:
    """The modules in whose place an edit puts others."""
    return list(_HANDLERS[type(edit)](unet, edit))


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path below `root`."""
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def _remove(unet: UNet2DConditionModel, edit: Remove) -> dict[str, nn.Module]:
    name = edit.unit
    innermost = f"down_blocks.{len(unet.down_blocks) - 1}"
    if name == "mid_block" and unet.mid_block is not None:
        return {name: RemovedMidBlock(_compensation(edit, unet.config.block_out_channels[-1]))}
    if name == innermost and len(unet.down_blocks) > 1:
        if edit.compensate != "none":
            raise AsdmError(f"{name}: the innermost stage has no compensation; drop compensate={edit.compensate}")
        return _remove_lowest_level(unet)
    if name in layers(unet):
        return {name: _removed_layer(unet.get_submodule(name), edit)}
    return _remove_branch(unet, edit)


def _compensation(edit: Remove, channels: int, *, tokens: bool = False) -> nn.Module | None:
    if edit.compensate_time:
        raise AsdmError(f"{edit.unit}: is handed no time embedding; compensate_time is for resnets")
    return compensation_of(edit.compensate, channels, tokens=tokens)


def _removed_layer(layer: nn.Module, edit: Remove) -> nn.Module:
    if isinstance(layer, ResnetBlock2D):
        return RemovedResnet(layer, edit)
    if isinstance(layer, Transformer2DModel):
        return RemovedAttention(_compensation(edit, layer.in_channels))
    raise AsdmError(f"{edit.unit}: removed from this UNet already; drop it from the plan")


def _remove_branch(unet: UNet2DConditionModel, edit: Remove) -> dict[str, nn.Module]:
    name = edit.unit
    block_name, _, branch = name.rpartition(".")
    try:
        block = unet.get_submodule(block_name)
    except AttributeError:
        raise _no_such_unit(unet, name) from None
    if branch not in TRANSFORMER_BRANCHES or not is_branch(block, branch):
        raise _no_such_unit(unet, name)
    norm = TRANSFORMER_BRANCHES[branch][1]
    compensation = _compensation(edit, block.dim, tokens=True)
    return {name: RemovedBranch(compensation), f"{block_name}.{norm}": nn.Identity()}


def _remove_lowest_level(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """As BK-SDM-Tiny does (arXiv 2305.15798, Sec. 3.1): the two innermost blocks and the resampling."""
    last = len(unet.down_blocks) - 1
    outer, inner = unet.config.block_out_channels[last - 1 :]
    if outer != inner:
        raise AsdmError(
            f"down_blocks.{last}: the innermost stage of this UNet cannot go, as it changes the channels "
            f"({outer} to {inner}); remove its units instead"
        )
    return {
        f"down_blocks.{last}": RemovedDownBlock(len(unet.down_blocks[last].resnets)),
        "up_blocks.0": RemovedUpBlock(len(unet.up_blocks[0].resnets)),
        f"down_blocks.{last - 1}.downsamplers": nn.ModuleList([RemovedDownsampler()]),
    }


def _attend_by_region(unet: UNet2DConditionModel, edit: GriAttention) -> dict[str, nn.Module]:
    layer_name = edit.unit.partition(".transformer_blocks.")[0]
    try:
        layer, attention = unet.get_submodule(layer_name), unet.get_submodule(edit.unit)
    except AttributeError:
        raise _no_such_unit(unet, edit.unit) from None
    if not isinstance(layer, Transformer2DModel) or not edit.unit.endswith(".attn1"):
        raise AsdmError(f"{edit.unit}: not a self-attention; gri_attention is for units that end in .attn1")
    block = unet.get_submodule(edit.unit.rpartition(".")[0])
    if getattr(block, "only_cross_attention", False) or not _is_plain(attention):
        raise AsdmError(f"{edit.unit}: not a plain self-attention, and gri_attention knows no other; drop the edit")
    around = layer if isinstance(layer, GriTransformer2DModel) else GriTransformer2DModel.around(layer)
    attentions = {
        f"{layer_name}.{name}": recast(AttentionOnMap, module)
        for name, module in layer.named_modules()
        if isinstance(module, Attention)
    }
    attentions[edit.unit].set_processor(GriAttnProcessor(edit.regions, edit.pool, edit.weighted))
    return {layer_name: around, **attentions}


def _is_plain(attention: nn.Module) -> bool:
    """Whether an attention is what a Stable Diffusion transformer has: projections and nothing else."""
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "add_k_proj")
    return (
        isinstance(attention, Attention)
        and not attention.residual_connection
        and all(getattr(attention, name, None) is None for name in extras)
    )


def _no_such_unit(unet: UNet2DConditionModel, name: str) -> AsdmError:
    known = [unit.name for unit in removable_units(unet)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return AsdmError(
        f"{name}: no such unit in this UNet, which has {len(known)}; "
        f"the nearest is {near[0] if near else 'none'} (`asdm analyze` lists them)"
    )


def _mix_kernels(unet: UNet2DConditionModel, edit: CondConv) -> dict[str, nn.Module]:
    resnet_name, _, conv_name = edit.unit.rpartition(".")
    channels = conv_channels(unet)
    for name in (edit.unit, *edit.experts):
        if name not in channels:
            near = difflib.get_close_matches(name, channels, n=1, cutoff=0.0)
            raise AsdmError(
                f"{name}: no convolution for a bank in this UNet; those are conv1 and conv2 of its resnets, "
                f"the nearest is {near[0] if near else 'none'}"
            )
    resnet = unet.get_submodule(resnet_name)
    conv = unet.get_submodule(edit.unit)
    for name in edit.experts:
        expert = unet.get_submodule(name)
        if not (isinstance(conv, nn.Conv2d) and isinstance(expert, nn.Conv2d)):
            raise AsdmError(f"{edit.unit}: is a bank already, or {name} is; drop the edit")
        if name == edit.unit or expert.weight.shape[0] != conv.weight.shape[0]:
            raise AsdmError(
                f"{edit.unit}: cannot inherit from {name}: an expert is another convolution with as many output "
                f"channels, here {conv.out_channels} and not {expert.out_channels}"
            )
    time_channels = None if resnet.time_emb_proj is None else resnet.time_emb_proj.in_features
    if edit.router != "input" and time_channels is None:
        raise AsdmError(f"{edit.unit}: has no time embedding to route by; use router input")
    around = resnet if isinstance(resnet, CondResnetBlock2D) else recast(CondResnetBlock2D, resnet)
    assert isinstance(conv, nn.Conv2d)
    return {resnet_name: around, f"{resnet_name}.{conv_name}": CondConv2d.around(conv, edit, time_channels)}


_HANDLERS: dict[type, Callable[[UNet2DConditionModel, Any], dict[str, nn.Module]]] = {
    Remove: _remove,
    GriAttention: _attend_by_region,
    CondConv: _mix_kernels,
}
