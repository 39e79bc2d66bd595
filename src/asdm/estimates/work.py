"""What a step computes, in calls of the networks: the terms in which its time is estimated.

Calls of the denoiser dominate every step. Encodings and decodings by the VAE are counted too. The text encoders, the
metrics of images, and reading and writing are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

Network = Literal["teacher", "student"]
Kind = tuple[Network, int]  # whose denoiser is called, and how many samples the call has


@dataclass(frozen=True)
class Work:
    """A number of calls.

    `calls` counts calls of the denoiser by kind. `forwards` is what they take, in whole forward passes of their kind:
    less where a call begins at cached outputs, more where a backward pass follows. `encodes` and `decodes` are images
    through the VAE. `seconds` is time that is known otherwise. `repeated` is the part of the work that a measurement
    repeats on a busy machine, with the seconds after which it no longer does.
    """

    calls: Counter[Kind] = field(default_factory=Counter)
    forwards: Counter[Kind] = field(default_factory=Counter)
    encodes: int = 0
    decodes: int = 0
    seconds: float = 0.0
    repeated: tuple[tuple[Work, float], ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(
            self.calls + other.calls,
            self.forwards + other.forwards,
            self.encodes + other.encodes,
            self.decodes + other.decodes,
            self.seconds + other.seconds,
            self.repeated + other.repeated,
        )

    def __mul__(self, times: int) -> Work:
        return total(self for _ in range(times))

    @property
    def count(self) -> int:
        """How often a denoiser is called."""
        return sum(self.calls.values())

    def timed(self, patience: float) -> Work:
        """Return the work as that of the rounds of a measurement, which end after `patience` seconds at the latest, or
        after twice as long as the rounds take."""
        return replace(self, repeated=((self, patience),))


def total(works: Iterable[Work]) -> Work:
    """Return the sum of works."""
    return sum(works, Work())


def calls(count: int, batch: int, network: Network = "teacher", *, forwards: float | None = None) -> Work:
    """Return calls of a denoiser.

    Args:
        batch: samples in each call.
        forwards: what all of them take together, in whole forward passes; as many as there are calls by default.
    """
    kind = (network, batch)
    return Work(Counter({kind: count}), Counter({kind: count if forwards is None else forwards}))  # type: ignore[dict-item]


@dataclass(frozen=True)
class StepWork:
    """A step of a job, and the least and the most that it computes: some steps end when they have found enough."""

    name: str
    least: Work
    most: Work

    @classmethod
    def exactly(cls, name: str, work: Work) -> StepWork:
        """Return a step whose work is known."""
        return cls(name, work, work)


@dataclass(frozen=True)
class StepTime:
    """How long a step takes on this machine, in seconds: at least, and at most."""

    name: str
    least: float
    most: float
