"""Image-to-image in an evaluation: whether it is possible, how its results are judged, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.diffusion.conditioning import decode_latents, encode_images, image_size
from asdm.diffusion.generation import require_strength
from asdm.diffusion.kinds import require_image_to_image
from asdm.errors import AsdmError
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.results import ImageToImageMetrics
from asdm.evaluation.starting_images import ImageToImageSet

OTHER_SEED = 1_000_000  # is added to the seed where the distance between two seeds is measured
NO_IMAGES = "the data has no images to start from"
SOURCES, TARGETS = "source images, unchanged", "targets, after the VAE"


def image_to_image_fault(pipeline: DiffusionPipeline, steps: int, strength: float) -> str | None:
    """Return why a pipeline cannot do image-to-image of this strength in so many steps; None where it can."""
    try:
        require_image_to_image(pipeline)
        require_strength(strength, steps)
    except AsdmError as error:
        return str(error)
    return None


class ImageToImageJudge:
    """Judges results of image-to-image: against their targets where there are some, and against the teacher's."""

    def __init__(self, judge: Judge, real: RealImages | None):
        self.judge, self.real = judge, real
        self._teacher: dict[str, Tensor] = {}
        self._seed_distance: dict[str, float] = {}

    def add_teacher(self, features: Tensor, of: ImageToImageSet, other_seed: Callable[[], Tensor]) -> None:
        """Take the features of the teacher's results as those that others are compared with.

        Args:
            other_seed: generates the teacher's results once more, with other noise. It is called where the set has no
                targets.
        """
        self._teacher[of.split] = features
        if not of.targets:
            self._seed_distance[of.split] = feature_distance(self.judge.features(other_seed()), features)

    def metrics(self, features: Tensor, of: ImageToImageSet) -> dict[str, Any]:
        """Return fields of `ImageToImageMetrics` for results from a set's sources, given the judge's features."""
        found = self._target_metrics(features, of)
        if of.split in self._teacher:
            found["teacher_distance"] = distance = feature_distance(features, self._teacher[of.split])
            if self._seed_distance.get(of.split):
                found["seed_part"] = distance / self._seed_distance[of.split]
        return found

    def references(self, name: str, pipeline: DiffusionPipeline, of: ImageToImageSet) -> list[ImageToImageMetrics]:
        """Return what a set's metrics are to be compared with: those of its sources as they are and of its targets
        after the VAE; without targets, the distance between the results of two seeds of the teacher, called `name`."""
        if not of.targets:
            distance = self._seed_distance[of.split]
            title = f"{name}, another seed"
            return [ImageToImageMetrics(name=title, split=of.split, images=len(of.sources), teacher_distance=distance)]
        assert self.real is not None
        sources = self.real.features[self.real.rows(of.sources)]
        targets = self.judge.features(_after_the_vae(pipeline, of))
        return [
            ImageToImageMetrics(name=title, split=of.split, images=len(features), **self._target_metrics(features, of))
            for title, features in ((SOURCES, sources), (TARGETS, targets))
        ]

    def _target_metrics(self, features: Tensor, of: ImageToImageSet) -> dict[str, Any]:
        return {} if self.real is None or not of.targets else self.real.target_metrics(features, of.targets)


@torch.no_grad()
def _after_the_vae(pipeline: DiffusionPipeline, of: ImageToImageSet) -> Tensor:
    """Return the set's targets (images, 3, h, w) encoded and decoded: the best that the pipeline can reach."""
    pixels = torch.stack([target.pixels(image_size(pipeline)) for target in of.targets])
    return decode_latents(pipeline, encode_images(pipeline.vae, pixels)).clamp(-1, 1).float().cpu()
