"""Feature caching: features that hardly change between neighbouring steps are computed at some steps only, and cached
steps reuse them. No training. The authors of A-SDM call it feature inheritance (named in the abstract of arXiv
2406.00210; the rest is inferred).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from asdm import checks
from asdm.caching.schedule import CacheSchedule, Spacing, spaced_steps
from asdm.caching.session import CachingSession, cut_of, hooked, is_caching
from asdm.caching.speedup import full_fraction, timed_calls
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of


@checks.arguments(
    pipeline=checks.PIPELINE,
    speedup=checks.SPEEDUP,
    every=checks.STEPS,
    steps=checks.each(checks.whole(0, 10_000)),
    budget=checks.number(0),
    depth=checks.whole(),
    spacing=checks.literal(Spacing),
    order=checks.whole(0, 2),
    damping=checks.number(0, 1),
)
@contextmanager
def cache_features(
    pipeline: DiffusionPipeline,
    *,
    speedup: float | None = None,
    every: int | None = None,
    steps: Sequence[int] | None = None,
    budget: float | None = None,
    schedule: CacheSchedule | str | Path | None = None,
    depth: int = 1,
    spacing: Spacing = "uniform",
    order: int = 1,
    damping: float = 1.0,
) -> Iterator[CachingSession]:
    """Let the pipeline's denoiser compute in full at some steps and reuse cached features at others.

    Exactly one of five arguments chooses the full steps. Other pipelines that share the denoiser, guidance, ControlNet
    residuals and any size work as before. A new sampling starts with a full step, also after an exception. Each thread
    has its own sampling. Module names stay: LoRA files load, and the denoiser can be saved. It cannot be copied.

    Args:
        speedup: of all denoiser calls together; a timed call of each kind gives the number of full steps.
        every: every n-th step is full.
        steps: indices of the full steps; the first always is.
        budget: adaptive: a step is full once the first layer's output has changed this much since the last full step,
            relative and summed over the steps.
        schedule: what `calibrate_cache` found, or its file; it also sets depth, order and damping.
        depth: how many of the last layers are computed at every step; more are more exact and slower.
        spacing: of the full steps for `speedup`: "uniform", or "late", denser towards the end.
        order: 0 copies the last result; 1 and 2 extrapolate from the last two or three, which stay in memory.
        damping: how far the extrapolation goes from the last result; 0 is a copy, 1 the whole way.

    Raises:
        AsdmError: not exactly one of the five, a value out of range, a speed-up out of reach, a schedule of another
            architecture, a denoiser that is compiled as a whole, or one within another such block.
    """
    choices = {"speedup": speedup, "every": every, "steps": steps, "budget": budget, "schedule": schedule}
    chosen = [name for name, value in choices.items() if value is not None]
    if len(chosen) != 1:
        raise AsdmError(f"give exactly one of {', '.join(choices)}; got {', '.join(chosen) or 'none'}")
    denoiser = denoiser_of(pipeline)
    if schedule is not None:
        schedule = schedule if isinstance(schedule, CacheSchedule) else CacheSchedule.load(schedule)
        schedule.require_fit(denoiser)
        depth, order, damping = schedule.depth, schedule.order, schedule.damping
    _require_cacheable(denoiser, budget)
    fresh = () if budget is None else tuple(family_of(denoiser).layers(denoiser)[:1])
    session = CachingSession(pipeline, order, damping)
    session.budget = budget
    with hooked(denoiser, cut_of(pipeline, depth, fresh), session):
        session.is_full = _decision(session, speedup, every, steps, schedule, spacing)
        yield session


def _require_cacheable(denoiser: Any, budget: float | None) -> None:
    if is_caching(denoiser):
        raise AsdmError("the denoiser's features are cached already; leave the other block first")
    if getattr(denoiser, "_compiled_call_impl", None) is not None or hasattr(denoiser, "_orig_mod"):
        raise AsdmError(
            "the denoiser is compiled as a whole and would be recompiled at every step; compile its repeated blocks "
            "instead (compile_repeated_blocks())"
        )
    if budget is not None and hasattr(denoiser, "cache_cut"):
        raise AsdmError(
            f"budget={budget:g}: compares a layer's outputs, which {type(denoiser).__name__} hides; give every or a "
            "schedule"
        )


def _decision(
    session: CachingSession,
    speedup: float | None,
    every: int | None,
    steps: Sequence[int] | None,
    schedule: CacheSchedule | None,
    spacing: Spacing,
) -> Callable[[int, int], bool | None]:
    """Return whether step `index` of `count` is full; None where a budget decides."""
    if schedule is not None:
        return schedule.is_full
    if every is not None:
        return lambda index, count: index % every == 0
    if steps is not None:
        full_steps = {0, *steps}
        return lambda index, count: index in full_steps
    if speedup is not None:
        times = timed_calls(session)
        fraction = full_fraction(times["full"].ms, times["cached"].ms, speedup)
        return lambda index, count: index in spaced_steps(count, max(1, math.floor(fraction * count)), spacing)
    return lambda index, count: None
