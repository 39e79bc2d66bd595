"""The edit `drop_layers`: drop whole layers, so that the student is a stock model, which every tool loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from asdm.edits.base import Edit, EditedFamily, register_edit, require_at_least

LEAST_LEVELS = 2


@register_edit
@dataclass(frozen=True)
class DropLayers(Edit):
    """Drop whole layers of a UNet, as BK-SDM does (arXiv 2305.15798, Sec. 3.1), and whole transformer blocks, as KOALA
    does (arXiv 2312.04005, Sec. 3.1).

    Of each down block the first `layers_per_block` layers stay, of each up block these and the last. A list has a
    number for each level, outermost first. `levels` counts the levels that stay, the outermost first. Without
    `mid_attention` the mid block keeps its first resnet. `transformer_blocks` names transformer blocks that go, by
    their paths in the original. Where all of a block's go, its attentions go. It is a plan's only edit, as it gives
    layers new numbers.

    With `fitted` projections are fitted in the place of attentions and transformer blocks that go, where they fold into
    weights that stay (`asdm.fit_compensation`), so the student is a stock model still.
    """

    edit = "drop_layers"
    is_exclusive = True
    is_removal = True
    layers_per_block: int | list[int]
    mid_block: bool = True
    levels: int | None = None
    mid_attention: bool = True
    transformer_blocks: list[str] = field(default_factory=list)
    fitted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.layers_per_block if isinstance(self.layers_per_block, list) else [self.layers_per_block]:
            require_at_least("layers_per_block", count, 1)
        if self.levels is not None:
            require_at_least("levels", self.levels, LEAST_LEVELS)

    def to_dict(self) -> dict[str, Any]:
        """Return the edit as it stands in plans, without what is new since version 0.1 where it changes nothing."""
        new = {"mid_attention": True, "transformer_blocks": [], "fitted": False}
        return {name: value for name, value in super().to_dict().items() if name not in new or value != new[name]}

    def layers_of(self, level: int) -> int:
        """Return how many layers of a level's down block stay; 0 where the level goes."""
        if self.levels is not None and level >= self.levels:
            return 0
        counts = self.layers_per_block
        if isinstance(counts, int):
            return counts
        return counts[level] if level < len(counts) else 0

    def stock_config(self, model: Any, family: EditedFamily) -> dict[str, Any]:
        return family.shorter_config(model, self)

    def removed_units(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        return family.dropped_layers(self, units)
