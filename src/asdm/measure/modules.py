"""Latencies of a model's modules within its calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from asdm.measure.latency import Latency, Patience, Stopwatch, Timing, synchronise


@torch.no_grad()
def module_latencies(
    model: nn.Module,
    call: Callable[[], Any],
    names: Sequence[str],
    *,
    device: torch.device,
    rounds: int = 5,
    patience: float | None = None,
) -> tuple[dict[str, Latency], Timing]:
    """Return each named module's latency in a call of `model`, and the timing of the whole calls, as "model".

    Args:
        rounds: the least number of calls. More follow until the modules' times agree (`PRECISION`). 0: none.
        patience: seconds after which no more follow, as for `measure_interleaved`.
    """
    watch = Stopwatch(device)
    if rounds == 0:
        return dict.fromkeys(names, _NEVER), watch.timing()
    call()
    more = Patience(rounds, patience)
    with timing_modules(model, names, device) as seconds:

        def latencies() -> dict[str, Latency]:
            return {name: Latency.of(values) if values else _NEVER for name, values in seconds.items()}

        while more.another_round(lambda: disagreement(latencies().values())):
            watch.time("model", call)
        return latencies(), watch.timing()


_NEVER = Latency(0.0, 0.0, 0.0, 0)  # of a module that is never called


def disagreement(latencies: Iterable[Latency]) -> float:
    """Return half of all intervals together, relative to the sum of the times."""
    known = list(latencies)
    return sum(each.high_ms - each.low_ms for each in known) / 2 / max(sum(each.ms for each in known), 1e-9)


@contextmanager
def timing_modules(
    model: nn.Module, names: Sequence[str], device: torch.device | str = "cpu"
) -> Iterator[dict[str, list[float]]]:
    """Record the seconds of each call of each named module within the block."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started: dict[str, float] = {}
    handles = []
    for name in names:

        def before(_module: nn.Module, _args: Any, name: str = name) -> None:
            synchronise(device)
            started[name] = time.perf_counter()

        def after(_module: nn.Module, _args: Any, _output: Any, name: str = name) -> None:
            synchronise(device)
            seconds[name].append(time.perf_counter() - started[name])

        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
