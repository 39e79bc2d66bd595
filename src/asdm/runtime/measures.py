"""A measure that makes a pipeline faster, as it was timed, and when it is worth it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from asdm.measure.latency import Ratio

WORTH_IT = 1.03  # a smaller gain could be noise


@dataclass(frozen=True)
class Measure:
    """One measure: its speed-up of the denoiser or the decoder with the interval, and the relative squared error of the
    prediction or the image.

    `kept` says whether it stays, `reason` why it could not be tried.
    """

    name: str
    speedup: Ratio | None
    error: float | None
    kept: bool
    reason: str = ""


def is_worth_it(gain: Ratio) -> bool:
    """Return whether it is faster by more than noise could have made it."""
    return gain.value >= WORTH_IT and gain.is_measurable


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the squared error relative to the square of what is wanted."""
    return float((found.float() - wanted.float()).square().sum() / wanted.float().square().sum())
