"""The structure of Stable Diffusion's UNets as edits see it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from asdm.choices import CompensationKind
from asdm.families.base import Architecture
from asdm.families.records import Branch, Unit
from asdm.families.unet_removed import removed_modules
from asdm.families.unet_shorter import dropped, fitted_removals, original_config, shorter_config, teacher_key
from asdm.families.unet_structure import (
    TRANSFORMER_BRANCHES,
    blocks,
    conv_channels,
    execution_order,
    is_covered_by,
    is_level,
    layers,
    prompt_channels,
    removable_units,
    unlike_in,
)


class UNetArchitecture(Architecture):
    """The structure of Stable Diffusion's UNets."""

    component = "unet"
    model_class = UNet2DConditionModel

    def blocks(self, model: Any) -> list[str]:
        return blocks(model)

    def layers(self, model: Any) -> list[str]:
        return layers(model)

    def units(self, model: Any) -> list[Unit]:
        return removable_units(model)

    def execution_order(self, model: Any) -> list[str]:
        return execution_order(model)

    def branch(self, model: Any, unit: str) -> Branch:
        module: Any = model.get_submodule(unit)
        if unit == "mid_block":
            return Branch(unit, model.config.block_out_channels[-1], kept=lambda hidden_states: hidden_states)
        if unit in layers(model):
            shortcut = getattr(module, "conv_shortcut", None)
            scale = getattr(module, "output_scale_factor", 1.0)

            def kept(hidden_states: Any) -> Any:
                return (hidden_states if shortcut is None else shortcut(hidden_states)) / scale

            folds_into = None if shortcut is None else f"{unit}.conv_shortcut"
            return Branch(unit, module.in_channels, kept=kept, scale=scale, folds_into=folds_into)
        block, _, name = unit.rpartition(".")
        return Branch(unit, model.get_submodule(block).dim, norm=f"{block}.{TRANSFORMER_BRANCHES[name][1]}")

    def removals(self, model: Any) -> list[str]:
        """Return the mid block, and the lowest-resolution level by its down block."""
        return ["mid_block", f"down_blocks.{len(model.down_blocks) - 1}"]

    def is_covered_by(self, name: str, removed: Collection[str]) -> bool:
        return is_covered_by(name, removed)

    def coupled_blocks(self, model: Any, removed: Collection[str]) -> list[list[str]]:
        """Return the lowest-resolution level: its down block and up block, and the block whose resampler goes with
        it."""
        levels = [int(name.rpartition(".")[2]) for name in removed if is_level(name)]
        return [[f"down_blocks.{level - 1}", f"down_blocks.{level}", "up_blocks.0"] for level in levels]

    def has_blocks_of(self, student: Any, teacher: Any) -> bool:
        return unlike_in(student, teacher, "layers_per_block", "block_out_channels", "mid_block_type") is None

    def removed(
        self, model: Any, unit: str, compensate: CompensationKind, compensate_time: bool
    ) -> dict[str, nn.Module]:
        found = removed_modules(model, unit, compensate, compensate_time)
        if found is None:
            raise self.no_such_unit(model, unit)
        return found

    def projection_channels(self, model: Any, unit: str) -> int:
        """Return those of the hidden states; 0 for the lowest-resolution level, which has two ends."""
        if unit == "mid_block":
            return model.config.block_out_channels[-1]
        return 0 if is_level(unit) else self.branch(model, unit).channels

    def conv_channels(self, model: Any) -> dict[str, tuple[int, int]]:
        return conv_channels(model)

    def prompt_channels(self, model: Any, name: str) -> int:
        return prompt_channels(model, name)

    def shorter_config(self, model: Any, edit: Any) -> dict[str, Any]:
        return shorter_config(model, edit)

    def fitted_removals(self, model: Any, edit: Any) -> tuple[Any, list[list[str]]]:
        return fitted_removals(model, edit)

    def dropped_layers(self, edit: Any, units: Sequence[str]) -> list[str]:
        return dropped(edit, units)

    def teacher_key(self, name: str, student: Any, teacher: Any) -> str:
        return teacher_key(name, student, teacher)

    def made_from(self, model: Any) -> Any:
        config = original_config(model.config)
        if config is None or model.config.get("edits"):
            return super().made_from(model)
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
