"""Distillation losses as pure functions of tensors, each normalised by the teacher's power."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """mean |student - teacher|^2 / mean |teacher|^2: without unit, 1 for a student that says nothing.

    Normalised by the teacher's power as in LAPTOP-Diff (arXiv 2404.11098, Sec. 3.3).
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().mean() / teacher.square().mean().clamp(min=1e-12)


def task_loss(noise_pred: Tensor, target: Tensor) -> Tensor:
    """The denoising loss (arXiv 2006.11239, Eq. 14), relative to the target's power."""
    return relative_error(noise_pred, target)


def output_loss(noise_pred: Tensor, teacher_pred: Tensor) -> Tensor:
    """Output distillation (BK-SDM, arXiv 2305.15798, Eq. 2), relative to the teacher's power."""
    return relative_error(noise_pred, teacher_pred)


def feature_losses(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Feature distillation by block (BK-SDM, arXiv 2305.15798, Eq. 3), each relative to the teacher's power.

    Blocks whose shapes differ (a removed innermost stage) are passed over.
    """
    return {
        name: relative_error(features, teacher[name])
        for name, features in student.items()
        if name in teacher and features.shape == teacher[name].shape
    }


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the losses that have a weight."""
    terms = [weights[name] * value for name, value in losses.items() if weights.get(name)]
    return torch.stack(terms).sum()
