"""What the architecture of a denoiser alone says of the work ahead: its units, its edits, and what trials of them take.

Nothing is computed: the denoiser's modules are made again without weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from asdm.choices import CompensationKind
from asdm.compensation.projections import fitted_together
from asdm.edits import UnitEdit, compensated
from asdm.errors import AsdmError
from asdm.families import Denoiser, family_of, macs_of_call
from asdm.planning.budget import make_plan
from asdm.planning.possible_edits import PossibleEdit, possible_edits
from asdm.sensitivity.analysis import structure_map
from asdm.student.build import empty_student
from asdm.student.plan import PlanBase, PruningPlan
from asdm.student.surgery import model_without_weights

HALF = 0.5  # of its layer is computed in a trial of a unit, on average (inferred)


class Architecture:
    """A denoiser's units and possible edits, and a plan of about the size that a budget asks for.

    Args:
        layer_shares: each layer's part of the time of a call.
    """

    def __init__(self, denoiser: Denoiser, layer_shares: Mapping[str, float]):
        self.denoiser, self.layer_shares = denoiser, layer_shares
        self.family: Any = family_of(denoiser)
        self.structure = structure_map(model_without_weights(denoiser, ()).to("meta"))  # its buffers, too

    def choices(self, compensate: CompensationKind) -> list[PossibleEdit]:
        """Return all edits that a plan can choose."""
        return possible_edits(self.structure, compensate)

    @cached_property
    def others(self) -> list[UnitEdit]:
        """The possible edits other than the removal of a unit."""
        return [choice.edit for choice in self.choices("none")[len(self.structure.units) :]]

    def trials(self, edits: Iterable[UnitEdit]) -> tuple[int, float]:
        """Return how many calls it takes to try each of these edits once, and what the calls take, in whole forward
        passes: layers before the one that an edit changes answer from a cache."""
        layers = self.family.layers(self.denoiser)
        taken = [self._from_layer(layers, edit.changed_layer(layers)) for edit in edits]
        return len(taken), sum(taken)

    def _from_layer(self, layers: Sequence[str], layer: str) -> float:
        """Return the part of a call's time from the middle of a layer on."""
        before = sum(self.layer_shares.get(name, 0.0) for name in layers[: layers.index(layer)])
        return max(0.0, 1 - before - HALF * self.layer_shares.get(layer, 0.0))

    def plan(self, budget: Mapping[str, Any], compensate: CompensationKind) -> PruningPlan:
        """Return a plan of about the size that the budget asks for, by MACs alone; one without edits where the
        architecture has no such plan, which the planner will say."""
        if budget.get("speedup") is not None:
            budget = {"macs": 1 / budget["speedup"]}
        try:
            return make_plan(self.structure, **budget, compensate=compensate)
        except AsdmError:
            base = PlanBase.of(self.structure.fingerprint, self.structure.denoiser_class)
            return PruningPlan(base=base, edits=[])

    def student(self, plan: PruningPlan) -> Denoiser:
        """Return a plan's student without weights."""
        return empty_student(self.denoiser, plan).to("meta")

    def student_share(self, student: Denoiser) -> float:
        """Return what a call of a student without weights takes, as a part of the original's, by MACs."""
        return macs_of_call(student).below() / 1e9 / self.structure.gmacs

    def passes_to_fit(self, compensate: CompensationKind) -> int:
        """Return how often each calibration call is made to fit each unit alone (`unit_projections`)."""
        return len(fitted_together({unit.name: unit.channels for unit in self.structure.units}, compensate))

    def fitted(self, plan: PruningPlan) -> int:
        """Return how many of a plan's edits are fitted."""
        return len(compensated(plan.edits))
