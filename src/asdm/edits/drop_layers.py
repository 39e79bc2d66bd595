"""The edit `drop_layers`: drop whole layers, so that the student is a stock model, which every tool loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asdm.edits.base import Edit, EditedFamily, register_edit, require_at_least


@register_edit
@dataclass(frozen=True)
class DropLayers(Edit):
    """Drop whole layers of a UNet, as BK-SDM does (arXiv 2305.15798, Sec. 3.1).

    Of each down block the first `layers_per_block` layers stay, of each up block these and the last; `levels`
    counts the levels that stay, the outermost first. It is a plan's only edit, as it gives layers new numbers.
    """

    edit = "drop_layers"
    is_exclusive = True
    is_removal = True
    layers_per_block: int
    mid_block: bool = True
    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("layers_per_block", self.layers_per_block, 1)
        if self.levels is not None:
            require_at_least("levels", self.levels, 2)

    def stock_config(self, model: Any, family: EditedFamily) -> dict[str, Any]:
        return family.shorter_config(model, self)

    def removed_units(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        return family.dropped_layers(self, units)
