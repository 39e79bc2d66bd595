"""How many steps may be full under a speed-up: from the latencies of a full and of a cached call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asdm.caching.session import CachingSession
from asdm.errors import AsdmError
from asdm.families import denoiser_call, denoiser_of
from asdm.measure.latency import Timing, measure_interleaved


def timed_calls(session: CachingSession, rounds: int = 3) -> Timing:
    """Time a "full" and a "cached" call of the session's denoiser."""
    call = denoiser_call(denoiser_of(session.pipeline))

    def timed(is_cached: bool) -> Callable[[], Any]:
        def run() -> Any:
            with session.forced(is_cached):
                return call()

        return run

    calls = {"full": timed(False), "cached": timed(True)}
    device = session.pipeline._execution_device  # the denoiser's own, unless it is offloaded
    return measure_interleaved(calls, rounds=rounds, warmup=1, device=device)


def full_fraction(full_ms: float, cached_ms: float, speedup: float) -> float:
    """Return the fraction of the calls that may be full.

    Raises:
        AsdmError: the speed-up is out of reach.
    """
    fraction = (full_ms / speedup - cached_ms) / max(full_ms - cached_ms, 1e-9)
    if fraction <= 0:
        raise AsdmError(
            f"speedup={speedup:g}: out of reach; a cached call takes {cached_ms / full_ms:.0%} of a full one, so "
            f"{full_ms / cached_ms:.2f} is the limit; choose a smaller one"
        )
    return fraction
