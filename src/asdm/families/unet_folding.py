"""Where projections in a UNet fold: the chains of steps in which nothing else reads what is between two steps.

A transformer is one chain from `proj_in` to `proj_out`. A resnet and the attention behind it are one, and so is the
whole mid block. The chains end there: the output of a layer of the encoder path is also a skip connection, ControlNets
add to the mid block's output, and FreeU scales what a layer of the decoder path reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from asdm.choices import CompensationKind
from asdm.families.folding import Kept, Removed, fold_chain
from asdm.families.unet_removed import RemovedAttention, RemovedBranch, RemovedResnet
from asdm.families.unet_structure import TRANSFORMER_BRANCHES, layers

Steps = Iterator[Kept | Removed]


def fold_projections(unet: UNet2DConditionModel) -> dict[str, CompensationKind]:
    """Fold in place what folds; return the kinds of projections that are then left, for units where that changes."""
    kinds: dict[str, CompensationKind] = {}
    for chain in _layer_chains(unet):
        kinds |= fold_chain([step for name in chain for step in _layer_steps(name, unet.get_submodule(name))])
    for name in layers(unet):
        module: Any = unet.get_submodule(name)
        if isinstance(module, Transformer2DModel) and module.is_input_continuous:
            kinds |= fold_chain(list(_transformer_steps(name, module)), reader=module.proj_out)
    return kinds


def projection_folds(unet: UNet2DConditionModel, unit: str) -> bool:
    """Return whether a projection in a unit's place folds, whatever else is removed."""
    place, _, branch = unit.rpartition(".")
    if unit in layers(unet):
        resnet = unet.get_submodule(unit.replace(".attentions.", ".resnets."))
        return getattr(resnet, "conv_shortcut", None) is not None
    if branch not in TRANSFORMER_BRANCHES:
        return False
    blocks, _, index = place.rpartition(".")
    last = len(list(unet.get_submodule(blocks).children())) - 1
    return (branch, int(index)) in (("attn1", 0), ("ff", last))


def _layer_chains(unet: UNet2DConditionModel) -> list[list[str]]:
    """Return the resnets and attentions of each chain."""
    chains: dict[str, list[str]] = {}
    for name in layers(unet):
        block, _, index = name.replace(".attentions.", ".").replace(".resnets.", ".").rpartition(".")
        chains.setdefault("mid_block" if block == "mid_block" else f"{block}.{index}", []).append(name)
    return list(chains.values())


def _layer_steps(name: str, layer: Any) -> Steps:
    if isinstance(layer, RemovedResnet):
        scale = layer.output_scale_factor
        if layer.conv_shortcut is not None:
            time = () if layer.time_compensation is None else (layer.time_compensation,)
            yield Kept((layer.conv_shortcut, *time), constant=layer.conv_shortcut, scale=scale)
        elif layer.compensation is not None:
            yield Removed(name, layer, scale)
        elif scale != 1:
            yield Kept()
    elif isinstance(layer, RemovedAttention):
        if layer.compensation is not None:
            yield Removed(name, layer)
    elif isinstance(layer, ResnetBlock2D):
        shortcut, scale = layer.conv_shortcut, layer.output_scale_factor
        if shortcut is None:
            yield Kept(constant=layer.conv2, scale=scale)
        else:
            yield Kept((layer.conv2, shortcut), constant=shortcut, scale=scale)
    elif isinstance(layer, Transformer2DModel) and layer.is_input_continuous:
        yield Kept(constant=layer.proj_out)
    else:
        yield Kept()


def _transformer_steps(name: str, transformer: Transformer2DModel) -> Steps:
    yield Kept((transformer.proj_in,), constant=transformer.proj_in)
    for index, block in enumerate(transformer.transformer_blocks):
        is_known = isinstance(block, BasicTransformerBlock)
        if not is_known or block.norm_type != "layer_norm" or block.pos_embed is not None:
            yield Kept()
            continue
        for branch in TRANSFORMER_BRANCHES:
            yield from _branch_steps(f"{name}.transformer_blocks.{index}.{branch}", getattr(block, branch))
            if branch == "attn1" and hasattr(block, "fuser"):  # GLIGEN's, which reads what attn1 adds to
                yield Kept()


def _branch_steps(name: str, branch: Any) -> Steps:
    if isinstance(branch, RemovedBranch):
        if branch.compensation is not None:
            yield Removed(name, branch)
    elif branch is not None:
        yield Kept(constant=branch.to_out[0] if hasattr(branch, "to_out") else branch.net[2])
