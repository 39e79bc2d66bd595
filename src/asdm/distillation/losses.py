"""Distillation losses as pure functions of tensors, by default normalised by the teacher's power."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean |student - teacher|^2; with `weights` (batch,), whose mean over the schedule is 1, each sample's times its
    own."""
    error = (student.float() - teacher.float()).square()
    return error.mean() if weights is None else (error.flatten(1).mean(1) * weights).mean()


def relative_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean |student - teacher|^2 / mean |teacher|^2: without unit, 1 for a student that says nothing.

    Normalised by the teacher's power as in LAPTOP-Diff (arXiv 2404.11098, Sec. 3.3).
    """
    return squared_error(student, teacher, weights) / teacher.float().square().mean().clamp(min=1e-12)


def pseudo_huber(student: Tensor, target: Tensor, c: float) -> Tensor:
    """mean sqrt((student - target)^2 + c^2) - c, by element: square near zero, the distance beyond c
    (arXiv 2310.14189, Sec. 3.3)."""
    return (((student.float() - target.float()).square() + c**2).sqrt() - c).mean()


def task_loss(noise_pred: Tensor, target: Tensor, weights: Tensor | None = None, relative: bool = True) -> Tensor:
    """The denoising loss (arXiv 2006.11239, Eq. 14), relative to the target's power or plain."""
    return (relative_error if relative else squared_error)(noise_pred, target, weights)


def output_loss(
    noise_pred: Tensor, teacher_pred: Tensor, weights: Tensor | None = None, relative: bool = True
) -> Tensor:
    """Output distillation (BK-SDM, arXiv 2305.15798, Eq. 2), relative to the teacher's power or plain."""
    return (relative_error if relative else squared_error)(noise_pred, teacher_pred, weights)


def feature_losses(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], relative: bool = True
) -> dict[str, Tensor]:
    """Feature distillation by block (BK-SDM, arXiv 2305.15798, Eq. 3), each relative to the teacher's power or plain.

    Blocks whose shapes differ (a removed innermost stage) are passed over.
    """
    error = relative_error if relative else squared_error
    return {
        name: error(features, teacher[name])
        for name, features in student.items()
        if name in teacher and features.shape == teacher[name].shape
    }


def mean_by_area(losses: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Tensor:
    """Mean of the blocks' losses, each weighted by the area of its features (batch, channels, h, w) (inferred)."""
    areas = {name: features[name].shape[2:].numel() for name in losses}
    return torch.stack([area * losses[name] for name, area in areas.items()]).sum() / sum(areas.values())


def semantic_loss(features: Tensor, expected: Tensor, weights: Tensor) -> Tensor:
    """mean of 1 - cosine of features (batch, channels), each sample's times its weight (batch,) (inferred)."""
    cosine = F.cosine_similarity(features.float(), expected.float(), dim=1)
    return ((1 - cosine) * weights).mean()


def min_snr_weights(alphas_cumprod: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Weights (batch,) of samples at time steps with these cumulative alphas (batch,): Min-SNR-gamma
    (arXiv 2303.09556, Sec. 3.4), for what the UNet predicts."""
    snr = (alphas_cumprod / (1 - alphas_cumprod)).clamp(min=1e-8)  # zero at the end of some schedules
    clipped = snr.clamp(max=gamma)
    return clipped / {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the losses that have a weight."""
    terms = [weights[name] * value for name, value in losses.items() if weights.get(name)]
    return torch.stack(terms).sum()
