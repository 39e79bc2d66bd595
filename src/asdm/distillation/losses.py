"""Distillation losses: pure functions of tensors, and the registry of terms that a stage's loss is the sum of.

A new term is one function here, or in any module that is imported before its name is used, under `@loss_term`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

# -- functions of tensors ---------------------------------------------------------------------------------


def squared_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean |student - teacher|^2; with `weights` (batch,), whose mean over the schedule is 1, each sample's times its
    own."""
    error = (student.float() - teacher.float()).square()
    return error.mean() if weights is None else (error.flatten(1).mean(1) * weights).mean()


def relative_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean |student - teacher|^2 / mean |teacher|^2: dimensionless, 1 for a student that predicts zero.

    Normalised by the mean square of the teacher's features as in LAPTOP-Diff (arXiv 2404.11098, Sec. 3.3).
    """
    return squared_error(student, teacher, weights) / teacher.float().square().mean().clamp(min=1e-12)


def pseudo_huber(student: Tensor, target: Tensor, c: float) -> Tensor:
    """mean sqrt((student - target)^2 + c^2) - c, by element: square near zero, the distance beyond c
    (arXiv 2310.14189, Sec. 3.3)."""
    return (((student.float() - target.float()).square() + c**2).sqrt() - c).mean()


def task_loss(noise_pred: Tensor, target: Tensor, weights: Tensor | None = None, relative: bool = True) -> Tensor:
    """Return the denoising loss (arXiv 2006.11239, Eq. 14), relative to the target's mean square or plain."""
    return (relative_error if relative else squared_error)(noise_pred, target, weights)


def output_loss(
    noise_pred: Tensor, teacher_pred: Tensor, weights: Tensor | None = None, relative: bool = True
) -> Tensor:
    """Output distillation (BK-SDM, arXiv 2305.15798, Eq. 2), relative to the teacher's mean square or plain."""
    return (relative_error if relative else squared_error)(noise_pred, teacher_pred, weights)


def feature_losses(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], relative: bool = True
) -> dict[str, Tensor]:
    """Feature distillation by block (BK-SDM, arXiv 2305.15798, Eq. 3), each relative to the teacher's mean square or
    plain.

    Blocks whose shapes differ (a removed lowest-resolution level) are left out.
    """
    error = relative_error if relative else squared_error
    return {
        name: error(features, teacher[name])
        for name, features in student.items()
        if name in teacher and features.shape == teacher[name].shape
    }


def spatial_mean(losses: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Tensor:
    """Mean of the blocks' losses, each weighted by the area of its features (batch, channels, h, w) (inferred)."""
    areas = {name: features[name].shape[2:].numel() for name in losses}
    return torch.stack([area * losses[name] for name, area in areas.items()]).sum() / sum(areas.values())


def semantic_loss(features: Tensor, expected: Tensor, weights: Tensor) -> Tensor:
    """mean of 1 - cosine of features (batch, channels), each sample's times its weight (batch,) (inferred)."""
    cosine = F.cosine_similarity(features.float(), expected.float(), dim=1)
    return ((1 - cosine) * weights).mean()


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the losses that have a weight."""
    terms = [weights[name] * value for name, value in losses.items() if weights.get(name)]
    return torch.stack(terms).sum()


# -- terms ------------------------------------------------------------------------------------------------

FeatureWeighting = Literal["spatial", "block"]
Reads = Literal["prediction", "features", "semantics", "captions", "caption_semantics"]


@dataclass(frozen=True)
class SemanticFeatures:
    """What an encoder says of x_0 estimates, (batch, channels) each: the student's, the teacher's, the captions' where
    the encoder has a text tower; and the weights (batch,) of each sample, beside the teacher and beside the caption."""

    student: Tensor
    teacher: Tensor
    text: Tensor | None
    weights: Tensor
    text_weights: Tensor


@dataclass(frozen=True)
class CaptionComparison:
    """A student beside its teacher on captions that have no image.

    `share` is the part of what they weigh: of a batch in several parts, one part may have more of these captions than
    another, or none. `weights` (captions,) are those of the time steps, None where all count alike.
    `semantic_features` computes when it is called; no term calls it without an encoder.
    """

    noise_pred: Tensor
    teacher_pred: Tensor
    weights: Tensor | None
    share: float
    semantic_features: Callable[[], SemanticFeatures]


@dataclass(frozen=True)
class Comparison:
    """A student beside its teacher on one batch: all that a loss term may read.

    `weights` (batch,) are those of the time steps, None where all count alike. `student_features` and
    `teacher_features` are the blocks' outputs, `by_block` their losses. `guided_predictions` returns the student's and
    the teacher's prediction, with guidance where the stage has a scale; `semantic_features`, and `captions` for those
    without an image, are None at steps without such losses. All three compute when they are called. `captions` returns
    None where this part of the batch has none; which of their terms a step has is the same for all parts, and said by
    `has_caption_semantics` and `has_caption_text`.
    """

    noise_pred: Tensor
    teacher_pred: Tensor
    target: Tensor
    weights: Tensor | None
    student_features: Mapping[str, Tensor]
    teacher_features: Mapping[str, Tensor]
    by_block: Mapping[str, Tensor]
    guided_predictions: Callable[[], tuple[Tensor, Tensor]]
    semantic_features: Callable[[], SemanticFeatures] | None
    captions: Callable[[], CaptionComparison | None] | None = None
    has_caption_semantics: bool = False
    has_caption_text: bool = False
    relative: bool = True
    feature_weighting: FeatureWeighting = "spatial"


Loss: TypeAlias = Callable[[Comparison], Tensor | None]


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss: its name in recipes and logs, its default weight, and the function that computes it, which
    returns None at steps without it. `reads` says what of a comparison it depends on."""

    name: str
    weight: float
    reads: Reads
    call: Loss


_TERMS: dict[str, LossTerm] = {}


def loss_term(name: str, weight: float = 0.0, reads: Reads = "prediction") -> Callable[[Loss], Loss]:
    """Register a function as a loss term (a decorator)."""

    def register(function: Loss) -> Loss:
        _TERMS[name] = LossTerm(name, weight, reads, function)
        return function

    return register


def loss_terms() -> Sequence[LossTerm]:
    """Return all registered terms, in the order of their computation."""
    return tuple(_TERMS.values())


def losses_of(comparison: Comparison) -> dict[str, Tensor]:
    """Every term that this step has, by name."""
    computed = ((term.name, term.call(comparison)) for term in loss_terms())
    return {name: value for name, value in computed if value is not None}


@loss_term("task", weight=1.0)
def _task(comparison: Comparison) -> Tensor:
    return task_loss(comparison.noise_pred, comparison.target, comparison.weights, comparison.relative)


@loss_term("output", weight=1.0)
def _output(comparison: Comparison) -> Tensor:
    return output_loss(*comparison.guided_predictions(), comparison.weights, comparison.relative)


@loss_term("feature", weight=1.0, reads="features")
def _feature(comparison: Comparison) -> Tensor:
    if comparison.feature_weighting == "spatial":
        return spatial_mean(comparison.by_block, comparison.student_features)
    return torch.stack(list(comparison.by_block.values())).mean()


@loss_term("semantic", reads="semantics")
def _semantic(comparison: Comparison) -> Tensor | None:
    """Return what the teacher's x_0 estimate means."""
    if comparison.semantic_features is None:
        return None
    found = comparison.semantic_features()
    return semantic_loss(found.student, found.teacher, found.weights)


@loss_term("semantic_text", reads="semantics")
def _semantic_text(comparison: Comparison) -> Tensor | None:
    """Return what the caption means."""
    if comparison.semantic_features is None:
        return None
    found = comparison.semantic_features()
    return None if found.text is None else semantic_loss(found.student, found.text, found.text_weights)


@loss_term("caption_output", reads="captions")
def _caption_output(comparison: Comparison) -> Tensor | None:
    """Return what the teacher predicts for captions that have no image."""

    def output(found: CaptionComparison) -> Tensor:
        return output_loss(found.noise_pred, found.teacher_pred, found.weights, comparison.relative)

    return _on_captions(comparison, output)


@loss_term("caption_semantic", reads="caption_semantics")
def _caption_semantic(comparison: Comparison) -> Tensor | None:
    """Return what the teacher's x_0 estimate means, for captions that have no image."""

    def semantic(found: CaptionComparison) -> Tensor:
        features = found.semantic_features()
        return semantic_loss(features.student, features.teacher, features.weights)

    return _on_captions(comparison, semantic) if comparison.has_caption_semantics else None


@loss_term("caption_text", reads="caption_semantics")
def _caption_text(comparison: Comparison) -> Tensor | None:
    """Return what captions mean that have no image."""

    def text(found: CaptionComparison) -> Tensor:
        features = found.semantic_features()
        assert features.text is not None
        return semantic_loss(features.student, features.text, features.text_weights)

    return _on_captions(comparison, text) if comparison.has_caption_text else None


def _on_captions(comparison: Comparison, loss: Callable[[CaptionComparison], Tensor]) -> Tensor | None:
    """Return a loss on captions without an image; None at steps without, 0 where this part of the batch has none."""
    if comparison.captions is None:
        return None
    found = comparison.captions()
    return 0 * comparison.noise_pred.sum() if found is None else found.share * loss(found)
