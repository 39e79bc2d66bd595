"""The load of the machine by other processes: their CPU time while this one measures."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right

import numpy as np
import psutil
import torch

WINDOW = 0.1  # seconds; the system counts CPU time in ticks of 10 ms, too coarse for shorter ones
BUSY = 0.1  # contention from here on counts; below, it may be an error of the ticks


class LoadMeter:
    """Reads the CPU time of all other processes at each `mark`, and returns their load between two marks."""

    def __init__(self, threads: int | None = None) -> None:
        """Start to measure.

        Args:
            threads: what this process computes on; torch's threads by default.
        """
        self.cores = psutil.cpu_count() or 1
        self.threads = min(threads or torch.get_num_threads(), self.cores)
        self._times: list[float] = []
        self._others: list[float] = []
        self.mark()

    def mark(self) -> None:
        """Take a reading."""
        self._times.append(time.perf_counter())
        self._others.append(seconds_of_others())

    def other_cores(self, start: float | None = None, end: float | None = None) -> float:
        """Return how many cores other processes kept busy from `start` to `end` (`time.perf_counter`), or in all.

        Shorter spans than `WINDOW` are widened to it, as far as there are readings.
        """
        first, last = self._times[0], self._times[-1]
        start, end = first if start is None else start, last if end is None else end
        missing = max(0.0, WINDOW - (end - start)) / 2
        times = np.array(self._times)
        # Only whole intervals between readings: within one, nothing tells when the others computed.
        begin = max(bisect_right(self._times, max(first, start - missing)) - 1, 0)
        stop = min(bisect_left(self._times, min(last, end + missing)), len(times) - 1)
        wall = times[stop] - times[begin]
        return max(0.0, float((self._others[stop] - self._others[begin]) / wall)) if wall > 0 else 0.0

    def contention(self, start: float | None = None, end: float | None = None) -> float:
        """Return the cores that others took from this process, as a part of its threads: 0 none, 1 all."""
        missing = self.other_cores(start, end) + self.threads - self.cores
        return min(1.0, max(0.0, missing / self.threads))


def seconds_of_others() -> float:
    """Return the CPU seconds that all other processes have had since the system started."""
    spent = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests' time is part of the user's
    return sum(seconds for kind, seconds in spent.items() if kind not in idle) - time.process_time()


def busy_line(other_cores: float, contention: float) -> str | None:
    """Return a sentence about a busy machine; None for one that is not."""
    if contention < BUSY:
        return None
    return (
        f"the machine is busy: other processes use {other_cores:.1f} of {psutil.cpu_count()} cores; "
        "measurements take longer, and their intervals are wider"
    )


def look_at_load(seconds: float = 0.3) -> str | None:
    """Return a sentence if other processes need the cores that this one would use, after watching for some time."""
    meter = LoadMeter()
    time.sleep(seconds)
    meter.mark()
    return busy_line(meter.other_cores(), meter.contention())
