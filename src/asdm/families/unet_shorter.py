"""UNets with fewer layers, transformer blocks or levels: stock models, as BK-SDM makes them (arXiv 2305.15798).

Unlike a removed unit, a dropped layer goes with its shortcut and its skip connection, so what stays has new numbers.
The student's config keeps the edit and what it changed of the original's config, by which files for the original, such
as LoRA, find their modules. Their names begin with "_", so the stock class ignores them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from asdm.edits.drop_layers import LEAST_LEVELS, DropLayers
from asdm.errors import AsdmError
from asdm.families.unet_structure import TRANSFORMER_BRANCHES

_EDITS, _ORIGINAL = "_edits", "_original"  # fields of a student's config
_WITHOUT_ATTENTION = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
_MID_WITHOUT_ATTENTION = {"UNetMidBlock2DCrossAttn": "UNetMidBlock2D"}
_ALONG_THE_DECODER = ("up_block_types", "reverse_transformer_layers_per_block")
_TRANSFORMER_BLOCK = re.compile(r"(.+)\.transformer_blocks\.(\d+)")


def shorter_config(unet: UNet2DConditionModel, edit: DropLayers) -> dict[str, Any]:
    """Return the config of the shorter UNet.

    Raises:
        AsdmError: the UNet has fewer layers or levels than the edit keeps, no transformer block of a name, or edits of
            its own; or no stock UNet has such attentions.
    """
    original: dict[str, Any] = {key: value for key, value in unet.config.items() if key in (_EDITS, _ORIGINAL)}
    config: dict[str, Any] = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    if config.pop("edits", None):
        raise AsdmError("drop_layers: is for an original UNet, and this one has edits; start from the original")
    kept = _kept_levels(config, edit)
    before = dict(config)
    _drop_levels(config, kept)
    config["layers_per_block"] = _kept_layers(before["layers_per_block"], edit, kept)
    _drop_from_lists(config, edit)
    _drop_middle(config, edit)
    if edit.transformer_blocks:
        _drop_transformer_blocks(unet, config, edit)
    original |= {key: value for key, value in before.items() if config[key] != value}
    return config | {_EDITS: [edit.to_dict()], _ORIGINAL: original}


def _kept_levels(config: Mapping[str, Any], edit: DropLayers) -> int:
    channels = config["block_out_channels"]
    levels = len(channels)
    kept = edit.levels or levels
    if kept > levels:
        raise AsdmError(f"levels={kept}: this UNet has {levels}; allowed are {LEAST_LEVELS} to {levels}")
    if kept < levels and channels[kept - 1] != channels[kept]:
        raise AsdmError(
            f"levels={kept}: what enters the first level that would go has {channels[kept - 1]} channels, and what "
            f"leaves it {channels[kept]}; keep more levels"
        )
    return kept


def _drop_levels(config: dict[str, Any], kept: int) -> None:
    """Shorten lists by level, from the outermost one inwards or along the decoder path."""
    levels = len(config["block_out_channels"])
    for name, value in config.items():
        if isinstance(value, list | tuple) and len(value) == levels:
            config[name] = value[levels - kept :] if name in _ALONG_THE_DECODER else value[:kept]


def _kept_layers(layers: Any, edit: DropLayers, levels: int) -> int | list[int]:
    """Return `layers_per_block` of the student: a number where all levels have the same."""
    have = [layers] * levels if isinstance(layers, int) else list(layers)[:levels]
    given = edit.layers_per_block
    if isinstance(given, list) and len(given) != levels:
        raise AsdmError(f"layers_per_block={given}: a list has a number for each level that stays, here {levels}")
    kept = [edit.layers_of(level) for level in range(levels)]
    for count, most in zip(kept, have, strict=True):
        if count > most:
            raise AsdmError(f"layers_per_block={count}: this UNet has {most}; allowed are 1 to {most}")
    return kept[0] if len(set(kept)) == 1 else kept


def _drop_from_lists(config: dict[str, Any], edit: DropLayers) -> None:
    """Shorten lists of transformer blocks that are by layer."""
    levels = len(config["block_out_channels"])
    for name, fewer in (
        ("transformer_layers_per_block", lambda counts, short: counts[:short]),
        ("reverse_transformer_layers_per_block", lambda counts, short: [*counts[:short], counts[-1]]),
    ):
        if not isinstance(config.get(name), list | tuple):
            continue
        if any(isinstance(each, list | tuple) for each in config[name]):
            order = list(range(levels))[:: -1 if name in _ALONG_THE_DECODER else 1]
            config[name] = [
                fewer(each, edit.layers_of(level)) if isinstance(each, list | tuple) else each
                for level, each in zip(order, config[name], strict=True)
            ]


def _drop_middle(config: dict[str, Any], edit: DropLayers) -> None:
    if not edit.mid_block:
        config["mid_block_type"] = None
    elif not edit.mid_attention:
        kind = config["mid_block_type"]
        if kind not in (*_MID_WITHOUT_ATTENTION, *_MID_WITHOUT_ATTENTION.values()):
            raise AsdmError(f"mid_attention: this UNet's mid block is {kind}; leave it as it is, or drop mid_block")
        config["mid_block_type"] = _MID_WITHOUT_ATTENTION.get(kind, kind)


# -- transformer blocks ------------------------------------------------------------------------------------


def _drop_transformer_blocks(unet: Any, config: dict[str, Any], edit: DropLayers) -> None:
    """Set the number of transformer blocks of each layer that stays, and the types of blocks without attentions."""
    kept = kept_transformer_blocks(unet, edit.transformer_blocks)
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(config)
    depths: dict[str, list[Any]] = {}
    for side in ("down", "up"):
        types = list(config[f"{side}_block_types"])
        depths[side] = [1] * len(types)
        for index, block in enumerate(student.get_submodule(f"{side}_blocks")):
            names = [f"{side}_blocks.{index}.attentions.{i}" for i in range(len(getattr(block, "attentions", ())))]
            counts = [len(kept[layer_in_original(name, student, unet)]) for name in names]
            if any(counts) and not all(counts):
                raise AsdmError(
                    f"transformer_blocks: {side}_blocks.{index} would keep some of its attentions, and no stock UNet "
                    "does; name all transformer blocks of the block, or leave one in each attention"
                )
            if any(counts):
                depths[side][index] = counts[0] if len(set(counts)) == 1 else counts
            elif counts:
                types[index] = _WITHOUT_ATTENTION.get(types[index], types[index])
        config[f"{side}_block_types"] = types
    if config["mid_block_type"] in _MID_WITHOUT_ATTENTION:
        _set_middle(config, depths["down"], len(kept["mid_block.attentions.0"]))
    config["transformer_layers_per_block"] = depths["down"]
    config["reverse_transformer_layers_per_block"] = depths["up"]


def _set_middle(config: dict[str, Any], down: list[Any], depth: int) -> None:
    """Set the depth of the mid block's attention, which the config has as that of the lowest level's first layer."""
    if not depth:
        raise AsdmError("transformer_blocks: names all of the mid block; drop its attention (mid_attention) instead")
    if config["down_block_types"][-1] not in _WITHOUT_ATTENTION:  # the lowest level has no attention of its own
        down[-1] = depth
    first = down[-1][0] if isinstance(down[-1], list) else down[-1]
    if first != depth:
        raise AsdmError(
            f"transformer_blocks: the mid block would keep {depth}, and the lowest level's first attention {first}; in "
            "a stock UNet both are equal: drop as many of both, or the mid block's attention (mid_attention)"
        )


def kept_transformer_blocks(unet: Any, dropped: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of the transformer blocks of each attention that stay.

    Raises:
        AsdmError: there is no block of a name.
    """
    kept: dict[str, list[int]] = {}
    known = {name: found for name, _ in unet.named_modules() if (found := _TRANSFORMER_BLOCK.fullmatch(name))}
    for name in dropped:
        if name not in known:
            raise AsdmError(
                f"transformer_blocks: {name}: no such transformer block in this UNet, which has {len(known)} "
                "(`asdm analyze` lists their branches)"
            )
    for name, found in known.items():
        kept.setdefault(found[1], [])
        if name not in dropped:
            kept[found[1]].append(int(found[2]))
    return kept


def fitted_removals(unet: UNet2DConditionModel, edit: DropLayers) -> tuple[DropLayers, list[list[str]]]:
    """Return the edit that drops layers alone, and what else goes: runs of units behind each other, in the names of
    the original."""
    trunk = replace(edit, mid_attention=True, transformer_blocks=[], fitted=False)
    runs = [["mid_block.attentions.0", "mid_block.resnets.1"]] if edit.mid_block and not edit.mid_attention else []
    for attention, kept in kept_transformer_blocks(unet, edit.transformer_blocks).items():
        if not kept:
            runs.append([attention])
            continue
        before: int | None = None
        for number in range(len(unet.get_submodule(attention).transformer_blocks)):
            if number in kept:
                continue
            if before is None or number > before + 1:
                runs.append([])
            runs[-1] += [f"{attention}.transformer_blocks.{number}.{branch}" for branch in TRANSFORMER_BRANCHES]
            before = number
    return trunk, runs


# -- names -------------------------------------------------------------------------------------------------


def original_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of the UNet that a shorter one was made of; None for one that was not made so."""
    changed = config.get(_ORIGINAL)
    if not isinstance(changed, Mapping):
        return None
    kept = {key: value for key, value in config.items() if key not in (_EDITS, _ORIGINAL, "edits")}
    return {**kept, **changed}


def teacher_key(name: str, student: UNet2DConditionModel, original: UNet2DConditionModel) -> str:
    """Return the name in the original of a block, module or tensor of a shorter UNet."""
    name = layer_in_original(name, student, original)
    attention, found, rest = name.partition(".transformer_blocks.")
    gone = _dropped_transformer_blocks(student)
    if not found or not gone or student.config.get(_EDITS) == original.config.get(_EDITS):
        return name
    number, _, inside = rest.partition(".")
    kept = [
        index
        for index in range(len(original.get_submodule(attention).transformer_blocks))
        if f"{attention}.transformer_blocks.{index}" not in gone
    ]
    return ".".join([f"{attention}.transformer_blocks.{kept[int(number)]}", *filter(None, [inside])])


def _dropped_transformer_blocks(student: UNet2DConditionModel) -> set[str]:
    """Return the names of the transformer blocks that a student's edit dropped."""
    return {name for edit in student.config.get(_EDITS) or () for name in edit.get("transformer_blocks", ())}


def layer_in_original(name: str, student: UNet2DConditionModel, original: UNet2DConditionModel) -> str:
    """Return the name in the original of what is in a layer of a shorter UNet; numbers of transformer blocks stay."""
    parts = name.split(".")
    if parts[0] != "up_blocks" or len(parts) == 1:
        return name
    block = student.up_blocks[int(parts[1])]
    parts[1] = str(int(parts[1]) + len(original.up_blocks) - len(student.up_blocks))
    # The last layer of an up block reads the skip connection of the level's entry, and stays the last.
    if len(parts) > 3 and parts[2] in ("resnets", "attentions") and int(parts[3]) == len(block.resnets) - 1:
        parts[3] = str(len(original.get_submodule(".".join(parts[:3]))) - 1)
    return ".".join(parts)


def dropped(edit: DropLayers, units: Sequence[str]) -> list[str]:
    """Return the units of a UNet that the edit drops, given all unit names: layers, and branches of dropped transformer
    blocks in the layers that stay."""
    levels = 1 + max(int(name.split(".")[1]) for name in units if name.startswith("down_blocks."))
    last = {name.split(".")[1]: int(name.split(".")[3]) for name in units if name.startswith("up_blocks.")}

    def goes(name: str) -> bool:
        side, *rest = name.split(".")
        if side == "mid_block":
            return not edit.mid_block or (not edit.mid_attention and rest[:2] != ["resnets", "0"])
        block, index = int(rest[0]), int(rest[2])
        if side == "down_blocks":
            return index >= edit.layers_of(block)
        layers = edit.layers_of(levels - 1 - block)
        return not layers or layers <= index < last[rest[0]]

    layers = [name for name in units if name.count(".") <= 3 and goes(name)]
    blocks = tuple(f"{name}." for name in edit.transformer_blocks)
    return (
        layers
        + [
            name
            for name in units
            if name.startswith(blocks) and not name.startswith(tuple(f"{each}." for each in layers))
        ]
        if blocks
        else layers
    )
