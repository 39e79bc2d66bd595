"""What the tab Plan holds: a redundancy profile and the edits that are chosen of it, with what they save and cost.

A board changes no model. Each change returns another board.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from asdm.choices import CompensationKind
from asdm.edits import Edit
from asdm.errors import AsdmError
from asdm.evaluation.unit_colours import PART_LETTERS, UNIT_LETTERS, SensitivityColours
from asdm.families import block_of
from asdm.planning.finished import finished
from asdm.planning.possible_edits import (
    Pair,
    PossibleEdit,
    joint_savings,
    plan_of,
    possible_edits,
    predicted_speedup,
    time_or_macs,
)
from asdm.planning.program import least_sensitive, most_saved
from asdm.sensitivity.profile import RedundancyMap, UnitRecord
from asdm.student.plan import PruningPlan

_LETTERS = UNIT_LETTERS | PART_LETTERS


@dataclass(frozen=True)
class PlanBoard:
    """A profile, all edits that a plan can choose of it, and the chosen ones.

    `others` are edits of a loaded plan that the profile has not measured; they stay in the plan, and count for nothing.
    """

    redundancy: RedundancyMap
    choices: tuple[PossibleEdit, ...]
    chosen: frozenset[int] = frozenset()
    others: tuple[Edit, ...] = ()

    @classmethod
    def of(cls, redundancy: RedundancyMap) -> PlanBoard:
        """Return a board without edits. Removed branches are compensated as the profile tried them."""
        kind: CompensationKind = redundancy.compensate if redundancy.estimator == "ablation" else "linear"
        return cls(redundancy, tuple(possible_edits(redundancy, kind)))

    # -- what is chosen --------------------------------------------------------------------------------

    def toggle(self, unit: str) -> PlanBoard:
        """Return the board with a unit removed, or with the edit that covers it taken back.

        Raises:
            AsdmError: the profile has no such unit.
        """
        covering = frozenset(index for index in self.chosen if unit in self._inside(index))
        removals = [i for i, choice in enumerate(self.choices) if choice.edit.is_removal and choice.edit.unit == unit]
        if not removals:
            raise AsdmError(f"{unit[:80]}: no such unit in the profile")
        if covering:
            return replace(self, chosen=self.chosen - covering)
        return self._with(removals[0])

    def _inside(self, index: int) -> frozenset[str]:
        """Return what a removal takes with it: its unit or block, and the units in it; nothing for other edits."""
        choice = self.choices[index]
        return choice.covers | {choice.edit.unit} if choice.edit.is_removal else frozenset()

    def _with(self, index: int) -> PlanBoard:
        """Return the board with one more edit, in the place of those of the same units."""
        covers = self.choices[index].covers
        kept = {other for other in self.chosen if not covers & self.choices[other].covers}
        return replace(self, chosen=frozenset(kept | {index}))

    def with_labels(self, labels: Sequence[str]) -> PlanBoard:
        """Return the board with exactly these edits; of two for one unit the later one.

        Raises:
            AsdmError: a label is of no edit.
        """
        known = {label: index for index, label in enumerate(self.labels)}
        board = replace(self, chosen=frozenset())
        for label in sorted(labels, key=lambda label: known.get(label, -1) not in self.chosen):  # new ones win
            if label not in known:
                raise AsdmError(f"{label[:80]}: no such edit in the profile")
            board = board._with(known[label])
        return board

    def best(self, speedup: float) -> PlanBoard:
        """Return the board with the least sensitive edits that are predicted to reach a speed-up.

        Raises:
            AsdmError: no edits reach it.
        """
        savings, pairs, total = self._savings()
        chosen = least_sensitive(self.choices, savings, total * (1 - 1 / speedup), pairs=pairs)
        if chosen is None:
            raise AsdmError(f"speedup={speedup:g}: out of reach; at most {self.reachable:.2f} is predicted")
        return replace(self, chosen=frozenset(i for i, choice in enumerate(self.choices) if choice in chosen))

    def with_plan(self, plan: PruningPlan) -> PlanBoard:
        """Return the board with a plan's edits.

        Raises:
            AsdmError: the plan is for another model.
        """
        if plan.base.fingerprint != self.redundancy.fingerprint:
            raise AsdmError(
                f"plan for another model: its fingerprint is {plan.base.fingerprint}, the profile's "
                f"{self.redundancy.fingerprint}; load a plan of this model, or this plan's profile first"
            )
        known = {_key(choice.edit): index for index, choice in enumerate(self.choices)}
        found = [known.get(_key(edit)) for edit in plan.edits]
        others = tuple(edit for edit, index in zip(plan.edits, found, strict=True) if index is None)
        chosen = frozenset(index for index in found if index is not None)
        # The plan's own compensations stand, where they differ from those that the profile tried.
        choices = list(self.choices)
        for edit, index in zip(plan.edits, found, strict=True):
            if index is not None:
                choices[index] = replace(choices[index], edit=edit)  # type: ignore[arg-type]
        return replace(self, choices=tuple(choices), chosen=chosen, others=others)

    # -- what that means -------------------------------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """A line for each edit that can be chosen."""
        return [choice.edit.trial_name if choice.edit.is_removal else str(choice.edit) for choice in self.choices]

    @property
    def chosen_labels(self) -> list[str]:
        """The lines of the chosen edits."""
        return [self.labels[index] for index in sorted(self.chosen)]

    @property
    def chosen_edits(self) -> list[PossibleEdit]:
        """The chosen edits, in the profile's order."""
        return [self.choices[index] for index in sorted(self.chosen)]

    @property
    def speedup(self) -> float:
        """The predicted speed-up of a denoiser call."""
        return predicted_speedup(self.redundancy, self.chosen_edits)

    @property
    def sensitivity(self) -> float:
        """The sum of the chosen edits' sensitivities."""
        return sum(choice.sensitivity for choice in self.chosen_edits)

    @property
    def reachable(self) -> float:
        """The largest speed-up that is predicted for any choice."""
        savings, pairs, total = self._savings()
        return total / max(total - most_saved(self.choices, savings, pairs), 1e-9)

    def plan(self) -> PruningPlan:
        """Return the plan of the chosen edits.

        Raises:
            AsdmError: no edit is chosen, or no student can be built by them.
        """
        if not self.chosen and not self.others:
            raise AsdmError("the plan is empty; click units, or ask for the best plan")
        plan = plan_of(self.redundancy, self.chosen_edits, {})
        return finished(self.redundancy, plan.model_copy(update={"edits": [*plan.edits, *self.others]}))

    def whole_blocks(self) -> dict[str, tuple[UnitRecord, list[str]]]:
        """Return the blocks that an edit removes whole: what that saves and costs, and the blocks that go with it."""
        redundancy, found = self.redundancy, {}
        for choice, record in zip(self.choices[len(redundancy.units) :], redundancy.others, strict=True):
            if choice.edit.is_removal:
                costs = record.model_dump(exclude={"edit", "covers"})
                share = record.latency_ms / redundancy.latency_ms if redundancy.latency_ms else 0.0
                name = choice.edit.unit
                # Not checked again: the quotient of two numbers of anyone's file may be infinite.
                unit = UnitRecord.model_construct(name=name, kind="block", parent=None, latency_share=share, **costs)
                found[name] = unit, sorted({block_of(part) for part in record.covers} - {name})
        return found

    def removed(self) -> set[str]:
        """Return the units and whole blocks that the chosen edits remove."""
        return {unit for index in self.chosen for unit in self._inside(index)}

    def changed(self) -> set[str]:
        """Return the units that other chosen edits change."""
        covered = {unit for choice in self.chosen_edits for unit in choice.covers}
        return covered - self.removed()

    def _savings(self) -> tuple[list[float], list[Pair], float]:
        """Return what each edit saves, what pairs save beyond that, and what the model takes, of `time_or_macs`."""
        resource, total = time_or_macs(self.redundancy)
        savings = [getattr(choice, resource) for choice in self.choices]
        return savings, joint_savings(self.choices, resource), total


def _key(edit: Edit) -> tuple[tuple[str, str], ...]:
    """Return what tells edits apart, apart from their compensation."""
    fields = {name: value for name, value in edit.to_dict().items() if not name.startswith("compensate")}
    return tuple(sorted((name, repr(value)) for name, value in fields.items()))


# -- the diagram ---------------------------------------------------------------------------------------


def summary_of(board: PlanBoard) -> str:
    """Return what the chosen edits save and cost, as Markdown."""
    redundancy, chosen = board.redundancy, board.chosen_edits
    # Without reliable latencies an edit's share of the time is its share of the MACs.
    basis = "latencies" if redundancy.latency_ms > 0 and redundancy.has_reliable_latencies else "MACs"
    parameters = redundancy.parameters - sum(choice.parameters for choice in chosen)
    gmacs = redundancy.gmacs - sum(choice.macs for choice in chosen) / 1e9
    noun = "edit" if len(chosen) == 1 else "edits"
    lines = [
        f"**{board.speedup:.2f}x** predicted by the profile's {basis} · sensitivity **{board.sensitivity:.4f}** "
        f"· {len(chosen)} {noun} · {parameters / 1e6:.1f}M of {redundancy.parameters / 1e6:.1f}M parameters "
        f"· {gmacs:.2f} of {redundancy.gmacs:.2f} GMACs"
    ]
    if board.others:
        lines.append(f"Edits of the loaded plan that the profile lacks, which count for nothing: {len(board.others)}.")
    return "\n\n".join(lines)


def diagram(board: PlanBoard) -> str:
    """Return the model's blocks as HTML: a button for each unit, coloured by its sensitivity, and one before them for
    the whole block where an edit removes it."""
    redundancy = board.redundancy
    blocks, parts, whole = redundancy.units_by_block(), redundancy.parts_by_unit(), board.whole_blocks()
    places = redundancy.family.block_places(list(blocks))
    colours = SensitivityColours.of(redundancy)
    removed, changed = board.removed(), board.changed()

    def button(unit: UnitRecord, others: Sequence[str] = ()) -> str:
        return _button(unit, colours, unit.name in removed, unit.name in changed, others)

    rows = []
    for level in sorted({place.level for place in places.values()}):
        cells = []
        for block, units in blocks.items():
            if places[block].level == level:
                share = sum(unit.latency_share for unit in units)
                inner = f'<span class="unit">{button(*whole[block])}</span>' if block in whole else ""
                inner += "".join(
                    f'<span class="unit">{button(unit)}'
                    + "".join(button(part) for part in parts.get(unit.name, []))
                    + "</span>"
                    for unit in units
                )
                title = f"{html.escape(block)} <small>{100 * share:.0f}%</small>"
                side = html.escape(places[block].side)
                cells.append(f'<div class="block {side}"><h4>{title}</h4><div class="units">{inner}</div></div>')
        rows.append(f'<div class="level">{"".join(cells)}</div>')
    return f'<div class="u">{"".join(rows)}</div>{_legend(redundancy, colours, bool(whole))}'


def _button(unit: UnitRecord, colours: SensitivityColours, removed: bool, changed: bool, others: Sequence[str]) -> str:
    """Return a unit's button. Names are escaped: a profile may be anyone's file.

    Args:
        others: blocks that go with it.
    """
    background, ink = colours(unit.sensitivity)
    name = html.escape(unit.name, quote=True)
    state = "removed" if removed else "changed" if changed else "kept"
    title = html.escape(" with ".join([unit.name, *others]), quote=True)
    about = (
        f"{title}: {100 * unit.latency_share:.1f}% of a call ({unit.latency_ms:.2f} ms), {unit.gmacs:.3g} GMACs, "
        f"{unit.parameters / 1e3:.0f}k parameters; sensitivity {unit.sensitivity:.2g}; {state}"
    )
    return (
        f'<button type="button" class="cell {state} {unit.kind}" data-unit="{name}" data-about="{about}" '
        f'title="{about}" aria-label="{about}" aria-pressed="{str(removed).lower()}" '
        f'style="background:{background};color:{ink}">{_LETTERS.get(unit.kind, "")}</button>'
    )


def _legend(redundancy: RedundancyMap, colours: SensitivityColours, with_blocks: bool) -> str:
    """Return the scale of colours and the letters' meanings."""
    low, high = colours.low, colours.high
    steps = [low * (high / low) ** (part / 8) for part in range(9)]
    stops = ", ".join(colours(value)[0] for value in steps)
    kinds: Collection[Any] = {unit.kind for unit in redundancy.units} | ({"block"} if with_blocks else set())
    letters = ", ".join(f"{letter} {kind.replace('_', '-')}" for kind, letter in _LETTERS.items() if kind in kinds)
    return (
        f'<div class="legend"><span>{low:.0e}</span><span class="scale" style="background:linear-gradient(90deg, '
        f'{stops})"></span><span>{high:.0e}</span> sensitivity · {letters} · % of a call · crossed out: removed · '
        "dashed: changed</div>"
    )
