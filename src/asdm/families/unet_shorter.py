"""UNets with fewer layers or levels: stock models, as BK-SDM makes them (arXiv 2305.15798, Sec. 3.1).

Unlike a removed unit, a dropped layer goes with its shortcut and its skip connection, so what stays has new numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel

from asdm.edits.drop_layers import DropLayers
from asdm.errors import AsdmError

_ALONG_THE_DECODER = ("up_block_types", "reverse_transformer_layers_per_block")


def shorter_config(unet: UNet2DConditionModel, edit: DropLayers) -> dict[str, Any]:
    """Return the config of the shorter UNet.

    Raises:
        AsdmError: the UNet has fewer layers or levels than the edit keeps, or edits of its own.
    """
    config: dict[str, Any] = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    if config.pop("edits", None):
        raise AsdmError("drop_layers: is for an original UNet, and this one has edits; start from the original")
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    if not isinstance(layers, int) or edit.layers_per_block > layers:
        raise AsdmError(f"layers_per_block={edit.layers_per_block}: this UNet has {layers}; allowed are 1 to {layers}")
    kept = edit.levels or levels
    if not 2 <= kept <= levels:
        raise AsdmError(f"levels={kept}: this UNet has {levels}; allowed are 2 to {levels}")
    channels = config["block_out_channels"]
    if kept < levels and channels[kept - 1] != channels[kept]:
        raise AsdmError(
            f"levels={kept}: what enters the first level that would go has {channels[kept - 1]} channels, and what "
            f"leaves it {channels[kept]}; keep more levels"
        )
    config["layers_per_block"] = edit.layers_per_block
    if not edit.mid_block:
        config["mid_block_type"] = None
    # Lists by level, from the outermost one inwards, or along the decoder path; those of one level may be by layer.
    for name, value in config.items():
        if isinstance(value, list | tuple) and len(value) == levels:
            config[name] = value[levels - kept :] if name in _ALONG_THE_DECODER else value[:kept]
    short = edit.layers_per_block
    for name, fewer in (
        ("transformer_layers_per_block", lambda counts: counts[:short]),
        ("reverse_transformer_layers_per_block", lambda counts: [*counts[:short], counts[-1]]),
    ):
        by_layer = isinstance(config.get(name), list | tuple) and any(
            isinstance(each, list | tuple) for each in config[name]
        )
        if by_layer:
            config[name] = [fewer(each) if isinstance(each, list | tuple) else each for each in config[name]]
    return config


def teacher_key(name: str, student: UNet2DConditionModel, original: UNet2DConditionModel) -> str:
    """Return the name in the original of a block, module or tensor of a shorter UNet."""
    parts = name.split(".")
    if parts[0] != "up_blocks":
        return name
    block = student.up_blocks[int(parts[1])]
    parts[1] = str(int(parts[1]) + len(original.up_blocks) - len(student.up_blocks))
    # The last layer of an up block reads the skip connection of the level's entry, and stays the last.
    if len(parts) > 3 and parts[2] in ("resnets", "attentions") and int(parts[3]) == len(block.resnets) - 1:
        parts[3] = str(len(original.get_submodule(".".join(parts[:3]))) - 1)
    return ".".join(parts)


def dropped(edit: DropLayers, units: Sequence[str]) -> list[str]:
    """Return the resnets and attentions of a UNet that the edit drops, given all unit names."""
    levels = 1 + max(int(name.split(".")[1]) for name in units if name.startswith("down_blocks."))
    last = {name.split(".")[1]: int(name.split(".")[3]) for name in units if name.startswith("up_blocks.")}
    kept_levels, layers = edit.levels or levels, edit.layers_per_block

    def goes(name: str) -> bool:
        side, *rest = name.split(".")
        if side == "mid_block":
            return not edit.mid_block
        level, index = int(rest[0]), int(rest[2])
        if side == "down_blocks":
            return level >= kept_levels or index >= layers
        return level < levels - kept_levels or layers <= index < last[rest[0]]

    return [name for name in units if name.count(".") <= 3 and goes(name)]
