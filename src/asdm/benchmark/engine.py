"""A program of other authors that samples in a loop of its own, and is timed by what it reports after each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from asdm.errors import AsdmError
from asdm.measure.latency import Stopwatch

Parts = dict[str, tuple[str, int]]  # of an image, as `ImageTiming` has them
Draw = Callable[[int, Callable[[], None]], Any]  # an image in so many steps; calls back after each step


@dataclass(frozen=True)
class Engine:
    """A loaded model: `draw(steps, on_step)` makes one image of the pipeline's size, with guidance."""

    draw: Draw
    dtype: str

    def time(self, watch: Stopwatch, name: str, *, drawn_steps: int, steps: int) -> Parts:
        """Draw an image in `drawn_steps` (two or more), and return the parts of one in `steps`.

        An untimed image of one step comes first: it reads the weights. The report of the first step follows the text
        encoder, so these two are one part.

        Raises:
            AsdmError: the program reports another number of steps.
        """
        self.draw(1, lambda: None)
        reports: list[float] = []

        def on_step() -> None:
            reports.append(time.perf_counter())
            watch.meter.mark()

        watch.meter.mark()
        start = time.perf_counter()
        self.draw(drawn_steps, on_step)
        end = time.perf_counter()
        watch.meter.mark()
        if len(reports) != drawn_steps:
            raise AsdmError(f"{name}: reported {len(reports)} steps in an image of {drawn_steps}: it is not comparable")
        first, step, rest = f"{name}: first step", f"{name}: UNet, whole", f"{name}: VAE decoder"
        watch.add(first, start, reports[0])
        for before, after in pairwise(reports):
            watch.add(step, before, after)
        watch.add(rest, reports[-1], end)
        return {
            "text encoder and first step": (first, 1),
            "UNet, whole": (step, steps - 1),
            "VAE decoder": (rest, 1),
        }
