"""The metrics of all models' images by one network after another, and the values of single images for the win sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from asdm.errors import AsdmError
from asdm.evaluation.metrics import feature_distances, kid
from asdm.evaluation.protocol.distances import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    cmmd,
    frechet_distance,
    inception_score,
    scores,
    ssim,
    win_share,
)
from asdm.evaluation.protocol.extractors import FEATURES, LOGITS, Extractor, Lpips, TextExtractor
from asdm.evaluation.protocol.features import FeatureCache, ImageFiles
from asdm.evaluation.protocol.metrics import METRICS, SCORES, Role

# Whose distance orders the win sheet, the first that was measured. LPIPS was fitted to people's judgement.
_ORDER = ("lpips", "dinov2", "inception", "cmmd", "clip", "pickscore", "hpsv2", "ssim")


class Measurement:
    """Fields of `ProtocolMetrics` for each model, by its name; the first model is the teacher.

    Args:
        images: each model's files, in the prompts' order.
        real: the real images; read where a metric needs them.
        cache: all processes of a launch measure the same; rank 0 alone gets values.
    """

    def __init__(
        self,
        images: Mapping[str, Sequence[Path]],
        prompts: Sequence[str],
        real: ImageFiles,
        cache: FeatureCache,
        seed: int,
    ):
        self._images, self._prompts, self._real, self._cache, self._seed = images, prompts, real, cache, seed
        self.fields: dict[str, dict[str, Any]] = {name: {} for name in images}
        self.wins: dict[str, dict[str, float]] = {name: {} for name in images}
        self.real_images: int | None = None
        self._distances: dict[str, dict[str, Tensor]] = {}  # to the teacher's image: by role or metric, by model
        self._measures: dict[str, str] = {}  # what reports call these distances
        self._scores: dict[str, dict[str, Tensor]] = {}  # by metric, by model

    @property
    def _teacher(self) -> str:
        return next(iter(self._images))

    @property
    def _students(self) -> list[str]:
        return list(self._images)[1:]

    def by_features(self, role: Role, metrics: Sequence[str], extractor: Extractor) -> None:
        """Measure the images by their features and, where a metric needs it, the real images'."""
        real: Mapping[str, Tensor] = {}
        if any(map(needs_real_images, metrics)):
            real = self._cache.of_images(f"real images, {extractor.title}", extractor, self._real)
        found = self._features(extractor)
        if not self._cache.is_reader:
            return
        if any(map(needs_real_images, metrics)):
            self.real_images = len(real.get(FEATURES, ()))
            if self.real_images < 2:
                raise AsdmError(f"{self.real_images} of the real images can be decoded; name a folder with two or more")
        for name, tensors in found.items():
            for metric in metrics:
                self.fields[name] |= self._compared(metric, tensors, real)
            if role == "inception":
                own = feature_distances(tensors[FEATURES], found[self._teacher][FEATURES])
                self.fields[name]["teacher_distance"] = float(own.mean())
        self._keep_distances(role, {name: tensors[FEATURES] for name, tensors in found.items()}, extractor.title)

    def _compared(self, metric: str, own: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> dict[str, Any]:
        field = METRICS[metric].field
        if metric == "is":
            mean, deviation = inception_score(own[LOGITS], seed=self._seed)
            return {field: mean, f"{field}_deviation": deviation}
        features, others = own[FEATURES], real[FEATURES]
        if metric == "kid":
            sizes = {"subsets": KID_SUBSETS, "subset_size": KID_SUBSET_SIZE}
            mean, deviation = kid(features, others, **sizes, seed=self._seed)
            return {field: mean, f"{field}_deviation": deviation}
        measure: Callable[[Tensor, Tensor], float] = cmmd if metric == "cmmd" else frechet_distance
        return {field: measure(features, others)}

    def by_score(self, metric: str, extractor: TextExtractor) -> None:
        """Measure how well each image fits its prompt, or how it is liked, and how often students win."""
        texts = self._cache.of_texts(f"prompts, {extractor.title}", extractor, self._prompts)
        found = self._features(extractor)
        if not self._cache.is_reader:
            return
        images = {name: tensors[FEATURES] for name, tensors in found.items()}
        of_all = {name: scores(own, texts[FEATURES], extractor.scale) for name, own in images.items()}
        for name, own in of_all.items():
            self.fields[name][METRICS[metric].field] = float(own.mean())
            if name != self._teacher:
                self.wins[name][metric] = win_share(own, of_all[self._teacher])
        self._scores[metric] = of_all
        self._keep_distances(SCORES[metric], images, extractor.title)

    def by_pairs(self, metric: str, network: Lpips | None) -> None:
        """Measure LPIPS, or without a network SSIM, of each image and the teacher's of the same seed."""
        identity, measure = ("ssim", ssim) if network is None else (network.identity, network.pairs)
        for name in self._students:
            pairs = list(zip(self._images[name], self._images[self._teacher], strict=True))
            values = self._cache.of_pairs(f"{name}, {METRICS[metric].title}", identity, measure, pairs)
            if values is not None:
                self.fields[name][METRICS[metric].field] = float(values.mean())
                self._distances.setdefault(metric, {})[name] = 1 - values if network is None else values
                self._measures[metric] = "1 − SSIM" if network is None else METRICS[metric].title

    def distance(self, name: str) -> tuple[str, Tensor] | None:
        """Return what reports call the measure that orders a student's win sheet, and each image's distance to the
        teacher's."""
        measure = next((each for each in _ORDER if name in self._distances.get(each, {})), None)
        return None if measure is None else (self._measures[measure], self._distances[measure][name])

    def scores_of(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by metric the teacher's and a student's score of each image."""
        return {metric: (of_all[self._teacher], of_all[name]) for metric, of_all in self._scores.items()}

    def _features(self, extractor: Extractor) -> dict[str, dict[str, Tensor]]:
        """Return the features of all models' images, by model and name."""
        return {
            name: self._cache.of_images(f"{name}, {extractor.title}", extractor, ImageFiles(paths))
            for name, paths in self._images.items()
        }

    def _keep_distances(self, role: str, features: Mapping[str, Tensor], title: str) -> None:
        self._measures[role] = f"1 − cosine of features by {title}"
        teacher = features[self._teacher]
        self._distances[role] = {name: feature_distances(features[name], teacher) for name in self._students}


def needs_real_images(metric: str) -> bool:
    """Return whether a metric compares with real images."""
    return needs_several_images(metric) and metric != "is"


def needs_several_images(metric: str) -> bool:
    """Return whether a metric compares distributions of images."""
    return METRICS[metric].role in ("inception", "cmmd", "dinov2")
