"""Presets for Stable Diffusion's UNets: BK-SDM's, those of SDXL's published students, and this project's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asdm.edits import DropLayers
from asdm.edits.drop_layers import LEAST_LEVELS
from asdm.errors import AsdmError
from asdm.families.records import Preset, UnitLike
from asdm.families.unet_portable import transformer_depths
from asdm.families.unet_structure import is_level

# BK-SDM's students (arXiv 2305.15798, Sec. 3.1): layers per block, mid block, how many levels fewer.
_BK = {"bk-base": (1, True, 0), "bk-small": (1, False, 0), "bk-tiny": (1, False, 1)}


@dataclass(frozen=True)
class _SmallSDXL:
    """A student of SDXL: layers per block, and how many transformer blocks each attention keeps.

    `depths`: by block, of its attentions in the original's order; the mid block keeps all where it is not named.
    """

    layers: int
    depths: dict[str, tuple[int, ...]]
    mid_block: bool = True
    mid_attention: bool = True


# SSD-1B and Vega (arXiv 2401.02677, Sec. 3), KOALA (arXiv 2312.04005, Sec. 3.1), by their published configs. Which
# transformer blocks stay is KOALA's choice, the first ones.
_SMALL_SDXL = {
    "ssd-1b": _SmallSDXL(
        2,
        {"down_blocks.1": (2, 2), "down_blocks.2": (4, 4), "up_blocks.0": (4, 4, 10), "up_blocks.1": (2, 1, 1)},
        mid_attention=False,
    ),
    "vega": _SmallSDXL(
        2,
        {"down_blocks.1": (1, 1), "down_blocks.2": (2, 2), "up_blocks.0": (2, 2, 2), "up_blocks.1": (1, 1, 1)},
        mid_attention=False,
    ),
    "koala-1b": _SmallSDXL(
        1, {"down_blocks.2": (6, 6), "mid_block": (6,), "up_blocks.0": (6, 6, 6), "up_blocks.1": (2, 2, 2)}
    ),
    "koala-700m": _SmallSDXL(1, {"down_blocks.2": (5, 5), "up_blocks.0": (5, 5, 5)}, mid_block=False),
}
PRESETS = ("a-sdm", "a-sdm-fast", *_BK, *_SMALL_SDXL)


def preset(name: str, units: Sequence[UnitLike]) -> Preset:
    """Return what a preset changes, given a UNet's units.

    "a-sdm" and "a-sdm-fast" are inferred. The self-attentions of the highest resolution attend to regions, and the
    second layers of the first and the last block are removed; in "a-sdm-fast" those of every block, with the
    lowest-resolution level, the mid block and the first and last attentions (SDXL has none at its outermost levels
    either), and the faster kind of regional attention.

    Raises:
        AsdmError: a preset of SDXL's shape, and a UNet of another; or one of BK-SDM's, and a UNet of too few levels.
    """
    blocks = list(dict.fromkeys(unit.block for unit in units))
    if name in _BK:
        layers, mid_block, fewer = _BK[name]
        levels = sum(map(is_level, blocks))
        if levels - fewer < LEAST_LEVELS:
            raise AsdmError(
                f"{name}: keeps {LEAST_LEVELS} levels at least, and this UNet has {levels}; give a budget instead"
            )
        return Preset(
            edit=DropLayers(layers_per_block=layers, mid_block=mid_block, levels=levels - fewer if fewer else None)
        )
    if name in _SMALL_SDXL:
        return Preset(edit=_small_sdxl(name, [unit.name for unit in units]))
    layers_of = [unit for unit in units if unit.parent is None]
    second = [unit for unit in layers_of if unit.name.endswith((".resnets.1", ".attentions.1"))]
    if name == "a-sdm":
        return Preset(removed=frozenset(unit.name for unit in second if unit.block in (blocks[0], blocks[-1])))
    attentions = [unit.name for unit in units if unit.kind == "attention"]
    lowest_level = [block for block in blocks if is_level(block)][-1:]
    removed = {unit.name for unit in second if unit.block != "mid_block"}
    return Preset(
        removed=frozenset({*removed, "mid_block", *lowest_level, *attentions[:1], *attentions[-1:]}), prefers_speed=True
    )


def _small_sdxl(name: str, units: Sequence[str]) -> DropLayers:
    """Return the edit that makes one of SDXL's students, given all unit names.

    Raises:
        AsdmError: the UNet has not SDXL's shape.
    """
    sizes = _SMALL_SDXL[name]
    depths = transformer_depths(units)
    dropped = []
    for block, kept in sizes.depths.items():
        for index, count in enumerate(kept):
            have = depths.get(f"{block}.attentions.{index}", 0)
            if have < count:
                raise AsdmError(f"{name}: a preset for SDXL's shape, and this UNet has another; give a budget instead")
            numbers = range(count, have)
            dropped += [f"{block}.attentions.{index}.transformer_blocks.{number}" for number in numbers]
    return DropLayers(
        layers_per_block=sizes.layers,
        mid_block=sizes.mid_block,
        mid_attention=sizes.mid_attention,
        transformer_blocks=dropped,
    )
