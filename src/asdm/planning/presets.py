"""Plans by the name of a published one. What a preset changes in an architecture is the family's."""

from __future__ import annotations

from collections.abc import Sequence

from asdm.edits import GriAttention
from asdm.errors import AsdmError
from asdm.families import Denoiser, Preset, families, family_of
from asdm.planning.finished import not_for_this_model
from asdm.planning.possible_edits import PossibleEdit, plan_of, whole_layers
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan
from asdm.student.surgery import model_without_weights

PRESETS = tuple(name for family in families() for name in family.presets)


def require_preset(denoiser: Denoiser, name: str) -> Preset:
    """Return what a preset changes in a denoiser.

    Raises:
        AsdmError: the denoiser does not allow it.
    """
    family = family_of(denoiser)
    preset = family.preset(name, family.units(denoiser))
    if preset.edit is not None:
        try:
            model_without_weights(denoiser, [preset.edit])
        except AsdmError as error:
            raise not_for_this_model(name, error) from error
    return preset


def preset_plan(redundancy: RedundancyMap, name: str, choices: Sequence[PossibleEdit]) -> PruningPlan:
    """Return the plan of a preset.

    Raises:
        AsdmError: the model's family has no such preset, or the model nothing that it changes.
    """
    preset = redundancy.family.preset(name, redundancy.units)
    if preset.edit is None:
        return plan_of(redundancy, _chosen(redundancy, preset, choices), {})
    removed = preset.edit.removed_units([unit.name for unit in redundancy.units], redundancy.family)
    plan = plan_of(redundancy, [choice for choice in whole_layers(redundancy) if choice.edit.unit in removed], {})
    return plan.model_copy(update={"edits": [preset.edit]})


def _chosen(redundancy: RedundancyMap, preset: Preset, choices: Sequence[PossibleEdit]) -> list[PossibleEdit]:
    """Return the removals that the preset names, and regional attention in the outermost self-attentions."""
    positions = {unit.name: unit.positions for unit in redundancy.units}
    most = max((unit.positions for unit in redundancy.units if unit.kind == "self_attention"), default=0)

    def is_wanted(choice: PossibleEdit) -> bool:
        if choice.edit.edit == GriAttention.edit:
            return positions[choice.edit.unit] == most
        return choice.edit.is_removal and choice.edit.unit in preset.removed

    def order(choice: PossibleEdit) -> tuple[float, float]:
        """Larger parts first: a level, then layers, then what is left inside them."""
        saved = 0.0 if choice.edit.is_removal else choice.macs
        return -len(choice.covers), -saved if preset.prefers_speed else saved

    chosen: list[PossibleEdit] = []
    for choice in sorted(filter(is_wanted, choices), key=order):
        if not any(choice.covers & other.covers for other in chosen):
            chosen.append(choice)
    if not chosen:
        raise AsdmError("no such layers in this model as the preset removes; give a budget instead")
    return sorted(chosen, key=choices.index)
