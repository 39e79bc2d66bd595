"""The benchmark of one model: the speed of each method, then the quality of its images.

A method that fails is a row with its error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.benchmark.method import Method, data_dependent
from asdm.benchmark.results import BenchmarkRow, fault
from asdm.benchmark.timing import MethodTimer, Progress
from asdm.choices import IMAGE_TO_IMAGE_STRENGTH
from asdm.diffusion.conditioning import image_size
from asdm.diffusion.generation import generate
from asdm.errors import disk_error
from asdm.evaluation.image_folders import IMAGE_TO_IMAGE, folder_names, save_images
from asdm.evaluation.image_timing import ImageTiming
from asdm.evaluation.image_to_image import OTHER_SEED, ImageToImageJudge
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.evaluation.starting_images import ImageToImageSet, image_to_image_sets
from asdm.families import denoiser_call, denoiser_of, family_of
from asdm.measure.latency import seconds_of

LONGEST_TIMED_IMAGE = 10.0  # seconds; where an image takes longer, its parts are timed
FROM_TEXT_ALONE = "the method changes the loop of text-to-image alone"
QUALITIES = ("teacher_distance", "kid", "exact_pair", "concept_top1", "concept_top5", "style")


@torch.no_grad()
def time_methods(
    pipeline: DiffusionPipeline,
    methods: Sequence[Method],
    *,
    place: str,
    rounds: int = 5,
    limits: dict[str, dict[str, float]] | None = None,
    longest: float = LONGEST_TIMED_IMAGE,
    progress: Progress | None = None,
) -> list[BenchmarkRow]:
    """Time all methods in turns.

    Args:
        longest: the most seconds that a timed image may take. Where it would take longer, its parts are timed, and
            methods whose full steps depend on the prompt are left out.
    """
    by_parts = _seconds_of_an_image(pipeline, methods[0]) > longest
    if by_parts:
        methods = [method for method in methods if method.kinds is not data_dependent]
    faults: dict[str, str] = {}
    timer = MethodTimer(pipeline, methods, by_parts=by_parts, faults=faults, progress=progress)
    timing = timer.run(rounds)
    rows = []
    for method in methods:
        if method.name in faults:
            rows.append(_row(place, method, error=faults[method.name]))
            continue
        speed = _speed(timing, methods[0].name, method.name)
        cost = timer.costs[method.setup].metrics(speed["parts"]["UNet, whole"], limits or {})
        rows.append(_row(place, method, extrapolated=by_parts, **speed, **cost))
    return rows


@torch.no_grad()
def judge_methods(
    pipeline: DiffusionPipeline,
    methods: Sequence[Method],
    rows: Sequence[BenchmarkRow],
    *,
    data: str | Path,
    samples: int = 64,
    image_to_image: int = 0,
    strength: float = IMAGE_TO_IMAGE_STRENGTH,
    seed: int = 0,
    images_folder: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[list[BenchmarkRow]]:
    """Generate the same prompts with the same seeds with each method; yield all rows behind each that is judged.

    Args:
        rows: the timed methods'. Those with images are not judged again.
        data: prompts and real images, as for `evaluate`.
        samples: images of each split.
        image_to_image: images of each split that start from an image; none where the model cannot do that.
        strength: of image-to-image.
    """
    judge, sets = Judge(pipeline.device), evaluation_sets(data, None, samples, seed)
    count = min(samples, image_to_image) if "image" in family_of(pipeline).takes else 0
    starts = image_to_image_sets(data, sets, count, seed)
    real = RealImages.of(data, [*sets, *starts], judge, pipeline, None)
    run = _QualityRun(pipeline, sets, starts, strength, seed, images_folder, judge, real)
    folders = folder_names([method.name for method in methods])
    by_name, found = {method.name: method for method in methods}, list(rows)
    for place, row in enumerate(rows):
        method = by_name[row.name]
        if progress is not None:
            progress("generate", place + 1, len(rows))
        is_original = place == 0  # whose images all others' are compared with
        if row.error is not None or method.engine is not None or (row.images and not is_original):
            continue
        try:
            quality = run.judged(method, folders[row.name], is_original)
        except Exception as error:
            if disk_error(error) is not None:  # of the images that the user asked for
                raise
            found[place] = _row(row.place, method, error=fault(error))
        else:
            quality |= run.image_to_image(method, folders[row.name], is_original)
            found[place] = BenchmarkRow(**row.model_dump() | quality)
        yield list(found)


def _row(place: str, method: Method, **fields: Any) -> BenchmarkRow:
    return BenchmarkRow(place=place, name=method.name, group=method.group, steps=method.steps, **fields)


def _seconds_of_an_image(pipeline: DiffusionPipeline, method: Method) -> float:
    """Estimate the seconds of an image from one denoiser call."""
    call = denoiser_call(denoiser_of(pipeline))
    call()  # a GPU's first one takes seconds
    return seconds_of(call, pipeline.device) * method.steps


def _speed(timing: ImageTiming, base: str, name: str) -> dict[str, Any]:
    image = timing.latency(name)
    ratio = timing.speedup(base, name) if base in timing.parts else None
    return {
        "speedup": None if ratio is None else ratio.value,
        "speedup_interval": None if ratio is None else ratio.interval,
        "seconds": image.ms / 1000,
        "seconds_interval": (image.low_ms / 1000, image.high_ms / 1000),
        "parts": {part: milliseconds / 1000 for part, milliseconds in timing.each_part(name).items()},
    }


@dataclass(frozen=True)
class _QualityRun:
    """The prompts of all methods, the judge, and the features of the first method's images by split."""

    pipeline: DiffusionPipeline
    sets: list[EvaluationSet]
    starts: list[ImageToImageSet]
    strength: float
    seed: int
    images_folder: Path | None
    judge: Judge
    real: RealImages | None
    originals: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def _from_images(self) -> ImageToImageJudge:
        return ImageToImageJudge(self.judge, self.real)

    def judged(self, method: Method, folder: str, is_original: bool) -> dict[str, Any]:
        """Return the fields of a `BenchmarkRow` about text-to-image."""
        found: dict[str, Any] = {"images": 0}
        for each in self.sets:
            images = self._images(method, each)
            if self.images_folder is not None:
                save_images(images, self.images_folder / each.split / folder)
            features = self.judge.features(images)
            if is_original:
                self.originals[each.split] = features
            metrics = {} if self.real is None else self.real.metrics(images, features, each.examples)
            if each.split in self.originals:
                metrics["teacher_distance"] = feature_distance(features, self.originals[each.split])
            found["images"] += len(images)
            for name in QUALITIES:
                if name in metrics:
                    found.setdefault(name, {})[each.split] = metrics[name]
        return found

    def image_to_image(self, method: Method, folder: str, is_original: bool) -> dict[str, Any]:
        """Return the fields of a `BenchmarkRow` about image-to-image. A failure of it is no failure of the method."""
        if not self.starts:
            return {}
        if not method.image_to_image:
            return {"image_to_image_error": FROM_TEXT_ALONE}
        try:
            return {"image_to_image": self._judged_from_images(method, folder, is_original)}
        except Exception as error:
            if disk_error(error) is not None:
                raise
            return {"image_to_image_error": fault(error)}

    def _judged_from_images(self, method: Method, folder: str, is_original: bool) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for each in self.starts:
            images = self._images(method, each)
            if self.images_folder is not None:
                save_images(images, self.images_folder / IMAGE_TO_IMAGE / each.split / folder)
            features = self.judge.features(images)
            if is_original:
                self._from_images.add_teacher(features, each, partial(self._images, method, each, OTHER_SEED))
            for name, value in self._from_images.metrics(features, each).items():
                found.setdefault(name, {})[each.split] = value
        return found

    def _images(self, method: Method, each: EvaluationSet | ImageToImageSet, added_to_seed: int = 0) -> Tensor:
        arguments: dict[str, Any] = {"steps": method.steps, "cfg_cutoff": method.cfg_cutoff}
        if isinstance(each, ImageToImageSet):
            arguments |= {"image": each.images(image_size(self.pipeline)), "strength": self.strength}
        with method.prepared(self.pipeline) as ready:
            return generate(ready, each.prompts, **arguments, seed=self.seed + added_to_seed)
