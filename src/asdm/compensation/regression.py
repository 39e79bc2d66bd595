"""Ridge regression from sums of products, with the ridge chosen by cross-validation. Knows tensors alone, no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_RIDGE = 1e-3  # where a single row leaves nothing to validate on
RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, math.inf)


class Solution(NamedTuple):
    """A fitted projection, and the fraction of the targets' mean square that it leaves on samples it was not fitted to.

    `weight` is (out, in), or (channels,) where it is diagonal; `bias` is (out,).
    """

    weight: Tensor
    bias: Tensor
    residual: float

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all())


class RidgeRegression:
    """Least squares of targets (samples, positions, out) on features (samples, positions, in) and a constant.

    Only sums of products are stored, for samples of even and of odd index separately; where a single sample is added,
    for each half of its positions. The ridge is the one whose fit to either half predicts the other half best:
    low-resolution levels have few positions, and an overfitted projection harms the model elsewhere.

    Args:
        is_diagonal: regress each target on the feature of its own channel alone.
    """

    def __init__(self, is_diagonal: bool):
        self.is_diagonal = is_diagonal
        self.halves = [_Sums(), _Sums()]

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add samples; both tensors are (samples, positions, channels)."""
        if features.device.type == "mps":  # MPS has no float64
            features, targets = features.cpu(), targets.cpu()
        features, targets = features.double(), targets.double()
        for half, x, y in zip(self.halves, self._halved(features), self._halved(targets), strict=True):
            products = [x.square().sum(0), (x * y).sum(0)] if self.is_diagonal else [x.mT @ x, x.mT @ y]
            half.add(len(x), float(y.square().sum()), [x.sum(0), y.sum(0), *products])

    def _halved(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of either half."""
        if len(samples) != 1:
            return samples[::2].flatten(0, 1), samples[1::2].flatten(0, 1)
        even, odd = self.halves
        middle = (samples.shape[1] + (even.count <= odd.count)) // 2
        return samples[0, :middle], samples[0, middle:]

    def solve(self, ridge: float | None = None) -> Solution:
        """Solve for the projection.

        Args:
            ridge: added to the covariance, as a fraction of its mean diagonal; by default the best of `RIDGES`.
        """
        even, odd = self.halves
        if not odd.count or not even.count:
            both = even if even.count else odd
            weight, bias = self._fit(both, DEFAULT_RIDGE if ridge is None else ridge)
            return self._solution(both, weight, bias, self._squared_error(both, weight, bias))
        best_ridge, least = math.inf, math.inf
        for candidate in RIDGES if ridge is None else (ridge,):
            error = self._squared_error(odd, *self._fit(even, candidate))
            error += self._squared_error(even, *self._fit(odd, candidate))
            if error < least or not math.isfinite(error):
                best_ridge, least = candidate, error
        both = even + odd
        weight, bias = self._fit(both, best_ridge)
        if least > both.target_square:  # no projection is better than this one, not even a constant
            weight, bias, least = torch.zeros_like(weight), torch.zeros_like(bias), both.target_square
        return self._solution(both, weight, bias, least)

    def _solution(self, sums: _Sums, weight: Tensor, bias: Tensor, squared_error: float) -> Solution:
        return Solution(weight.float(), bias.float(), squared_error / max(sums.target_square, 1e-30))

    def _fit(self, sums: _Sums, ridge: float) -> tuple[Tensor, Tensor]:
        mean, target_mean, square, cross = (value / sums.count for value in sums.values)
        if self.is_diagonal:
            square, cross = square - mean.square(), cross - mean * target_mean
            weight = cross / (square + ridge * square.mean()).clamp_min(1e-30)
            return weight, target_mean - weight * mean
        square, cross = square - mean.outer(mean), cross - mean.outer(target_mean)
        if math.isinf(ridge) or not len(mean):
            return torch.zeros_like(cross.mT), target_mean
        eye = torch.eye(len(mean), dtype=square.dtype, device=square.device)
        # Features that never vary have no covariance.
        strength = (ridge * square.diagonal().mean()).clamp_min(1e-12)
        weight = torch.linalg.solve(square + strength * eye, cross).mT
        return weight, target_mean - weight @ mean

    def _squared_error(self, sums: _Sums, weight: Tensor, bias: Tensor) -> float:
        """Sum of |targets - projection of features|^2 over the samples of `sums`."""
        x, y, square, cross = sums.values
        if self.is_diagonal:
            error = (weight.square() * square).sum() + 2 * (weight * bias * x).sum() - 2 * (weight * cross).sum()
        else:
            error = ((weight @ square) * weight).sum() + 2 * (bias @ (weight @ x)) - 2 * (weight.mT * cross).sum()
        return float(error + sums.count * bias.square().sum() - 2 * (bias * y).sum()) + sums.target_square


class _Sums:
    """The number of rows, the sum of squared targets, and sums of features, of targets and of their products."""

    def __init__(self, count: int = 0, target_square: float = 0.0, values: Sequence[Tensor] = ()):
        self.count, self.target_square, self.values = count, target_square, list(values)

    def add(self, count: int, target_square: float, values: Sequence[Tensor]) -> None:
        if count:
            total = self + _Sums(count, target_square, values)
            self.count, self.target_square, self.values = total.count, total.target_square, total.values

    def __add__(self, other: _Sums) -> _Sums:
        if not self.count:
            return other
        values = [a + b for a, b in zip(self.values, other.values, strict=True)]
        return _Sums(self.count + other.count, self.target_square + other.target_square, values)
