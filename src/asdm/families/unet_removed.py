"""Modules that take the place of what is removed from a UNet. Names of what stays never change.

None of them returns its input tensor; `RemovedUnit` says why.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from asdm.choices import CompensationKind
from asdm.edits.expert_kernels import is_traced
from asdm.edits.projections import TimeProjection, projection_of
from asdm.edits.remove import RemovedUnit
from asdm.errors import AsdmError
from asdm.families.unet_structure import TRANSFORMER_BRANCHES, is_branch, layers


class RemovedResnet(RemovedUnit):
    """The shortcut of a removed ResnetBlock2D: the identity, or its pretrained 1x1 convolution.

    A projection for the removed branch folds into that convolution, or takes the identity's place.
    """

    def __init__(self, resnet: ResnetBlock2D, unit: str, compensate: CompensationKind, compensate_time: bool):
        super().__init__()
        self.conv_shortcut = resnet.conv_shortcut
        self.output_scale_factor = resnet.output_scale_factor
        if self.conv_shortcut is None:
            self.compensation = projection_of(compensate, resnet.in_channels)
        self.kind = compensate
        self.time_compensation: TimeProjection | None = None
        if compensate_time:
            if resnet.time_emb_proj is None:
                raise AsdmError(f"{unit}: has no time embedding to compensate with; drop compensate_time")
            self.time_compensation = TimeProjection(resnet.time_emb_proj.in_features, resnet.out_channels)

    def add_projection(self, weight: Tensor, bias: Tensor) -> None:
        """As the base's, and of the time embedding behind the input: weight (out, in + time)."""
        if self.time_compensation is not None:
            channels = self.time_compensation.weight.shape[1]
            weight, by_time = weight[:, :-channels], weight[:, -channels:]
            self.time_compensation.weight.data.add_(by_time)
        if self.compensation is not None:
            self.compensation.add_projection(weight, bias)
            return
        shortcut = self.conv_shortcut
        if self.kind == "diagonal":
            shortcut.weight.data.mul_(1 + weight[:, None, None, None])
            shortcut.bias.data.mul_(1 + weight)
        elif self.kind == "linear":
            shortcut.weight.data.add_(weight[:, :, None, None])
        shortcut.bias.data.add_(bias)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        keep = self.projected if self.conv_shortcut is None else self.conv_shortcut
        hidden_states = keep(hidden_states)
        if self.time_compensation is not None and temb is not None:
            hidden_states = hidden_states + self.time_compensation(F.silu(temb))[:, :, None, None]
        return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor


class RemovedAttention(RemovedUnit):
    """The identity in place of a Transformer2DModel, or a projection."""

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        hidden_states = self.projected(hidden_states)
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


class RemovedBranch(RemovedUnit):
    """Adds nothing in place of a branch of a transformer block, or a projection of its input."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.compensation is not None:
            return self.compensation(hidden_states)
        nothing = hidden_states.new_zeros(())
        # Token merging expects this shape. A graph's runtime would compute it, so graphs get the scalar.
        return nothing if is_traced() else nothing.expand(hidden_states.shape)


class RemovedMidBlock(RemovedUnit):
    """The identity in place of the mid block, or a projection."""

    has_cross_attention = False

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.projected(hidden_states)


class RemovedDownBlock(nn.Module):
    """The identity in place of the lowest-resolution down block; still returns as many skip connections."""

    has_cross_attention = False

    def __init__(self, skips: int):
        super().__init__()
        self.skips = skips

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states.clone(), (hidden_states,) * self.skips


class RemovedDownsampler(nn.Module):
    """The identity in place of what halves the resolution before the lowest level: a convolution, or a resnet."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.clone()


class RemovedUpBlock(nn.Module):
    """The identity in place of the lowest-resolution up block; takes as many skip connections and ignores them."""

    has_cross_attention = False

    def __init__(self, skips: int):
        super().__init__()
        self.resnets = nn.ModuleList(nn.Identity() for _ in range(skips))  # the UNet counts them

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.clone()


def removed_modules(
    unet: UNet2DConditionModel, name: str, compensate: CompensationKind, compensate_time: bool
) -> dict[str, nn.Module] | None:
    """Return what takes the place of a unit, of the mid block or of the lowest-resolution level; None: no such unit.

    Raises:
        AsdmError: it cannot be removed, or not be compensated so.
    """
    innermost = f"down_blocks.{len(unet.down_blocks) - 1}"
    if name == "mid_block" and unet.mid_block is not None:
        require_no_time(name, compensate_time)
        return {name: RemovedMidBlock(projection_of(compensate, unet.config.block_out_channels[-1]))}
    if name == innermost and len(unet.down_blocks) > 1:
        if compensate != "none":
            raise AsdmError(f"{name}: the lowest-resolution level has no compensation; drop compensate={compensate}")
        return _remove_lowest_level(unet)
    if name in layers(unet):
        layer = unet.get_submodule(name)
        if isinstance(layer, ResnetBlock2D):
            return {name: RemovedResnet(layer, name, compensate, compensate_time)}
        if isinstance(layer, Transformer2DModel):
            require_no_time(name, compensate_time)
            return {name: RemovedAttention(projection_of(compensate, layer.in_channels))}
        raise AsdmError(f"{name}: removed from this UNet already; drop it from the plan")
    return _removed_branch(unet, name, compensate, compensate_time)


def require_no_time(name: str, compensate_time: bool) -> None:
    """Raise an AsdmError for `compensate_time` where the module gets no time embedding."""
    if compensate_time:
        raise AsdmError(f"{name}: gets no time embedding; compensate_time is for resnets")


def _removed_branch(
    unet: UNet2DConditionModel, name: str, compensate: CompensationKind, compensate_time: bool
) -> dict[str, nn.Module] | None:
    block_name, _, branch = name.rpartition(".")
    try:
        block = unet.get_submodule(block_name)
    except AttributeError:
        return None
    if branch not in TRANSFORMER_BRANCHES or not is_branch(block, branch):
        return None
    require_no_time(name, compensate_time)
    norm = TRANSFORMER_BRANCHES[branch][1]
    projection = projection_of(compensate, block.dim, tokens=True)
    return {name: RemovedBranch(projection), f"{block_name}.{norm}": nn.Identity()}


def _remove_lowest_level(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """Remove the two lowest-resolution blocks and the resampling, as BK-SDM-Tiny does (arXiv 2305.15798, Sec. 3.1)."""
    last = len(unet.down_blocks) - 1
    outer, inner = unet.config.block_out_channels[last - 1 :]
    if outer != inner:
        raise AsdmError(
            f"down_blocks.{last}: the lowest-resolution level of this UNet cannot go, as it changes the channels "
            f"({outer} to {inner}); remove its units instead"
        )
    return {
        f"down_blocks.{last}": RemovedDownBlock(len(unet.down_blocks[last].resnets)),
        "up_blocks.0": RemovedUpBlock(len(unet.up_blocks[0].resnets)),
        f"down_blocks.{last - 1}.downsamplers": nn.ModuleList([RemovedDownsampler()]),
    }
