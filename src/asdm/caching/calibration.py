"""Calibration of feature caching: which steps to compute in full, at what depth, for a speed-up.

One recorded sampling gives the errors of copies and extrapolations at every step. A few probes measure what an error at
one step does to the final latents. The best schedule under the weighted sum of errors is a shortest path. Inferred; no
paper describes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from asdm import checks
from asdm.caching.extrapolation import extrapolation_errors
from asdm.caching.features import cache_features
from asdm.caching.recording import Recording, Sampling, prepare_sampling, record
from asdm.caching.schedule import CacheSchedule, spaced_steps
from asdm.caching.session import CachingSession, cut_of
from asdm.caching.speedup import full_fraction, timed_calls
from asdm.data.sources import require_usable
from asdm.diffusion.generation import require_steps
from asdm.diffusion.kinds import require_text_to_image
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of
from asdm.measure.latency import Ratio, Timing

Progress = Callable[[int, int, str], None]
DAMPINGS = (0.0, 0.5, 0.75, 1.0)  # 0 is a copy
LEAST_STEPS = 4


def calibrate_cache(
    pipeline: DiffusionPipeline,
    *,
    speedup: float,
    steps: int = 25,
    data: str | Path | None = None,
    samples: int | None = None,
    guidance_scale: float | None = None,
    depth: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CacheSchedule:
    """Find the schedule for `cache_features` that moves the final latents least at a speed-up of all denoiser calls.

    It takes about six samplings' time.

    Args:
        speedup: how many times faster all denoiser calls of a sampling together are to be.
        steps: sampling steps of the pipeline's own scheduler; at least 4.
        data: source of the captions (as for `analyze`); by default this package's prompts.
        samples: prompts; by default 4 at up to 32x32 latents, else 1.
        guidance_scale: the pipeline's usual one by default, as for `generate`.
        depth: of the cut (`cache_features`), such as that of exported graphs; by default the best is chosen.

    Raises:
        AsdmError: the speed-up is out of reach, or there are fewer than four steps.
    """
    observations = observe_sampling(
        pipeline,
        steps=steps,
        data=data,
        samples=samples,
        guidance_scale=guidance_scale,
        depth=depth,
        seed=seed,
        speedup=speedup,
        progress=progress,
    )
    return observations.schedule(speedup)


@checks.arguments(
    pipeline=checks.PIPELINE,
    speedup=checks.SPEEDUP,
    data=checks.path,
    samples=checks.SAMPLES,
    guidance_scale=checks.GUIDANCE,
    depth=checks.whole(),
    seed=checks.SEED,
    progress=checks.function,
)
@torch.no_grad()
def observe_sampling(
    pipeline: DiffusionPipeline,
    *,
    steps: int = 25,
    data: str | Path | None = None,
    samples: int | None = None,
    guidance_scale: float | None = None,
    depth: int | None = None,
    seed: int = 0,
    speedup: float = 1.0,
    progress: Progress | None = None,
) -> Observations:
    """Measure what schedules for any speed-up from `speedup` on follow from. Arguments as for `calibrate_cache`."""
    require_text_to_image(pipeline)
    require_steps(pipeline, steps)
    if steps < LEAST_STEPS:
        raise AsdmError(f"steps={steps}: too few to cache anything; allowed are {LEAST_STEPS} and more")
    if data is not None:
        require_usable(data)
    denoiser = denoiser_of(pipeline)
    times = _timed_depths(pipeline, family_of(denoiser).cache_depths(denoiser) if depth is None else [depth], speedup)
    sampling = prepare_sampling(pipeline, steps, data, samples, guidance_scale, seed)
    count = len(sampling.timesteps)  # second-order schedulers visit a time step twice
    probes = _probes(count)
    report = _Report(progress, count + sum(count - 1 - probe for probe in probes))
    recording = record(sampling, {each: cut_of(pipeline, each) for each in times}, probes, report)
    effects = _effects(sampling, recording, list(times), probes, report)
    return Observations(
        sampling=sampling,
        recording=recording,
        weights={each: _interpolated(effects[each], probes, count) for each in times},
        costs={each: (time["full"].ms, time["cached"].ms) for each, time in times.items()},
        ratios={each: time.speedup("full", "cached") for each, time in times.items()},
    )


@dataclass(frozen=True)
class Observations:
    """One recorded sampling, and what follows from it.

    `weights` (steps,) by depth: the final distance for a squared error 1 of the features at one step. `costs`:
    milliseconds of a full and of a cached call, by depth. `ratios`: of the two, with intervals.
    """

    sampling: Sampling
    recording: Recording
    weights: dict[int, np.ndarray]
    costs: dict[int, tuple[float, float]]
    ratios: dict[int, Ratio]

    def schedule(self, speedup: float) -> CacheSchedule:
        """Return the schedule with the least distance: of the two best by estimate, the better one as measured."""
        full_fraction(*self.costs[min(self.costs)], speedup)
        best = []
        for depth, (full_ms, cached_ms) in self.costs.items():
            if speedup < full_ms / cached_ms:
                best.append(min(self._schedules(depth, speedup), key=_distance_of))
        measured = [
            schedule.model_copy(update={"distance": self.distance(schedule=schedule)})
            for schedule in sorted(best, key=_distance_of)[:2]
        ]
        chosen = min(measured, key=_distance_of)
        uniform = sorted(spaced_steps(chosen.steps, len(chosen.full_steps), "uniform"))
        uniform_distance = self.distance(steps=uniform, depth=chosen.depth, order=0)
        return chosen.model_copy(update={"uniform_distance": uniform_distance})

    def _schedules(self, depth: int, speedup: float) -> Iterator[CacheSchedule]:
        """Yield the best schedule at one depth for each damping, with its estimated distance."""
        full_ms, cached_ms = self.costs[depth]
        count = len(self.sampling.timesteps)
        full = min(count, max(1, math.floor(full_fraction(full_ms, cached_ms, speedup) * count + 1e-6)))
        low, high = (count / (full + (count - full) / bound) for bound in self.ratios[depth].interval)
        for damping in DAMPINGS:
            errors = extrapolation_errors(self.recording.products[depth], self.recording.sigmas, damping)
            full_steps, distance = best_steps(errors * self.weights[depth], full)
            denoiser = denoiser_of(self.sampling.pipeline)
            yield CacheSchedule(
                fingerprint=family_of(denoiser).fingerprint(denoiser),
                steps=count,
                full_steps=tuple(full_steps),
                depth=depth,
                order=1 if damping else 0,
                damping=damping or 1.0,
                full_ms=full_ms,
                cached_ms=cached_ms,
                speedup=count * full_ms / (full * full_ms + (count - full) * cached_ms),
                speedup_interval=(low, high),
                distance=distance,
            )

    @torch.no_grad()
    def distance(self, **settings: Any) -> float:
        """Distance of the final latents from those of full steps, with `settings` of `cache_features`."""
        with cache_features(self.sampling.pipeline, **settings):
            scheduler = copy.deepcopy(self.recording.schedulers[0])
            return self.recording.distance(self.sampling.finish(scheduler, self.sampling.latents, 0))


def _distance_of(schedule: CacheSchedule) -> float:
    return schedule.distance or 0.0


def best_steps(errors: np.ndarray, full: int) -> tuple[list[int], float]:
    """Choose the full steps, the first among them, with the least sum of the other steps' errors; also that sum.

    Errors of cached steps between the same two full steps point the same way, so their square roots add up. Errors of
    different runs add up as squares.

    Args:
        errors: (q, p, i), what a cached step i adds if q and p are the last two full steps; q = p if there is one.
        full: how many steps are full.
    """
    count = len(errors)
    ahead = np.arange(count) > np.arange(count)[:, None]  # (p, i)
    run = np.zeros((count, count, count + 1))  # (q, p, next full step): of all steps between
    run[:, :, 1:] = np.cumsum(np.sqrt(errors) * ahead, axis=-1) ** 2
    rest = run[:, :, count].copy()  # (q, p): of all steps after p if p is the last full one
    choices = []
    for _ in range(full - 1):
        totals = np.where(ahead, run[:, :, :count] + rest, np.inf)  # (q, p, c): `rest` of (p, c)
        choices.append(totals.argmin(-1))
        rest = totals.min(-1)
    chosen, q, p = [0], 0, 0
    for choice in reversed(choices):
        q, p = p, int(choice[q, p])
        chosen.append(p)
    return chosen, float(rest[0, 0])


class _Report:
    """Progress in denoiser calls."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, note: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, note)


def _timed_depths(pipeline: DiffusionPipeline, depths: list[int], speedup: float) -> dict[int, Timing]:
    """Return the calls of each depth that reaches the speed-up; always those of the first, the fastest.

    Raises:
        AsdmError: the speed-up is out of reach.
    """
    times: dict[int, Timing] = {}
    for depth in depths:
        with cache_features(pipeline, every=1, depth=depth, order=1) as session:
            times[depth] = timed_calls(session)
    full_fraction(times[depths[0]]["full"].ms, times[depths[0]]["cached"].ms, speedup)
    return {
        depth: time
        for depth, time in times.items()
        if depth == depths[0] or speedup < time["full"].ms / time["cached"].ms
    }


def _probes(count: int) -> list[int]:
    """Steps at which an error's effect is measured: the first and the last ones, where it changes much, and some
    between."""
    places = {1, count // 8, count // 4, count // 2, 3 * count // 4, count - 3, count - 2, count - 1}
    return sorted(place for place in places if place >= 1)


def _effects(
    sampling: Sampling, recording: Recording, depths: list[int], probes: list[int], report: _Report
) -> dict[int, list[float]]:
    """Return, by depth and for each probe, the final distance for a squared error 1 of the features.

    The probes of the first depth are sampled to the end. The other depths' errors of the prediction are taken to have
    the same effect, relative to their size.
    """
    effects: dict[int, list[float]] = {depth: [] for depth in depths}
    moved: dict[int, float] = {}  # probe -> final distance for a squared error 1 of the prediction
    for depth in depths:
        with cache_features(sampling.pipeline, steps=[0], depth=depth, order=0) as session:
            for probe in probes:
                error, finish = _probe(sampling, recording, session, depth, probe)
                if depth == depths[0]:
                    moved[probe] = finish(report) / max(error, 1e-20)
                products = recording.products[depth]
                change = products[probe, probe] + products[probe - 1, probe - 1] - 2 * products[probe, probe - 1]
                effects[depth].append(moved[probe] * error / max(float(change), 1e-20))
    return effects


def _probe(
    sampling: Sampling, recording: Recording, session: CachingSession, depth: int, probe: int
) -> tuple[float, Callable[[_Report], float]]:
    """Predict at a step with the features of the step before.

    Returns:
        The squared error of the prediction, and a function that samples on from it and gives the final distance.
    """
    latents, scheduler = recording.latents[probe], copy.deepcopy(recording.schedulers[probe])
    if not session.is_filled:
        with session.forced(is_cached=False):
            sampling.predict(scheduler, latents, probe)
    session.replace_cached(recording.features[depth][probe - 1])
    with session.forced(is_cached=True):
        prediction = sampling.predict(scheduler, latents, probe)

    def finish(report: _Report) -> float:
        following = sampling.step(scheduler, prediction, latents, probe)
        with session.forced(is_cached=False):
            return recording.distance(sampling.finish(scheduler, following, probe + 1, report))

    error = float((prediction - recording.predictions[probe]).float().square().mean())
    return error, finish


def _interpolated(effects: list[float], probes: list[int], count: int) -> np.ndarray:
    """Effects at all steps (count,), by their logarithms."""
    return np.exp(np.interp(np.arange(count), probes, np.log(np.maximum(effects, 1e-20))))
