"""The structure of PixArt's transformer as edits see it.

Its blocks read the hidden states three times: `attn1` and `ff` through a norm, a scale, a shift and a gate that stand
outside the module, `attn2` directly. So the norms stay when a branch goes, and none has tensors of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from asdm.choices import CompensationKind
from asdm.edits.base import Edit, UnitEdit, compensated
from asdm.edits.projections import projection_of
from asdm.edits.remove import RemovedUnit
from asdm.errors import AsdmError
from asdm.families.base import Architecture
from asdm.families.records import Branch, Unit, UnitKind

BRANCHES: dict[str, UnitKind] = {"attn1": "self_attention", "attn2": "cross_attention", "ff": "feed_forward"}
_KEPT_BLOCKS = "_kept_blocks"  # of a shorter model's config: its blocks' numbers in the original


class PixArtArchitecture(Architecture):
    """The structure of PixArt's transformers: blocks, each a residual, and the branches inside them."""

    component = "transformer"
    model_class = PixArtTransformer2DModel
    sample_argument = "hidden_states"

    def blocks(self, model: Any) -> list[str]:
        return [f"transformer_blocks.{index}" for index in range(len(model.transformer_blocks))]

    def layers(self, model: Any) -> list[str]:
        """Return the blocks."""
        return self.blocks(model)

    def execution_order(self, model: Any) -> list[str]:
        return self.blocks(model)

    def units(self, model: Any) -> list[Unit]:
        units = []
        for name in self.blocks(model):
            block = model.get_submodule(name)
            if isinstance(block, BasicTransformerBlock):
                units.append(Unit(name, "block"))
                units += [
                    Unit(f"{name}.{branch}", kind, name)
                    for branch, kind in BRANCHES.items()
                    if not isinstance(getattr(block, branch), RemovedUnit)
                ]
        return units

    def branch(self, model: Any, unit: str) -> Branch:
        if unit in self.blocks(model):
            return Branch(unit, model.inner_dim, kept=lambda hidden_states: hidden_states)
        return Branch(unit, model.inner_dim, is_gated=not unit.endswith(".attn2"))

    def removals(self, model: Any) -> list[str]:
        """None: blocks are units."""
        return []

    def is_covered_by(self, name: str, removed: Collection[str]) -> bool:
        return any(name == other or name.startswith(f"{other}.") for other in removed)

    def removed(
        self, model: Any, unit: str, compensate: CompensationKind, compensate_time: bool
    ) -> dict[str, nn.Module]:
        known = {each.name: each for each in self.units(model)}
        if unit not in known:
            raise self.no_such_unit(model, unit)
        if compensate_time:
            raise AsdmError(f"{unit}: gets no time embedding; compensate_time is for resnets")
        projection = projection_of(compensate, model.inner_dim, tokens=True)
        return {unit: (RemovedBlock if known[unit].kind == "block" else RemovedBlockBranch)(projection)}

    def projection_channels(self, model: Any, unit: str) -> int:
        return model.inner_dim

    def stock_config(self, model: Any, edits: Sequence[Edit]) -> dict[str, Any] | None:
        """Fewer blocks, where whole blocks are removed and nothing takes their place."""
        blocks = self.blocks(model)
        removed = [edit.unit for edit in edits if isinstance(edit, UnitEdit) and edit.is_removal]
        plain = len(removed) == len(edits) and not compensated(edits) and not model.config.get("edits")
        if not removed or not plain or not set(removed) <= set(blocks):
            return None
        kept = [index for index, name in enumerate(blocks) if name not in removed]
        if not kept:
            raise AsdmError(f"{removed[-1]}: the last of the model's blocks; keep one")
        before = model.config.get(_KEPT_BLOCKS) or range(len(blocks))
        return {
            **model.config,
            "num_layers": len(kept),
            _KEPT_BLOCKS: [list(before)[index] for index in kept],
            "_edits": [edit.to_dict() for edit in edits],
            "_original": {name: model.config[name] for name in ("_edits", "_original") if name in model.config},
        }

    def teacher_key(self, name: str, student: Any, teacher: Any) -> str:
        part, _, rest = name.partition(".")
        kept, known = (list(model.config.get(_KEPT_BLOCKS) or ()) for model in (student, teacher))
        if part != "transformer_blocks" or not kept:
            return name
        index, _, inside = rest.partition(".")
        original = kept[int(index)]
        number = known.index(original) if known else original
        return f"{part}.{number}.{inside}" if inside else f"{part}.{number}"

    def has_blocks_of(self, student: Any, teacher: Any) -> bool:
        return len(student.transformer_blocks) == len(teacher.transformer_blocks)


class RemovedBlock(RemovedUnit):
    """The identity in place of a block, and a projection of its input added to it."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.clone() if self.compensation is None else hidden_states + self.compensation(hidden_states)


class RemovedBlockBranch(RemovedUnit):
    """Adds nothing in place of a branch of a block, or a projection of its input."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.new_zeros(()) if self.compensation is None else self.compensation(hidden_states)
