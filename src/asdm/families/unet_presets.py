"""Presets for Stable Diffusion's UNets: BK-SDM's, and this project's own."""

from __future__ import annotations

from collections.abc import Sequence

from asdm.edits import DropLayers
from asdm.families.base import Preset, UnitLike
from asdm.families.unet_structure import is_level

# BK-SDM's students (arXiv 2305.15798, Sec. 3.1): layers per block, mid block, how many levels fewer.
_BK = {"bk-base": (1, True, 0), "bk-small": (1, False, 0), "bk-tiny": (1, False, 1)}
PRESETS = ("a-sdm", "a-sdm-fast", *_BK)


def preset(name: str, units: Sequence[UnitLike]) -> Preset:
    """Return what a preset changes, given a UNet's units.

    "a-sdm" and "a-sdm-fast" are inferred. The self-attentions of the highest resolution attend to regions, and the
    second layers of the first and the last block are removed; in "a-sdm-fast" those of every block, with the
    lowest-resolution level, the mid block and the first and last attentions (SDXL has none at its outermost levels
    either), and the faster kind of regional attention.
    """
    blocks = list(dict.fromkeys(unit.block for unit in units))
    if name in _BK:
        layers, mid_block, fewer = _BK[name]
        levels = sum(map(is_level, blocks))
        return Preset(
            edit=DropLayers(layers_per_block=layers, mid_block=mid_block, levels=levels - fewer if fewer else None)
        )
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
