"""The edit `remove`: drop a unit's residual branch and keep its shortcut, or remove a whole part of the model.

The modules that take a removed unit's place are the family's. `RemovedUnit` is their base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from asdm.choices import CompensationKind
from asdm.edits.base import EditedFamily, UnitEdit, register_edit
from asdm.errors import AsdmError


@register_edit
@dataclass(frozen=True)
class Remove(UnitEdit):
    """Drop a unit's residual branch and keep its shortcut.

    `unit` names a unit of the family (in a UNet a resnet, an attention, or an `attn1`, `attn2` or `ff` inside one), or
    one of the family's larger parts (in a UNet the whole `mid_block`, or the lowest-resolution level by its down
    block: with its up block and the resampling between them and the next level).

    `compensate` puts a projection of the unit's input in the branch's place, fitted to what the teacher computes there
    (`asdm.fit_compensation`; beyond the paper): "bias", a constant for each channel; "diagonal", a scale and a constant
    for each channel; "linear", a linear projection of all channels (a 1x1 convolution); or "none". Where the unit has a
    1x1 shortcut the fit folds into it and costs nothing; `asdm.fold_compensation` folds others. `compensate_time` adds
    a term linear in the time embedding, in resnets.
    """

    edit = "remove"
    order = 1  # other edits look at what is removed: expert kernels at the convolutions of removed units
    is_removal = True
    no_split_modules: ClassVar = ("RemovedResnet",)
    compensate: CompensationKind = "none"
    compensate_time: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compensate_time and self.compensate not in ("bias", "linear"):
            raise AsdmError(f"compensate_time goes with compensate bias or linear, not {self.compensate}")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if value not in ("none", False)}

    def replacements(self, model: Any, family: EditedFamily) -> dict[str, nn.Module]:
        return family.removed(model, self.unit, self.compensate, self.compensate_time)

    def removed_units(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        return [self.unit]

    def gives_way_to(self, units: Collection[str], family: EditedFamily) -> bool:
        """Return False for an edit of the same unit, which is an error."""
        return family.is_covered_by(self.unit, [unit for unit in units if unit != self.unit])

    @classmethod
    def candidates(cls, model: Any, family: EditedFamily, positions: Mapping[str, int]) -> Sequence[UnitEdit]:
        """Return the larger parts that the family names, where they can be removed and a unit is left in them."""
        found = []
        for name in family.removals(model):
            if any(family.is_covered_by(unit.name, [name]) for unit in family.units(model)):
                with suppress(AsdmError):
                    edit = cls(unit=name)
                    edit.replacements(model, family)
                    found.append(edit)
        return found

    @property
    def trial_name(self) -> str:
        return self.unit

    @property
    def compensation(self) -> CompensationKind:
        return self.compensate

    @property
    def compensates_time(self) -> bool:
        return self.compensate_time

    def with_compensation(self, kind: CompensationKind) -> Remove:
        return replace(self, compensate=kind, compensate_time=self.compensate_time and kind in ("bias", "linear"))

    def projection_channels(self, model: Any, family: EditedFamily) -> int:
        return family.projection_channels(model, self.unit)


class RemovedUnit(nn.Module):
    """The base of modules that take a removed unit's place: the kept shortcut, with a projection or without.

    None returns its input tensor, which can be a skip connection: FreeU and T2I-Adapters change the output in place.
    """

    compensation: Any

    def __init__(self, compensation: nn.Module | None = None):
        super().__init__()
        self.compensation = compensation

    def add_projection(self, weight: Tensor, bias: Tensor) -> None:
        """Add a fitted projection of the input: weight (out, in) or, where it is diagonal, (channels,); bias (out,)."""
        self.compensation.add_projection(weight, bias)

    def projected(self, hidden_states: Tensor) -> Tensor:
        """Return the projection of the input; without one, a copy."""
        return hidden_states.clone() if self.compensation is None else self.compensation(hidden_states)
