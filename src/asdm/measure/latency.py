"""Latencies of calls and their ratios, with the uncertainty of both.

Noise only adds time: another process, a page fault or a thermal limit slows a call down; nothing makes it faster. So
calls are timed in turns, in many short rounds, and the fastest rounds count. Rounds repeat until the interval is narrow
or a time limit is met.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from asdm.measure.load import BUSY, LoadMeter

FASTEST = 5  # rounds that count
PRECISION = 0.02  # half of a narrow interval, relative to its value
PATIENCE = 20.0  # seconds after which no more rounds are added
NO_DIFFERENCE = 0.03  # width of an interval that shows that there is hardly a difference
# The most that other processes do when they use as many cores as we have threads, as measured beside such processes:
SLOWDOWN = 25.0  # a time is so many times longer,
DISTORTION = 0.2  # and a ratio of two times is off by so much, relative to it.


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call on an idle machine: that of the fastest round.

    The true value lies between `low_ms` and `high_ms`. With a single round these are a guess.
    """

    ms: float
    low_ms: float
    high_ms: float
    rounds: int

    @property
    def precision(self) -> float:
        """Half of the interval, relative to the value."""
        return (self.high_ms - self.low_ms) / self.ms / 2

    @classmethod
    def of(cls, seconds: Sequence[float], contention: float = 0.0, *, every: bool = False) -> Latency:
        """Return the latency by the seconds of rounds.

        Args:
            contention: the part of the cores that other processes took meanwhile (`LoadMeter`).
            every: all rounds count, not the fastest alone.
        """
        low, best, high = (1000 * value for value in _spread(seconds, len(seconds) if every else None))
        return cls(best, low / (1 + SLOWDOWN * contention), high, len(seconds))


@dataclass(frozen=True)
class Ratio:
    """A speed-up, and the interval that holds the true value."""

    value: float
    low: float
    high: float

    @property
    def is_measurable(self) -> bool:
        """Whether the interval is narrower than the difference to 1."""
        return self.high - self.low <= abs(self.value - 1)

    @property
    def precision(self) -> float:
        """Half of the interval, relative to the value."""
        return (self.high - self.low) / self.value / 2

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def is_known(self) -> bool:
        """Whether it is measurable, or the interval so narrow that there is hardly a difference."""
        return self.is_measurable or self.high - self.low <= NO_DIFFERENCE

    def __str__(self) -> str:
        span = f"{self.low:.2f}–{self.high:.2f}"
        if not self.is_known:
            return f"not measurable now ({span})"
        if not self.is_measurable and self.low <= 1 <= self.high:
            return f"no difference ({span})"
        return f"{self.value:.2f}x ({span})"

    def brief(self) -> str:
        """As `str`, shorter: half of the interval, relative to the value, instead of its ends."""
        if not self.is_known:
            return "not measurable now"
        if self.low == self.high:
            return f"{self.value:.2f}x"
        return f"{self.value:.2f}x ±{self.precision:.0%}"

    @classmethod
    def of(cls, base: Latency, other: Latency, contention: float = 0.0) -> Ratio:
        """Return the ratio of two times of the same rounds, in which others took a part of the cores (`contention`)."""
        doubt = 1 + DISTORTION * contention
        return cls(base.ms / other.ms, base.low_ms / other.high_ms / doubt, base.high_ms / other.low_ms * doubt)


@dataclass(frozen=True)
class Timing(Mapping[str, Latency]):
    """The seconds of several calls, round by round. A ratio of two calls needs both in each round.

    `contention`: for each call and round, the part of this process's cores that others took meanwhile.
    """

    seconds: dict[str, list[float]]
    contention: dict[str, list[float]] = field(default_factory=dict)
    other_cores: float = 0.0

    def __getitem__(self, name: str) -> Latency:
        return Latency.of(self.seconds[name], self.contention_of(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.seconds)

    def __len__(self) -> int:
        return len(self.seconds)

    def speedup(self, base: str, other: str) -> Ratio:
        """Return how many times faster `other` is than `base`.

        It is taken from the rounds in which both were fast, or from the fastest rounds of each, whichever interval is
        narrower. A slow round changes the former little, short bursts of other work the latter.
        """
        if base == other:
            return Ratio(1.0, 1.0, 1.0)
        slow, fast = self.seconds[base], self.seconds[other]
        delays = [max(a / min(slow), b / min(fast)) for a, b in zip(slow, fast, strict=True)]
        counted = sorted(range(len(delays)), key=delays.__getitem__)[: _counted(len(delays))]
        before, after = (Latency.of([each[i] for i in counted], every=True) for each in (slow, fast))
        paired = Ratio.of(before, after, max(self._contention(name, counted) for name in (base, other)))
        return min(paired, Ratio.of(self[base], self[other]), key=lambda ratio: ratio.precision)

    def precision(self) -> float:
        """Return half of the widest interval, relative to its value: of the ratios to the first call, or of the only
        call's time."""
        first, *others = self.seconds
        ratios = [self.speedup(first, other).precision for other in others]
        return max(ratios, default=self[first].precision)

    def contention_of(self, name: str) -> float:
        """Return the part of the cores that others took in the fastest rounds; 0 where it is too small to measure."""
        seconds = self.seconds.get(name, [])
        return self._contention(name, sorted(range(len(seconds)), key=seconds.__getitem__)[: _counted(len(seconds))])

    def _contention(self, name: str, rounds: Sequence[int]) -> float:
        taken = self.contention.get(name)
        mean = sum(taken[i] for i in rounds) / len(rounds) if taken and rounds else 0.0
        return mean if mean >= BUSY else 0.0


@torch.no_grad()
def measure_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = FASTEST,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    precision: float = PRECISION,
    patience: float | None = None,
) -> Timing:
    """Time several calls in turns, so that a slow minute of the machine affects all of them.

    Args:
        rounds: the least number of rounds. More follow until the interval is narrow.
        warmup: rounds before them, which do not count.
        precision: half of a narrow interval, relative to its value.
        patience: seconds after which the rounds end in any case; `PATIENCE` by default, and always as long as twice the
            least number of rounds takes.
    """
    for _ in range(warmup):
        for call in calls.values():
            call()
    watch = Stopwatch(device)
    more = Patience(rounds, patience, precision)
    while more.another_round(lambda: watch.timing().precision()):
        for name, call in calls.items():
            watch.time(name, call)
    return watch.timing()


class Patience:
    """Decides before each round whether another one follows."""

    def __init__(self, rounds: int, seconds: float | None = None, precision: float = PRECISION) -> None:
        self.rounds, self.precision = rounds, precision
        self.seconds = PATIENCE if seconds is None else seconds
        self._done, self._next_look, self._start = 0, rounds, time.perf_counter()

    def another_round(self, reached: Callable[[], float]) -> bool:
        """Return whether another round follows.

        Args:
            reached: gives the precision of all rounds so far. It is called now and then.
        """
        done, spent = self._done, time.perf_counter() - self._start
        if done >= self._next_look:
            limit = max(self.seconds, 2 * spent * self.rounds / done) if self.seconds else 0.0
            if reached() <= self.precision or spent * (done + 1) / done > limit:
                return False
            self._next_look = done + max(1, done // 4)
        self._done += 1
        return True


class Stopwatch:
    """Times calls by name, with the load of the machine meanwhile."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.meter = LoadMeter(1 if torch.device(device).type == "cuda" else None)
        self.spans: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Call `call`, and return its result."""
        synchronise(self.device)
        start = time.perf_counter()
        result = call()
        synchronise(self.device)
        self.add(name, start, time.perf_counter())
        self.meter.mark()
        return result

    def add(self, name: str, start: float, end: float) -> None:
        """Add a call that was timed elsewhere (`time.perf_counter`)."""
        self.spans.setdefault(name, []).append((start, end))

    def timing(self) -> Timing:
        """Return the timing of all calls so far."""
        return Timing(
            seconds={name: [end - start for start, end in spans] for name, spans in self.spans.items()},
            contention={name: [self.meter.contention(*span) for span in spans] for name, spans in self.spans.items()},
            other_cores=self.meter.other_cores(),
        )


def seconds_of(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Return the seconds of one call, until the device has finished it."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has finished its work."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def _counted(rounds: int) -> int:
    """Return how many of the fastest rounds count: the faster half of a few, `FASTEST` of many."""
    return max(1, min(FASTEST, max(2, (rounds + 1) // 2), rounds))


def _spread(seconds: Sequence[float], counted: int | None = None) -> tuple[float, float, float]:
    """Return the lower bound of the true value, the fastest round, and the slowest that counts.

    The true value may lie below the fastest round by as much as the counted rounds lie above it (inferred).
    """
    ordered = sorted(seconds)
    best, high = ordered[0], ordered[(counted or _counted(len(ordered))) - 1]
    if len(ordered) == 1:
        return best / 2, best, best * 2
    return max(best / 2, 2 * best - high), best, high
