"""Extrapolation of features over the noise level, and the error that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def extrapolated(past: Sequence[tuple[float, Tensor]], sigma: float, damping: float = 1.0) -> Tensor:
    """Evaluate Lagrange's polynomial through earlier results at the noise level `sigma`. The result shares no memory.

    Args:
        past: (noise level, result), oldest first.
        damping: scales how far the extrapolation goes from the last result.
    """
    points = [point for point, _ in past]
    last = past[-1][1]
    if len(past) == 1 or len(set(points)) < len(points):
        return last.clone()
    value = (1 - damping) * last
    for i, (_, result) in enumerate(past):
        factor = math.prod((sigma - point) / (points[i] - point) for j, point in enumerate(points) if j != i)
        value = value.add(result, alpha=damping * factor)
    return value


def extrapolation_errors(products: np.ndarray, sigmas: Sequence[float], damping: float) -> np.ndarray:
    """Squared norms (q, p, i) of the error at step i of an extrapolation from the steps q < p < i; q = p: of a copy.

    Args:
        products: scalar products (steps, steps) of the features.
        sigmas: noise levels of the steps.
    """
    levels = np.asarray(sigmas, dtype=np.float64)
    q, p, i = np.ix_(*[np.arange(len(levels))] * 3)
    between = levels[p] - levels[q]
    ahead = np.divide(
        levels[i] - levels[p], between, out=np.zeros(between.shape[:2] + levels.shape), where=between != 0
    )
    g = damping * ahead
    square = np.diag(products)
    # |f_i - (1 + g) f_p + g f_q|^2, multiplied out
    errors = square[i] + (1 + g) ** 2 * square[p] + g**2 * square[q]
    errors = errors - 2 * (1 + g) * products[p, i] + 2 * g * products[q, i] - 2 * g * (1 + g) * products[q, p]
    return np.maximum(errors, 0.0)
