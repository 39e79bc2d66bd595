"""Plans for a speed-up: choose edits by predicted latencies, measure the pruned model, and correct the aim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from asdm import checks
from asdm.compensation.folding import fold_projections
from asdm.devices import on_device
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_call
from asdm.measure.hooks import preserve_module_state
from asdm.measure.latency import Ratio, measure_interleaved
from asdm.pipelines.random_models import random_denoiser
from asdm.planning.possible_edits import PossibleEdit, Resource, joint_savings, plan_of
from asdm.planning.program import least_sensitive, most_saved
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import build_student
from asdm.student.plan import PlanMetrics, PruningPlan, SpeedupBasis

MEASUREMENT_ATTEMPTS = 6
PRECISE_ENOUGH = 0.05  # half of a measured speed-up's interval, relative to it, up to which a plan goes by it
CLOSE_ENOUGH = 1.04  # a plan that is faster than needed by this factor or less is accepted
MEASUREMENT_MARGIN = 1.02  # on the target, so that a later measurement meets it too
# Margins on a speed-up that is not measured. Of 16 plans of the embedded UNet, the measured speed-ups were 1.00 to 1.03
# times those predicted from latencies, and 0.96 to 1.06 times those predicted from MACs.
CORRECTIONS: dict[SpeedupBasis, float] = {"latency": MEASUREMENT_MARGIN, "macs": 1.05}

Note = Callable[[str], None]


def plan_for_speedup(
    redundancy: RedundancyMap,
    target: float,
    choices: list[PossibleEdit],
    unet: Denoiser | None,
    device: str | None,
    rounds: int,
    note: Note | None,
) -> PruningPlan:
    """Return the least sensitive plan whose measured speed-up reaches the target.

    Args:
        unet: the denoiser to measure; by default one of the profile's shape with random weights, on `device`.
        rounds: the least number of timed rounds per measurement.
        note: called with a line about each attempt.

    Raises:
        AsdmError: no plan reaches the target.
    """
    savings, total = [choice.ms for choice in choices], redundancy.latency_ms
    pairs = joint_savings(choices, "ms")
    aim = _Aim(target, reachable=total / max(total - most_saved(choices, savings, pairs), 1e-9))
    if unet is None:
        random = random_denoiser(redundancy.family, redundancy.unet_config, getattr(torch, redundancy.dtype))
        unet = on_device(random, device or "cpu")
    best: PruningPlan | None = None
    fastest = 0.0
    for attempt in range(1, MEASUREMENT_ATTEMPTS + 1):
        chosen = least_sensitive(choices, savings, total * (1 - 1 / aim.speedup), pairs=pairs)
        if chosen is None:
            aim.lower()
            continue
        plan = plan_of(redundancy, chosen, {"speedup": target})
        measured = measured_speedup(unet, plan, rounds)
        if note is not None:
            note(f"attempt {attempt}: {len(chosen)} edits; measured: {measured}; requested: {target:g}x")
        if not is_precise(measured):
            if best is None:
                return _plan_unmeasured(redundancy, target, choices, note)
            break
        fastest = max(fastest, measured.value)
        if measured.value >= aim.needed:
            best = with_measured(plan, measured)
            if measured.value <= aim.needed * CLOSE_ENOUGH:
                break
        aim.correct(measured.value)
    if best is None:
        raise AsdmError(
            f"speedup={target:g}: out of reach; measured {fastest:.2f}x at most, "
            f"about {aim.reachable:.2f}x if every unit went; ask for less"
        )
    return best


@dataclass
class _Aim:
    """The predicted speed-up to plan for next: the target, corrected by what was measured, within a shrinking bracket.

    `reachable`: the predicted speed-up of the fastest plan. `needed`: what a measurement must reach.
    """

    target: float
    reachable: float
    needed: float = field(init=False)
    speedup: float = field(init=False)
    too_slow: float = 1.0
    fast_enough: float = np.inf

    def __post_init__(self) -> None:
        self.needed = self.target * MEASUREMENT_MARGIN
        self.speedup = self.target

    def lower(self) -> None:
        """Aim lower: no plan is predicted to be so fast."""
        self.fast_enough = self.speedup
        self.speedup = (self.too_slow + min(self.speedup, self.reachable)) / 2

    def correct(self, measured: float) -> None:
        """Aim by the ratio of the measured to the predicted speed-up, or halve the bracket."""
        if measured >= self.needed:
            self.fast_enough = self.speedup
        else:
            self.too_slow = self.speedup
        guess = self.speedup * self.needed * (1 + (CLOSE_ENOUGH - 1) / 2) / measured
        if self.too_slow < guess < self.fast_enough:
            self.speedup = guess
        else:
            self.speedup = (self.too_slow + min(self.fast_enough, 2 * self.too_slow)) / 2


def _plan_unmeasured(
    redundancy: RedundancyMap, target: float, choices: list[PossibleEdit], note: Note | None
) -> PruningPlan:
    """Plan by the profile's latencies, or by MACs where those are in doubt too."""
    basis = _basis(redundancy)
    correction, by_latency = CORRECTIONS[basis], basis == "latency"
    total = redundancy.latency_ms if by_latency else redundancy.gmacs * 1e9
    resource: Resource = "ms" if by_latency else "macs"
    savings, pairs = [getattr(choice, resource) for choice in choices], joint_savings(choices, resource)
    chosen = least_sensitive(choices, savings, total * (1 - 1 / (target * correction)), pairs=pairs)
    if chosen is None:
        raise AsdmError(
            f"speedup={target:g}: out of reach by the profile's {basis}, and not measurable now as the machine is "
            "busy; ask for less, or plan on a quiet machine"
        )
    if note is not None:
        source = "the profile's latencies" if by_latency else "MACs"
        note(
            f"not measurable now, as the machine is busy: planned by {source} for {target:g}x times a correction of "
            f"{correction:g}; measure it later with `asdm plan --remeasure`"
        )
    return plan_of(redundancy, chosen, {"speedup": target}, basis)


def _basis(redundancy: RedundancyMap) -> SpeedupBasis:
    """Return what a speed-up that is not measured is predicted from."""
    return "latency" if redundancy.has_reliable_latencies else "macs"


def measured_speedup(unet: Denoiser, plan: PruningPlan, rounds: int = 5) -> Ratio:
    """Measure how many times faster a denoiser call (batch 2) is with the plan's edits, its projections folded, in
    interleaved rounds."""
    with preserve_module_state(unet):
        unet.eval()
        student = build_student(unet, plan)
        fold_projections(student)
        calls = {"original": denoiser_call(unet), "pruned": denoiser_call(student)}
        return measure_interleaved(calls, rounds=rounds, device=unet.device).speedup("original", "pruned")


def is_precise(ratio: Ratio) -> bool:
    """Return whether a plan can go by this measurement."""
    return ratio.precision <= PRECISE_ENOUGH


@checks.arguments(plan=checks.a(PruningPlan, "asdm.make_plan makes one"), unet=checks.UNET)
def remeasure_plan(plan: PruningPlan, unet: Denoiser) -> PruningPlan:
    """Return the plan with its speed-up measured on this machine now.

    Raises:
        AsdmError: a plan for another model, or the machine is too busy to measure it.
    """
    measured = measured_speedup(unet, plan)
    if not is_precise(measured):
        raise AsdmError(f"{measured}: other processes are busy; end them, or try again later")
    return with_measured(plan, measured)


def with_measured(plan: PruningPlan, measured: Ratio) -> PruningPlan:
    """Return the plan with this measurement among its metrics."""
    return _with_speedup(plan, measured.value, measured.interval, "measured")


def without_measured(plan: PruningPlan, redundancy: RedundancyMap) -> PruningPlan:
    """Return the plan without a measured speed-up: it is predicted from the profile."""
    return _with_speedup(plan, None, None, _basis(redundancy))


def _with_speedup(
    plan: PruningPlan, value: float | None, interval: tuple[float, float] | None, basis: SpeedupBasis
) -> PruningPlan:
    known = plan.metrics or PlanMetrics(target={}, predicted_speedup=1.0)
    update = {"measured_speedup": value, "measured_speedup_interval": interval, "speedup_basis": basis}
    return plan.model_copy(update={"metrics": known.model_copy(update=update)})
