"""Sensitivities of edits do not add up: look at what a plan's edits do together, and exchange those that are not worth
it. Beyond the paper.

Each round is one step of sequential integer programming: what each edit is worth beside the others is measured anew,
the programme is solved again near the plan, and what it proposes is kept where the student is nearer to the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from asdm import checks
from asdm.choices import CompensationKind
from asdm.compensation.fitting import fit_to_calls, prediction_error, predictions, samples_to_fit, unit_maps
from asdm.data.calibration import CalibrationCall, calibration_calls
from asdm.edits import GriAttention, Remove, UnitEdit
from asdm.edits.recast import recast
from asdm.edits.regional_attention import AttentionOnMap
from asdm.edits.surgery import replaced_paths, swapped
from asdm.errors import AsdmError
from asdm.families.unet_structure import execution_order, removable_units
from asdm.measure.hooks import preserve_module_state
from asdm.planning.program import (
    MEASUREMENT_MARGIN,
    PossibleEdit,
    is_precise,
    least_sensitive,
    measured_speedup,
    possible_edits,
    with_measured,
    without_measured,
)
from asdm.sensitivity.profile import RedundancyMap, Trial, ablate, first_layer, trials_of
from asdm.student.build import build_student
from asdm.student.plan import PlanMetrics, PruningPlan

ROUNDS = 2
CHANGES = 8  # edits that the first round may take back or add, in all

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
    """The plan, or a better one of the same budget, with `measured_sensitivity`: |student - teacher|^2 / |teacher|^2
    of the prediction with all edits made and their compensations fitted.

    Args:
        redundancy: the map that the plan was made from.
        data, prompts, timesteps, samples: the calibration, as for `analyze`.
        rounds: at most so many attempts to better it; 0 only measures.
        progress: called with rounds done, rounds in all, and a note.

    Raises:
        AsdmError: the plan has edits that the map does not know, such as banks: refine first, then add them.
    """
    teacher: UNet2DConditionModel = pipeline.unet
    plan.require_for(teacher)
    choices = possible_edits(redundancy, _projection_of(plan))
    chosen = [choice for choice in choices if choice.edit in plan.edits]
    if len(chosen) < len(plan.edits):
        strange = next(edit for edit in plan.edits if edit not in [choice.edit for choice in chosen])
        raise AsdmError(f"{strange}: the map does not know this edit; refine a plan as `make_plan` made it")
    savings = _savings(plan, choices)
    saved = _saved(choices, savings, chosen)
    needed = _needed(plan, saved, redundancy.latency_ms)
    with preserve_module_state(teacher):
        teacher.eval()
        calls = calibration_calls(pipeline, data, prompts, timesteps or len(redundancy.timesteps), samples, seed)
        references = predictions(teacher, calls)
        seen = calibration_calls(pipeline, data, prompts, len(calls), samples or samples_to_fit(pipeline), seed + 1)

        def fitted(candidate: PruningPlan) -> tuple[UNet2DConditionModel, float]:
            student = build_student(teacher, candidate).eval()
            fit_to_calls(teacher, student, seen)
            return student, prediction_error(student, calls, references)

        student, error = fitted(plan)
        changes = CHANGES
        for attempt in range(1, rounds + 1):
            if changes <= 1:
                break
            worth = _worth(teacher, student, choices, chosen, calls, references, error)
            repriced = [replace(choice, sensitivity=price) for choice, price in zip(choices, worth, strict=True)]
            start = [choice for choice, old in zip(repriced, choices, strict=True) if old in chosen]
            while changes > 1:
                found = least_sensitive(repriced, savings, needed * (1 - 1e-9), near=(start, changes))
                edits = [choice.edit for choice in found or start]
                if set(edits) == set(plan.edits):
                    changes = 0
                    break
                candidate = plan.model_copy(update={"edits": edits})
                better, moved = fitted(candidate)
                speed = measured_speedup(teacher, candidate) if moved < error and _target(plan) else None
                if speed is not None and not is_precise(speed):
                    speed = None  # the programme has seen to the budget
                holds = moved < error and (speed is None or speed.value >= _target(plan))
                if progress is not None:
                    verdict = "kept" if holds else "not kept"
                    progress(
                        attempt, rounds, f"{_exchanged(plan, candidate)}: error {error:.4f} to {moved:.4f}, {verdict}"
                    )
                if holds:
                    if speed is not None:
                        candidate = with_measured(candidate, speed)
                    elif _target(plan):
                        candidate = without_measured(candidate, redundancy)
                    plan, student, error = candidate, better, moved
                    chosen = [choice for choice in choices if choice.edit in edits]
                    saved = _saved(choices, savings, chosen)
                    needed = _needed(plan, saved, redundancy.latency_ms)
                    break
                if moved < error and needed < saved:
                    needed = saved  # it was nearer to the teacher, and too slow
                else:
                    changes //= 2
    return _told(plan, redundancy, choices, error)


def _worth(
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    choices: Sequence[PossibleEdit],
    chosen: Sequence[PossibleEdit],
    calls: Sequence[CalibrationCall],
    references: Sequence[Tensor],
    error: float,
) -> list[float]:
    """For each edit, how much nearer to the teacher the student would be without it, or how much farther with it.

    The map's own sensitivity where it cannot be tried, as what it changes is gone with something larger.
    """
    taken = {name for choice in chosen for name in choice.covers}
    free = [choice for choice in choices if not choice.covers & taken]
    units = [unit for unit in removable_units(student) if unit.name in {choice.edit.unit for choice in free}]
    kinds: list[CompensationKind] = [c.edit.compensate for c in free if isinstance(c.edit, Remove)]
    kind = kinds[0] if kinds else "none"
    maps = unit_maps(student, units, calls, kind) if kind != "none" else {}
    trials = trials_of(student, [choice.edit for choice in free], maps)
    restored = [_restoring(teacher, student, choice.edit) for choice in chosen]
    errors, _ = ablate(student, [*trials, *restored], calls, None, references)
    moved = {
        choice: sum(errors[trial.name].values()) / len(calls) - error
        for choice, trial in zip([*free, *chosen], [*trials, *restored], strict=True)
    }
    moved |= {choice: -moved[choice] for choice in chosen}
    return [max(0.0, moved.get(choice, choice.sensitivity)) for choice in choices]


def _restoring(teacher: UNet2DConditionModel, student: UNet2DConditionModel, edit: UnitEdit) -> Trial:
    """A trial of the student without one of its edits."""
    behind, left = execution_order(teacher), execution_order(student)
    behind = behind[behind.index(first_layer(teacher, edit)) :]  # a stage that is gone has no layers left
    first = next(name for name in behind if name in left)
    return Trial(f"without {edit}", first, partial(_restored, teacher, student, edit))


@contextmanager
def _restored(teacher: UNet2DConditionModel, student: UNet2DConditionModel, edit: UnitEdit) -> Iterator[None]:
    """For the length of the block, the teacher's modules in the place of what an edit left."""
    paths = [edit.unit] if isinstance(edit, GriAttention) else replaced_paths(teacher, edit)
    modules = {path: teacher.get_submodule(path) for path in paths}
    # The student's transformer says more to its attentions than the teacher's.
    modules |= {path: recast(AttentionOnMap, each) for path, each in modules.items() if isinstance(each, Attention)}
    with swapped(student, modules):
        yield


def _projection_of(plan: PruningPlan) -> CompensationKind:
    kinds = {edit.compensate for edit in plan.edits if isinstance(edit, Remove)}
    return next(iter(kinds - {"none"}), "none")


def _savings(plan: PruningPlan, choices: Sequence[PossibleEdit]) -> list[float]:
    """Of the resource that the plan's budget is of; milliseconds where it has none."""
    target = {} if plan.figures is None else plan.figures.target
    if "params" in target:
        return [choice.parameters for choice in choices]
    return [choice.macs if "macs" in target else choice.ms for choice in choices]


def _saved(choices: Sequence[PossibleEdit], savings: Sequence[float], chosen: Sequence[PossibleEdit]) -> float:
    return sum(saved for choice, saved in zip(choices, savings, strict=True) if choice in chosen)


def _needed(plan: PruningPlan, saved: float, latency_ms: float) -> float:
    """What a better plan must save: as much as this one, or less where this one was measured to be faster than asked
    for."""
    target = _target(plan)
    measured = None if plan.figures is None else plan.figures.measured_speedup
    if not target or measured is None:
        return saved
    spare = max(1.0, measured / (target * MEASUREMENT_MARGIN))
    return max(0.0, latency_ms - (latency_ms - saved) * spare)


def _target(plan: PruningPlan) -> float:
    """The speed-up that the plan is for; 0 where it is for something else."""
    return 0.0 if plan.figures is None else plan.figures.target.get("speedup", 0.0)


def _exchanged(before: PruningPlan, after: PruningPlan) -> str:
    back = [edit for edit in before.edits if edit not in after.edits]
    return f"{len(back)} edits taken back, {len(after.edits) - len(before.edits) + len(back)} made instead"


def _told(plan: PruningPlan, redundancy: RedundancyMap, choices: Sequence[PossibleEdit], error: float) -> PruningPlan:
    chosen = [choice for choice in choices if choice.edit in plan.edits]
    return _with_figures(
        plan,
        predicted_sensitivity=sum(choice.sensitivity for choice in chosen),
        predicted_speedup=redundancy.latency_ms / (redundancy.latency_ms - sum(choice.ms for choice in chosen)),
        measured_sensitivity=error,
    )


def _with_figures(plan: PruningPlan, **figures: float | None) -> PruningPlan:
    known = plan.figures or PlanMetrics(target={}, predicted_speedup=1.0)
    return plan.model_copy(update={"figures": known.model_copy(update=figures)})
