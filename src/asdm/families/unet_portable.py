"""The shapes of stock UNets that every program reads, among which a portable plan chooses.

ComfyUI and Forge read any SD 1.x and 2.x, and an SDXL whose encoder path they know. diffusers has attentions in all
layers of a block or in none, and as many transformer blocks in the mid block as in the lowest level's first attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, product
from typing import Any

from asdm.edits.drop_layers import DropLayers
from asdm.errors import AsdmError
from asdm.families.records import PortableShape
from asdm.families.unet_programs import COMFYUI_ENCODERS
from asdm.families.unet_shorter import dropped

_MIDDLE = "mid_block.attentions.0"
_MIDDLES = ((True, True), (True, False), (False, True))  # mid block, its attention


def portable_shapes(config: Mapping[str, Any], units: Sequence[str]) -> list[PortableShape]:
    """Return all shapes that a student of a UNet with this config and these units can have.

    Raises:
        AsdmError: no program reads students of this UNet.
    """
    depths = transformer_depths(units)
    is_sdxl = config.get("addition_embed_type") == "text_time"
    found = list(_sdxl_shapes(config, units, depths) if is_sdxl else _sd_shapes(config, units, depths))
    if not found:
        raise AsdmError(
            "portable: no program reads a student of this UNet: its encoder path has other transformer blocks than "
            "SDXL and its known students; plan without --portable"
        )
    return found


def transformer_depths(units: Sequence[str]) -> dict[str, int]:
    """Return how many transformer blocks each attention has, given all unit names."""
    depths: dict[str, int] = {}
    for unit in units:
        attention, found, rest = unit.partition(".transformer_blocks.")
        if found:
            depths[attention] = max(depths.get(attention, 0), int(rest.partition(".")[0]) + 1)
    return depths


def _sd_shapes(config: Mapping[str, Any], units: Sequence[str], depths: Mapping[str, int]) -> Iterator[PortableShape]:
    """Yield the shapes of SD 1.x and 2.x: any number of layers in each level, attentions or none in each block, and one
    at least in the encoder path."""
    layers, channels = config["layers_per_block"], config["block_out_channels"]
    most = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    fewest_levels = len(channels) - (len(channels) > 2 and channels[-1] == channels[-2])
    with_attention = list(dict.fromkeys(_block(name) for name in depths if name != _MIDDLE))
    for levels, middle in product(range(fewest_levels, len(channels) + 1), _MIDDLES):
        for counts in product(*(range(1, each + 1) for each in most[:levels])):
            for without in _subsets(with_attention):
                if any(_is_encoder(block, levels) for block in with_attention if block not in without):
                    yield _shape(units, depths, len(channels), levels, list(counts), middle, without, {})


def _sdxl_shapes(config: Mapping[str, Any], units: Sequence[str], depths: Mapping[str, int]) -> Iterator[PortableShape]:
    """Yield the shapes of SDXL and of its known students: a known encoder path, any decoder path."""
    levels = len(config["block_out_channels"])
    decoder = list(dict.fromkeys(_block(name) for name in depths if name.startswith("up_blocks.")))
    for encoder in COMFYUI_ENCODERS.values():
        layers = len(encoder) // levels
        kept = {
            f"down_blocks.{place // layers}.attentions.{place % layers}": depth for place, depth in enumerate(encoder)
        }
        kept = {name: depth for name, depth in kept.items() if depth}
        if layers * levels != len(encoder) or any(depths.get(name, 0) < depth for name, depth in kept.items()):
            continue
        for middle in _MIDDLES:
            fixed = dict(kept)
            if middle == (True, True):
                fixed[_MIDDLE] = encoder[-layers]
                if depths.get(_MIDDLE, 0) < encoder[-layers]:
                    continue
            for without in _subsets(decoder):
                yield _shape(units, depths, levels, levels, [layers] * levels, middle, without, fixed)


def _shape(
    units: Sequence[str],
    depths: Mapping[str, int],
    all_levels: int,
    levels: int,
    counts: list[int],
    middle: tuple[bool, bool],
    without: Sequence[str],
    fixed: Mapping[str, int],
) -> PortableShape:
    """Return one shape, with the names of all that goes whatever the sensitivities are."""
    gone_attentions = [name for name in depths if _block(name) in without]
    edit = DropLayers(
        layers_per_block=counts[0] if len(set(counts)) == 1 else counts,
        mid_block=middle[0],
        mid_attention=middle[1],
        levels=levels if levels < all_levels else None,
        transformer_blocks=[
            f"{name}.transformer_blocks.{number}" for name in gone_attentions for number in range(depths[name])
        ],
    )
    layers = dropped(replace(edit, transformer_blocks=[]), [unit for unit in units if unit.count(".") <= 3])
    gone = [*layers, *(name for name in gone_attentions if name not in layers)]
    parts = []
    if not middle[0]:
        parts.append("mid_block")
    if levels < all_levels:
        parts.append(f"down_blocks.{all_levels - 1}")
    inside = tuple(f"{part}." for part in [*parts, *(["up_blocks.0"] if levels < all_levels else [])])
    gone = [*parts, *(name for name in gone if not (inside and name.startswith(inside)))]
    stays = [name for name in depths if name not in gone and not (inside and name.startswith(inside))]
    return PortableShape(
        edit=edit,
        gone=gone,
        depths={name: fixed[name] for name in stays if name in fixed},
        free={name: depths[name] for name in stays if name not in fixed and depths[name] > 1},
    )


def _is_encoder(block: str, levels: int) -> bool:
    """Return whether a block is one of the encoder path's first levels."""
    side, _, level = block.partition(".")
    return side == "down_blocks" and int(level) < levels


def _block(name: str) -> str:
    return name.rpartition(".attentions.")[0]


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(names, count) for count in range(len(names) + 1))
