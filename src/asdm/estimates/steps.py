"""The work of analysis, planning, fitting and evaluation: how many calls each of them takes.

Each function counts what one function of the API computes, and names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from asdm.choices import IMAGE_TO_IMAGE_STRENGTH, CompensationKind, Sensitivity
from asdm.compensation import partial_calls
from asdm.compensation.fitting import samples_to_fit, samples_to_fit_trials
from asdm.data.calibration import calibration_samples
from asdm.diffusion.generation import default_guidance, is_random
from asdm.estimates.architecture import HALF, Architecture
from asdm.estimates.sampling import calibration, calibration_timesteps, judged_images, sampling
from asdm.estimates.work import Network, StepWork, Work, calls, total
from asdm.evaluation import image_timing
from asdm.evaluation.image_to_image import image_to_image_fault
from asdm.evaluation.sampling import evaluation_sets
from asdm.evaluation.speed import DENOISER_ROUNDS, EXTRAPOLATED_STEPS, LONGEST_TIMED_IMAGE_MS
from asdm.evaluation.starting_images import image_to_image_sets
from asdm.measure import latency
from asdm.planning.refine import CHANGES
from asdm.planning.speedup import MEASUREMENT_ATTEMPTS
from asdm.sensitivity.analysis import TAYLOR_PROBES
from asdm.sensitivity.costs import groups_measured_together
from asdm.student.plan import PruningPlan

FIT_TIMESTEPS = 8  # of `fit_compensation`
FLOAT32 = 4  # bytes
WARMUP = 2  # calls before those of a measurement that count


def analysis(
    pipeline: DiffusionPipeline,
    architecture: Architecture,
    *,
    data: str | Path | None = None,
    sensitivity: Sensitivity | None = None,
    compensate: CompensationKind | None = None,
    timesteps: int | None = None,
    samples: int | None = None,
    rounds: int = 5,
) -> StepWork:
    """Return the work of `analyze`, with its arguments."""
    sensitivity = sensitivity or ("taylor" if is_random(pipeline) else "ablation")
    compensate = compensate or ("none" if is_random(pipeline) else "linear")
    timesteps, samples = timesteps or calibration_timesteps(pipeline), samples or calibration_samples(pipeline)
    work = _unit_costs(architecture, rounds) + calibration(pipeline, data, samples)
    if sensitivity == "taylor":
        tried, share = architecture.trials(edit for edit in architecture.others if not edit.has_first_order_estimate)
        passes = 1 + TAYLOR_PROBES + share  # a backward pass to the hidden states alone takes as long as a forward one
        work += calls(1, samples) + calls(timesteps * (1 + tried), samples, forwards=timesteps * passes)
    else:
        if compensate != "none":  # a fit of each unit alone
            to_fit, passes = samples_to_fit_trials(pipeline, samples), architecture.passes_to_fit(compensate)
            work += calibration(pipeline, data, to_fit) + calls(timesteps * passes, to_fit)
        tried, share = architecture.trials(choice.edit for choice in architecture.choices("none"))
        work += calls(timesteps * (1 + tried), samples, forwards=timesteps * (1 + share))
    return StepWork.exactly("analyse", work)


def _unit_costs(architecture: Architecture, rounds: int) -> Work:
    """Return the work of `measure_costs` and `measure_edits`: modules are timed in a few calls of each variant."""
    timed = calls(1, 2) + calls(rounds, 2).timed(latency.PATIENCE)
    work, others = calls(1, 1) + timed, architecture.others
    if others:
        groups = groups_measured_together(others)
        work += timed + calls(len(groups), 1)
        work += timed * sum(any(not edit.is_removal for edit in group) for group in groups)
    return work


def plan(
    pipeline: DiffusionPipeline,
    architecture: Architecture,
    *,
    budget: Mapping[str, Any],
    expected: PruningPlan,
    compensate: CompensationKind,
    refine: int = 0,
    data: str | Path | None = None,
    call_ms: float,
) -> StepWork:
    """Return the work of `full_plan`, with its arguments.

    Args:
        expected: a plan of about the size that is to be made.
        call_ms: milliseconds of a denoiser call at batch 2.
    """
    least, most = Work(), Work()
    if budget.get("speedup") is not None:
        measured = _measured_speedup(int(np.clip(10_000 / call_ms, 4, 10)))
        least, most = measured, measured * MEASUREMENT_ATTEMPTS
    if refine:
        fewest, largest = _refinement(pipeline, architecture, expected, compensate, refine, data)
        if budget.get("speedup") is not None:
            largest += _measured_speedup(5) * (refine + _failures())
        least, most = least + fewest, most + largest
    return StepWork("plan", least, most)


def _measured_speedup(rounds: int) -> Work:
    """Return the work of `measured_speedup`."""
    pair = calls(1, 2) + calls(1, 2, "student")
    return pair * WARMUP + (pair * rounds).timed(latency.PATIENCE)


def _failures() -> int:
    """Return how many plans a refinement may try without success: each halves the number of edits that may change, and
    one may be too slow."""
    return int(np.log2(CHANGES)) + 1


def _refinement(
    pipeline: DiffusionPipeline,
    architecture: Architecture,
    expected: PruningPlan,
    compensate: CompensationKind,
    rounds: int,
    data: str | Path | None,
) -> tuple[Work, Work]:
    """Return the least and the most work of `refine_plan`: it ends where no better plan is found."""
    timesteps, samples, more = calibration_timesteps(pipeline), calibration_samples(pipeline), samples_to_fit(pipeline)
    start = calibration(pipeline, data, samples) + calibration(pipeline, data, more) + calls(timesteps, samples)
    candidate = _fit(architecture, expected, timesteps, more) + calls(timesteps, samples, "student")
    choices = architecture.choices(compensate)
    covered = {unit for choice in choices if choice.edit in expected.edits for unit in choice.covers}
    free = [choice.edit for choice in choices if choice.edit in expected.edits or not choice.covers & covered]
    tried, share = architecture.trials(free)
    worth = calls(timesteps * (1 + tried), samples, "student", forwards=timesteps * (1 + share))
    if compensate != "none":
        worth += calls(timesteps * architecture.passes_to_fit(compensate), more, "student")
    return start + candidate + worth, start + candidate + worth * rounds + candidate * (rounds + _failures())


def fitting(
    pipeline: DiffusionPipeline, architecture: Architecture, expected: PruningPlan, data: str | Path | None
) -> StepWork:
    """Return the work of `fit_compensation`; none where the plan fits nothing."""
    samples = samples_to_fit(pipeline)
    work = Work()
    if architecture.fitted(expected):
        work = calibration(pipeline, data, samples) * 2 + calls(FIT_TIMESTEPS, samples)
        work += calls(2 * FIT_TIMESTEPS, samples, "student")
        work += _fit(architecture, expected, FIT_TIMESTEPS, samples)
    return StepWork.exactly("compensate", work)


def _fit(architecture: Architecture, expected: PruningPlan, timesteps: int, samples: int) -> Work:
    """Return the work of `fit_to_calls`: for each unit both denoisers run to the unit. What runs before it answers from
    a cache, as far as that has room."""
    fitted = architecture.fitted(expected)
    if not fitted:
        return Work()
    hidden = sum(unit.channels * unit.positions for unit in architecture.structure.units if unit.parent is None)
    cached = min(1.0, partial_calls.CACHE_BYTES / (FLOAT32 * hidden * samples * timesteps))
    forwards = timesteps * (cached + (1 - cached) * fitted * HALF)
    with_time = sum(edit.compensates_time for edit in expected.edits)
    work = calls(timesteps * fitted, samples, forwards=forwards)
    return work + calls(timesteps * (fitted + with_time), samples, "student", forwards=forwards)


def evaluation(
    pipeline: DiffusionPipeline,
    networks: Sequence[Network],
    *,
    data: str | Path | None,
    samples: int,
    image_to_image: int,
    strength: float | None,
    steps: int,
    seed: int,
    quality: bool,
    call_ms: float,
) -> StepWork:
    """Return the work of `evaluate`, with its arguments, for a teacher and its students (`networks`)."""
    strength = strength or IMAGE_TO_IMAGE_STRENGTH
    guidance = default_guidance(pipeline)
    can_start = image_to_image > 0 and image_to_image_fault(pipeline, steps, strength) is None
    sets = evaluation_sets(data, None, samples, seed) if quality else []
    starts = image_to_image_sets(data, sets, min(image_to_image, samples) if can_start else 0, seed)
    work = total(
        judged_images(pipeline, sets, starts, steps, guidance, strength=strength, network=network)
        for network in networks
    )
    for start in starts:
        # Targets are encoded and decoded; without any, the teacher generates the images of another seed.
        count = len(start.sources)
        work += Work(encodes=count, decodes=count)
        if not start.targets:
            work += sampling(pipeline, count, steps, guidance, strength=strength)
    return StepWork.exactly("evaluate", work + _speed(pipeline, networks, steps, can_start, call_ms))


def _speed(
    pipeline: DiffusionPipeline, networks: Sequence[Network], steps: int, with_encoder: bool, call_ms: float
) -> Work:
    """Return the work of `measure_speed`: denoiser calls and images in turns."""
    pairs = total(calls(1, 2, network) for network in networks)
    is_long = call_ms * steps > LONGEST_TIMED_IMAGE_MS and steps > EXTRAPOLATED_STEPS
    guidance, timed_steps = default_guidance(pipeline), EXTRAPOLATED_STEPS if is_long else steps
    images = total(sampling(pipeline, 1, timed_steps, guidance, network=network) for network in networks)
    images += Work(decodes=len(networks))
    encodes = Work(encodes=1) if with_encoder else Work()
    rounds = ((images + encodes) * image_timing.IMAGES).timed(image_timing.IMAGES_PATIENCE)
    counted = total(calls(1, 1, network) for network in networks)
    return pairs * WARMUP + (pairs * DENOISER_ROUNDS).timed(latency.PATIENCE) + images + rounds + counted
