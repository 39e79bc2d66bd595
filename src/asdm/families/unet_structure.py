"""The structure of a Stable Diffusion UNet: its removable units, their names and their order.

Every unit is a residual branch, so each can be removed alone: its shortcut stays, and no skip connection and no channel
count changes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, UNetMidBlock2DCrossAttn
from torch import nn

from asdm.errors import AsdmError
from asdm.families.records import Unit, UnitKind, block_of
from asdm.families.tensors import has_ip_adapter

# Branch of a BasicTransformerBlock -> (kind, the norm that feeds it alone)
TRANSFORMER_BRANCHES: dict[str, tuple[UnitKind, str]] = {
    "attn1": ("self_attention", "norm1"),
    "attn2": ("cross_attention", "norm2"),
    "ff": ("feed_forward", "norm3"),
}


def blocks(unet: UNet2DConditionModel) -> list[str]:
    """Return the UNet's blocks: the encoder's, the mid block, the decoder's."""
    down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    up = [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    return [*down, *(["mid_block"] if unet.mid_block is not None else []), *up]


def layers(unet: UNet2DConditionModel) -> list[str]:
    """Return every resnet and attention, in order of execution."""
    names = []
    for block_name in blocks(unet):
        block = unet.get_submodule(block_name)
        positions = [(2 * i, f"{block_name}.resnets.{i}") for i in range(len(getattr(block, "resnets", ())))]
        positions += [(2 * i + 1, f"{block_name}.attentions.{i}") for i in range(len(getattr(block, "attentions", ())))]
        names += [name for _, name in sorted(positions)]
    return names


def execution_order(unet: UNet2DConditionModel) -> list[str]:
    """Return the modules whose outputs can be cached, in order: each block's layers, then its resampler."""
    order: list[str] = []
    for block_name in blocks(unet):
        order += [name for name in layers(unet) if block_of(name) == block_name]
        for kind in ("downsamplers", "upsamplers"):
            samplers = getattr(unet.get_submodule(block_name), kind, None) or ()
            order += [f"{block_name}.{kind}.{index}" for index in range(len(samplers))]
    return order


def removable_units(unet: UNet2DConditionModel) -> list[Unit]:
    """Return all removable units in order of execution, an attention before its parts."""
    units = []
    for name in layers(unet):
        module = unet.get_submodule(name)
        if isinstance(module, ResnetBlock2D):
            units.append(Unit(name, "resnet", None))
        elif isinstance(module, Transformer2DModel):
            units.append(Unit(name, "attention", None))
            for index, block in enumerate(module.transformer_blocks):
                units += [
                    Unit(f"{name}.transformer_blocks.{index}.{branch}", kind, name)
                    for branch, (kind, _) in TRANSFORMER_BRANCHES.items()
                    if is_branch(block, branch)
                ]
    return units


def is_level(name: str) -> bool:
    """Return whether the name of a removal is that of the lowest-resolution level: its down block's."""
    return name.startswith("down_blocks.") and name.count(".") == 1


def conv_channels(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """Return the input channels of each resnet's `conv1` and `conv2`: of hidden states, and of the skip connection.

    Only the first convolution of an up block's resnet reads a skip connection, behind the hidden states.
    """
    channels: dict[str, tuple[int, int]] = {}
    hidden = unet.config.block_out_channels[-1]
    for name in layers(unet):
        resnet = unet.get_submodule(name)
        in_decoder = name.startswith("up_blocks.")
        if isinstance(resnet, ResnetBlock2D):
            skip = resnet.in_channels - hidden if in_decoder else 0
            channels[f"{name}.conv1"] = (resnet.in_channels - skip, skip)
            channels[f"{name}.conv2"] = (resnet.out_channels, 0)
        if in_decoder and ".resnets." in name:
            shortcut = getattr(resnet, "conv_shortcut", None)  # a removed resnet keeps it
            hidden = hidden if shortcut is None else shortcut.out_channels
    return channels


def prompt_channels(unet: UNet2DConditionModel, name: str) -> int:
    """Return the width of the prompt that a module's block cross-attends to; 0 for a block without cross-attention."""
    block_name = block_of(name)
    block = unet.get_submodule(block_name)
    if not isinstance(block, CrossAttnDownBlock2D | UNetMidBlock2DCrossAttn | CrossAttnUpBlock2D):
        return 0
    widths = unet.config.cross_attention_dim
    if isinstance(widths, int):
        return widths
    level = -1 if block_name == "mid_block" else int(block_name.rpartition(".")[2])
    return (widths[::-1] if block_name.startswith("up_blocks") else widths)[level]


def is_covered_by(name: str, removed: Collection[str]) -> bool:
    """Return whether removing `removed` removes a unit: by name, with what contains it, or as the up block of the
    lowest-resolution level, which is named by its down block."""
    innermost = any(is_level(other) for other in removed)
    inside = any(name == other or name.startswith(f"{other}.") for other in removed)
    return inside or (innermost and block_of(name) == "up_blocks.0")


def is_branch(block: nn.Module, branch: str) -> bool:
    """Return whether a transformer block has this branch, and it is not removed already."""
    module = getattr(block, branch, None)
    if not isinstance(block, BasicTransformerBlock) or not isinstance(module, nn.Module):
        return False
    return any(module.children()) and not hasattr(module, "compensation")


def unlike(unet: UNet2DConditionModel, other: UNet2DConditionModel) -> str | None:
    """Return the first config field by which two UNets read or write other tensors; None where one can replace the
    other."""
    fields = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "time_cond_proj_dim")
    return unlike_in(unet, other, *fields)


def unlike_in(unet: UNet2DConditionModel, other: UNet2DConditionModel, *fields: str) -> str | None:
    """Return the first of these fields that two UNets' configs differ in. Saving turns tuples into lists."""

    def value(of: UNet2DConditionModel, field: str) -> Any:
        found = of.config[field]
        return list(found) if isinstance(found, tuple) else found

    return next((field for field in fields if value(unet, field) != value(other, field)), None)


# Fields of a UNet's config, the values that need no further input, and the input that other values need.
_KNOWN_INPUTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "class_embed_type": ((None,), "class_labels"),
    "num_class_embeds": ((None,), "class_labels"),
    "addition_embed_type": ((None, "text", "text_time"), "image embeddings in added_cond_kwargs"),
    "encoder_hid_dim_type": ((None, "text_proj"), "image embeddings in added_cond_kwargs"),
    "attention_type": (("default",), "boxes in cross_attention_kwargs (GLIGEN)"),
    "dual_cross_attention": ((False,), "two prompts at once"),
}


def require_known_inputs(unet: UNet2DConditionModel, name: str = "") -> None:
    """Raise an AsdmError where a UNet needs inputs beside noisy latents, a time step, a guidance scale and what prompts
    give."""
    before = f"{name}: " if name else ""
    if has_ip_adapter(unet):
        raise AsdmError(f"{before}an IP-Adapter is loaded, and there is no image for it here; unload it first")
    for field, (known, read) in _KNOWN_INPUTS.items():
        value = unet.config.get(field, known[0])
        if value not in known:
            raise AsdmError(
                f"{before}its UNet has {field} {value}, and reads {read}, which is not given to it here; use a "
                "checkpoint that is conditioned by prompts alone"
            )
    widths = unet.config.cross_attention_dim
    if isinstance(widths, list | tuple) and len(set(map(str, widths))) > 1:
        raise AsdmError(f"{before}its UNet has cross_attention_dim {list(widths)}; one width for all blocks is needed")
