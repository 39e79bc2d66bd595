"""Which steps of a sampling are full and which are cached: schedules that a calibration found, and spaced steps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from asdm.errors import AsdmError
from asdm.families import Denoiser, family_of
from asdm.files import write_text
from asdm.measure.latency import Ratio
from asdm.old_names import OLD_CACHE_SCHEDULE_FIELDS, renamed
from asdm.records import Record, read_record

Spacing = Literal["uniform", "late"]
FILE_NAME = "cache_schedule.json"
LATE_EXPONENT = 1.6  # of the places of full steps that become denser towards the end


class CacheSchedule(Record):
    """What a calibration found for one architecture and a speed-up: which steps are full, and how others are cached."""

    fingerprint: str = Field(description="of the architecture")
    steps: int = Field(ge=1, description="sampling steps of the calibration")
    full_steps: tuple[int, ...] = Field(description="indices of the full steps; the others are cached")
    depth: int = Field(ge=1, description="as in `cache_features`")
    order: int = Field(ge=0, le=2, description="as in `cache_features`")
    damping: float = Field(1.0, ge=0, le=1, description="as in `cache_features`")
    full_ms: float = Field(gt=0, description="latency of a full call")
    cached_ms: float = Field(gt=0, description="latency of a cached call")
    speedup: float = Field(gt=0, description="of all calls together, by these latencies")
    speedup_interval: tuple[float, float] | None = Field(None, description="holds the true speed-up")
    distance: float | None = Field(
        None,
        description="mean squared distance of the final latents from those of full steps, over their mean square",
    )
    uniform_distance: float | None = Field(None, description="the distance with copies and as many uniform full steps")

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, content: Any) -> Any:
        return renamed(content, OLD_CACHE_SCHEDULE_FIELDS) if isinstance(content, dict) else content

    @model_validator(mode="after")
    def _within_the_sampling(self) -> CacheSchedule:
        steps = self.full_steps
        if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)):
            raise ValueError("full_steps: rising indices that begin with 0")
        if steps[-1] >= self.steps:
            raise ValueError(f"full_steps: indices below steps={self.steps}")
        return self

    @property
    def ratio(self) -> Ratio:
        """The speed-up with its interval."""
        return Ratio(self.speedup, *(self.speedup_interval or [self.speedup] * 2))

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON."""
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CacheSchedule:
        """Read a schedule, of earlier versions too.

        Raises:
            AsdmError: there is no such file, or it holds no schedule.
        """
        remedy = "`asdm analyze MODEL --cache 2` writes one"
        if not Path(path).is_file():
            raise AsdmError(f"{path}: no such file; {remedy}")
        return read_record(cls, path, "a cache schedule", remedy)

    def require_fit(self, denoiser: Denoiser) -> None:
        """Raise an AsdmError if it was found for another architecture."""
        found = family_of(denoiser).fingerprint(denoiser)
        if found != self.fingerprint:
            raise AsdmError(
                f"this schedule is for the architecture {self.fingerprint}, the denoiser's is {found}; calibrate it "
                "with `asdm analyze MODEL --cache 2`"
            )

    def full_steps_of(self, count: int) -> set[int]:
        """Return the full steps of a sampling in `count` steps: at every part of it as dense as in the calibration."""
        if count == self.steps:
            return set(self.full_steps)
        places = [step / self.steps for step in self.full_steps]
        wanted = min(count, max(1, round(len(places) * count / self.steps)))
        ranks = np.arange(wanted) / wanted * len(places)
        return _nearest_steps(np.interp(ranks, range(len(places) + 1), [*places, 1]), count)

    def is_full(self, index: int, count: int) -> bool:
        """Return whether step `index` of `count` is full."""
        return index in self.full_steps_of(count)


def spaced_steps(count: int, full: int, spacing: Spacing) -> set[int]:
    """Return which `full` of `count` steps are full, evenly spaced or denser late; the first always is."""
    places = [index / full for index in range(full)]
    if spacing == "late":
        places = [1 - (1 - place) ** LATE_EXPONENT for place in places]
    return _nearest_steps(places, count)


def _nearest_steps(places: Iterable[float], count: int) -> set[int]:
    """Return the steps nearest to rising places in [0, 1), no step twice."""
    chosen: set[int] = set()
    for place in places:
        free = [step for step in range(count) if step not in chosen]  # dense places meet
        chosen.add(min(free, key=lambda step: abs(step - place * count)))
    return chosen
