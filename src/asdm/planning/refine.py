"""Refinement of plans by what their edits do together, as sensitivities of edits do not add up. Beyond the paper.

Each round is one step of sequential integer programming: measure what each edit is worth beside the others, solve the
programme again near the plan, and keep the result if its student is nearer to the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm import checks
from asdm.choices import CompensationKind
from asdm.compensation.fitting import fit_to_calls, prediction_error, predictions, samples_to_fit
from asdm.compensation.projections import unit_projections
from asdm.data.calibration import CalibrationCall, calibration_calls
from asdm.edits import UnitEdit, restored
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_of, family_of
from asdm.measure.hooks import preserve_module_state
from asdm.measure.latency import Ratio
from asdm.planning.possible_edits import (
    PossibleEdit,
    Resource,
    joint_savings,
    possible_edits,
    predicted_speedup,
    saved_by,
)
from asdm.planning.program import least_sensitive
from asdm.planning.speedup import MEASUREMENT_MARGIN, is_precise, measured_speedup, with_measured, without_measured
from asdm.sensitivity.ablation import Trial, ablate, trials_of
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import student_like
from asdm.student.plan import PlanMetrics, PruningPlan

ROUNDS = 2
CHANGES = 8  # edits that the first round may restore or add, in all

Progress = Callable[[int, int, str], None]


@checks.arguments(
    pipeline=checks.PIPELINE,
    redundancy=checks.a(RedundancyMap, "asdm.analyze makes one"),
    plan=checks.a(PruningPlan, "asdm.make_plan makes one"),
    data=checks.path,
    prompts=checks.PROMPTS,
    timesteps=checks.TIMESTEPS,
    samples=checks.SAMPLES,
    rounds=checks.whole(0, 1000),
    seed=checks.SEED,
    progress=checks.function,
)
@torch.no_grad()
def refine_plan(
    pipeline: DiffusionPipeline,
    redundancy: RedundancyMap,
    plan: PruningPlan,
    *,
    data: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    timesteps: int | None = None,
    samples: int | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruningPlan:
    """Return the plan, or a better one of the same budget, with its `measured_sensitivity`: |student - teacher|^2 /
    |teacher|^2 of the prediction with all edits made and their compensations fitted.

    Args:
        redundancy: the profile that the plan was made from.
        data, prompts, timesteps, samples: the calibration, as for `analyze`.
        rounds: the most attempts to improve it; 0 only measures.
        progress: called with rounds done, rounds in all, and a note.

    Raises:
        AsdmError: the plan has edits that the profile does not know, such as expert kernels: refine first, then add
            them.
    """
    teacher = denoiser_of(pipeline)
    plan.require_for(teacher)
    choices = possible_edits(redundancy, _compensation_of(plan))
    _require_known(plan, choices)
    with preserve_module_state(teacher):
        teacher.eval()
        calls = calibration_calls(pipeline, data, prompts, timesteps or len(redundancy.timesteps), samples, seed)
        fit_calls = calibration_calls(
            pipeline, data, prompts, len(calls), samples or samples_to_fit(pipeline), seed + 1
        )
        refinement = _Refinement(teacher, redundancy, choices, calls, fit_calls, plan)
        for number in range(1, rounds + 1):
            if not refinement.can_improve:
                break
            refinement.run_round(None if progress is None else partial(progress, number, rounds))
    return refinement.result()


@dataclass(frozen=True)
class _Candidate:
    """A plan with its fitted student and the student's error."""

    plan: PruningPlan
    student: Denoiser
    error: float

    def differs_from(self, edits: Sequence[UnitEdit]) -> bool:
        return set(edits) != set(self.plan.edits)


class _Refinement:
    """The state of a refinement: the best plan so far, how much a better one must save, and by how many edits it may
    differ."""

    def __init__(
        self,
        teacher: Denoiser,
        redundancy: RedundancyMap,
        choices: list[PossibleEdit],
        calls: Sequence[CalibrationCall],
        fit_calls: Sequence[CalibrationCall],
        plan: PruningPlan,
    ):
        self.teacher, self.redundancy, self.choices = teacher, redundancy, choices
        self.calls, self.fit_calls = calls, fit_calls
        self.references = predictions(teacher, calls)
        self.resource = _resource(plan)
        self.target = _target(plan)
        self.changes = CHANGES
        self.best: _Candidate
        self.saved: float
        self.needed: float
        self._take(self._candidate(plan))

    @property
    def can_improve(self) -> bool:
        """Whether a plan that differs may still be better."""
        return self.changes > 1

    @property
    def chosen(self) -> list[PossibleEdit]:
        """The best plan's edits among all that are possible."""
        return [choice for choice in self.choices if choice.edit in self.best.plan.edits]

    def run_round(self, note: Callable[[str], None] | None) -> None:
        """Measure what each edit is worth, and try plans near the best one until one is better or none is left."""
        worth = _worth(self.teacher, self.best, self.choices, self.chosen, self.calls, self.fit_calls, self.references)
        repriced = [replace(choice, sensitivity=price) for choice, price in zip(self.choices, worth, strict=True)]
        start = [new for new, old in zip(repriced, self.choices, strict=True) if old in self.chosen]
        while self.can_improve:
            found = self._programme(repriced, start)
            edits = [choice.edit for choice in found or start]
            if not self.best.differs_from(edits):
                self.changes = 0
                return
            candidate = self._candidate(self.best.plan.model_copy(update={"edits": edits}))
            is_nearer = candidate.error < self.best.error
            speedup = self._speedup(candidate.plan) if is_nearer else None
            is_better = is_nearer and (speedup is None or speedup.value >= self.target)
            if note is not None:
                note(_comparison(self.best, candidate, is_better))
            if is_better:
                self._take(replace(candidate, plan=self._with_speedup(candidate.plan, speedup)))
                return
            if is_nearer and self.needed < self.saved:
                self.needed = self.saved  # too slow: save as much as the best plan does
            else:
                self.changes //= 2

    def _programme(self, choices: list[PossibleEdit], start: list[PossibleEdit]) -> list[PossibleEdit] | None:
        """Return the least sensitive edits near the best plan's that save as much as needed."""
        savings, pairs = [getattr(choice, self.resource) for choice in choices], joint_savings(choices, self.resource)
        return least_sensitive(choices, savings, self.needed * (1 - 1e-9), near=(start, self.changes), pairs=pairs)

    def result(self) -> PruningPlan:
        """Return the best plan with its metrics."""
        return _with_metrics(
            self.best.plan,
            predicted_sensitivity=sum(choice.sensitivity for choice in self.chosen),
            predicted_speedup=predicted_speedup(self.redundancy, self.chosen),
            measured_sensitivity=self.best.error,
        )

    def _candidate(self, plan: PruningPlan) -> _Candidate:
        """Build and fit the plan's student, and measure its error."""
        student = student_like(self.teacher, plan)
        fit_to_calls(self.teacher, student, self.fit_calls)
        return _Candidate(plan, student, prediction_error(student, self.calls, self.references))

    def _take(self, candidate: _Candidate) -> None:
        """Make a candidate the best plan."""
        self.best = candidate
        self.saved = saved_by(self.chosen, self.resource)
        self.needed = _needed(candidate.plan, self.saved, self.redundancy.latency_ms)

    def _speedup(self, plan: PruningPlan) -> Ratio | None:
        """Return the plan's measured speed-up; None where it has no target, or the measurement is not precise. The
        programme has then kept the budget by the profile's latencies."""
        if not self.target:
            return None
        measured = measured_speedup(self.teacher, plan)
        return measured if is_precise(measured) else None

    def _with_speedup(self, plan: PruningPlan, speedup: Ratio | None) -> PruningPlan:
        if speedup is not None:
            return with_measured(plan, speedup)
        return without_measured(plan, self.redundancy) if self.target else plan


def _worth(
    teacher: Denoiser,
    best: _Candidate,
    choices: Sequence[PossibleEdit],
    chosen: Sequence[PossibleEdit],
    calls: Sequence[CalibrationCall],
    fit_calls: Sequence[CalibrationCall],
    references: Sequence[Tensor],
) -> list[float]:
    """Return how much nearer to the teacher the student would be without each chosen edit, or how much farther with
    each other one.

    It is the profile's sensitivity for an edit that cannot be tried, because what it changes is removed with something
    larger.
    """
    student, family = best.student, family_of(best.student)
    covered = {name for choice in chosen for name in choice.covers}
    free = [choice for choice in choices if not choice.covers & covered]
    units = [unit for unit in family.units(student) if unit.name in {choice.edit.unit for choice in free}]
    kinds: list[CompensationKind] = [choice.edit.compensation for choice in free if choice.edit.is_removal]
    kind = kinds[0] if kinds else "none"
    projections = unit_projections(student, units, fit_calls, kind) if kind != "none" else {}
    trials = trials_of(student, [choice.edit for choice in free], projections)
    restorations = [_restoration(teacher, student, choice.edit) for choice in chosen]
    errors, _ = ablate(student, [*trials, *restorations], calls, None, references)
    moved = {
        choice: sum(errors[trial.name].values()) / len(calls) - best.error
        for choice, trial in zip([*free, *chosen], [*trials, *restorations], strict=True)
    }
    moved |= {choice: -moved[choice] for choice in chosen}
    return [max(0.0, moved.get(choice, choice.sensitivity)) for choice in choices]


def _restoration(teacher: Denoiser, student: Denoiser, edit: UnitEdit) -> Trial:
    """Return the trial of the student without one of its edits."""
    family = family_of(teacher)
    order, left = family.execution_order(teacher), family.execution_order(student)
    behind = order[order.index(edit.changed_layer(family.layers(teacher))) :]
    first = next(name for name in behind if name in left)  # a removed level has no layers left
    return Trial(f"without {edit}", first, partial(restored, student, teacher, edit, family))


def _require_known(plan: PruningPlan, choices: Sequence[PossibleEdit]) -> None:
    known = [choice.edit for choice in choices]
    unknown = next((edit for edit in plan.edits if edit not in known), None)
    if unknown is not None:
        raise AsdmError(f"{unknown}: the profile does not know this edit; refine a plan as `make_plan` made it")


def _compensation_of(plan: PruningPlan) -> CompensationKind:
    """Return the kind of projection that the plan's edits have."""
    kinds = {edit.compensation for edit in plan.edits}
    return next(iter(kinds - {"none"}), "none")


def _resource(plan: PruningPlan) -> Resource:
    """Return the plan's budgeted resource; milliseconds where it has no budget."""
    target = {} if plan.metrics is None else plan.metrics.target
    return "parameters" if "params" in target else "macs" if "macs" in target else "ms"


def _needed(plan: PruningPlan, saved: float, latency_ms: float) -> float:
    """Return what a better plan must save: as much as this one; less if this one is faster than requested."""
    target = _target(plan)
    measured = None if plan.metrics is None else plan.metrics.measured_speedup
    if not target or measured is None:
        return saved
    spare = max(1.0, measured / (target * MEASUREMENT_MARGIN))
    return max(0.0, latency_ms - (latency_ms - saved) * spare)


def _target(plan: PruningPlan) -> float:
    """Return the requested speed-up; 0 where the plan has another budget."""
    return 0.0 if plan.metrics is None else plan.metrics.target.get("speedup", 0.0)


def _comparison(best: _Candidate, candidate: _Candidate, is_better: bool) -> str:
    before, after = best.plan.edits, candidate.plan.edits
    restored_edits = [edit for edit in before if edit not in after]
    added = len(after) - len(before) + len(restored_edits)
    verdict = "kept" if is_better else "not kept"
    return (
        f"{len(restored_edits)} edits restored, {added} added: "
        f"error {best.error:.4f} to {candidate.error:.4f}, {verdict}"
    )


def _with_metrics(plan: PruningPlan, **metrics: float | None) -> PruningPlan:
    known = plan.metrics or PlanMetrics(target={}, predicted_speedup=1.0)
    return plan.model_copy(update={"metrics": known.model_copy(update=metrics)})
