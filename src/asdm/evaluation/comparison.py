"""Teacher and students side by side: speed in one run, quality on the same prompts and seeds."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPModel

from asdm import checks
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES, IMAGE_TO_IMAGE_STRENGTH
from asdm.diffusion.conditioning import image_size
from asdm.diffusion.generation import generate, is_few_step, require_steps, require_strength
from asdm.diffusion.kinds import require_text_to_image
from asdm.errors import AsdmWarning
from asdm.evaluation.image_folders import IMAGE_TO_IMAGE, folder_names, save_distances, save_images
from asdm.evaluation.image_to_image import (
    NO_IMAGES,
    OTHER_SEED,
    ImageToImageJudge,
    image_to_image_fault,
)
from asdm.evaluation.metrics import Judge, feature_distance, feature_distances
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.results import Evaluation, ImageToImage, ImageToImageMetrics, QualityMetrics
from asdm.evaluation.sampling import EvaluationSet, Sampling, common_guidance, evaluation_sets, sampling_of
from asdm.evaluation.speed import measure_speed
from asdm.evaluation.starting_images import ImageToImageSet, image_to_image_sets
from asdm.families import denoiser_of, family_of
from asdm.pipelines.derived import without_safety_checker

Progress = Callable[[str, int, int], None]


@checks.arguments(
    pipelines=checks.named(checks.PIPELINE),
    data=checks.path,
    prompts=checks.PROMPTS,
    samples=checks.whole(0, 10**6),
    image_to_image=checks.whole(0, 10**6),
    strength=checks.number(above=0, high=1),
    steps=checks.STEPS,
    guidance_scale=checks.GUIDANCE,
    seed=checks.SEED,
    rounds=checks.ROUNDS,
    quality=checks.flag,
    images_folder=checks.path,
    progress=checks.function,
)
def evaluate(
    pipelines: dict[str, DiffusionPipeline],
    *,
    data: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    samples: int = 128,
    image_to_image: int = IMAGE_TO_IMAGE_SAMPLES,
    strength: float | None = None,
    steps: int = 25,
    guidance_scale: float | None = None,
    seed: int = 0,
    rounds: int | None = None,
    quality: bool = True,
    clip: CLIPModel | None = None,
    images_folder: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure speed and quality of several pipelines in one run; the first is the teacher.

    An `AsdmWarning` says if they make images of several sizes.

    Args:
        data: the source of prompts and real images: any that `--data` takes. Held-out rows are a split of their own.
        prompts: used where there is no `data`. Without real images the only metric is the distance to the teacher's.
        samples: the most prompts of each split.
        image_to_image: the most images of each split that start from an image, never more than `samples`; 0 for
            text-to-image alone. Where rows of the data have a `design`, one of its variants is asked for from another
            one; otherwise the data's images are varied by their own captions.
        strength: of image-to-image, in (0, 1]: the part of the steps that are taken; 0.75 by default.
        steps: of all but few-step pipelines, which have steps and guidance of their own.
        guidance_scale: of all but few-step pipelines; by default that of the first of them.
        rounds: the least number of timed rounds of the denoiser call, 10 by default. Three images of each pipeline
            follow, in turns. On a busy machine there are more of both, until the speed-ups' intervals are narrow.
        quality: False to measure speed alone.
        clip: a CLIPModel for retrieval metrics; its tokenizer is that in its folder, else the first pipeline's.
        images_folder: where to keep every image as `SPLIT/NAME/0000.png`, those from images in `image-to-image`.

    Raises:
        AsdmError: the data cannot be used, the judge is not installed, or `strength` leaves none of the steps.
    """
    first = next(iter(pipelines.values()))
    for pipeline in pipelines.values():
        require_text_to_image(pipeline)
    _warn_of_sizes(pipelines)
    guidance = common_guidance(pipelines.values(), guidance_scale)
    folder = None if images_folder is None else Path(images_folder)
    generation = _Generation(pipelines, steps, guidance, seed, strength or IMAGE_TO_IMAGE_STRENGTH, folder)
    generation.require_steps(with_strength=strength is not None and image_to_image > 0)
    from_images = generation.image_to_image() if image_to_image else None
    judged: list[QualityMetrics] = []
    sets = evaluation_sets(data, prompts, samples, seed) if quality else []
    if sets:
        count = 0 if from_images is None or from_images.note else min(image_to_image, samples)
        judged, from_images = _Quality.of(generation, data, sets, count, clip, progress).run(from_images)
    is_timed = from_images is not None and from_images.note in (None, NO_IMAGES)
    given: dict[str, Any] = {"steps": steps, "guidance_scale": guidance}
    speed = measure_speed(pipelines, **given, rounds=rounds, strength=generation.strength if is_timed else None)
    return Evaluation(
        **_circumstances(first),
        **given,
        seed=seed,
        denoiser=family_of(first).label,
        other_cores=speed.other_cores,
        contention=speed.contention,
        speed=speed.rows,
        quality=judged,
        image_to_image=from_images,
    )


def _warn_of_sizes(pipelines: Mapping[str, DiffusionPipeline]) -> None:
    """Issue an `AsdmWarning` where images of several sizes are compared: they do not begin with the same noise."""
    sizes = {name: image_size(pipeline) for name, pipeline in pipelines.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size} pixels a side" for name, size in sizes.items())
        warnings.warn(
            f"{told}: speed and distances compare images of several sizes, which have no noise in common",
            AsdmWarning,
            stacklevel=3,
        )


def _circumstances(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return fields of an `Evaluation` about when and on what it is made."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {pipeline.device}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "dtype": str(denoiser_of(pipeline).dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class _Generation:
    """How the images of all pipelines are generated, and where they are kept."""

    pipelines: Mapping[str, DiffusionPipeline]
    steps: int
    guidance_scale: float
    seed: int
    strength: float
    folder: Path | None

    @property
    def first(self) -> DiffusionPipeline:
        """The teacher."""
        return next(iter(self.pipelines.values()))

    def require_steps(self, *, with_strength: bool) -> None:
        """
        Raises:
            AsdmError: a pipeline cannot sample in so many steps, or `with_strength`, the strength leaves none of them.
        """
        for pipeline in self.pipelines.values():
            if not is_few_step(pipeline):
                require_steps(pipeline, self.steps)
            if with_strength:
                require_strength(self.strength, self._sampling(pipeline).steps)

    def image_to_image(self) -> ImageToImage:
        """Return the results of image-to-image before there are any, with a note if a pipeline cannot do it."""
        faults = (
            image_to_image_fault(pipeline, self._sampling(pipeline).steps, self.strength)
            for pipeline in self.pipelines.values()
        )
        return ImageToImage(strength=self.strength, note=next(filter(None, faults), None))

    def _sampling(self, pipeline: DiffusionPipeline) -> Sampling:
        return sampling_of(pipeline, self.steps, self.guidance_scale)

    def images(self, name: str, prompts: Sequence[str], *, added_to_seed: int = 0, **arguments: Any) -> Tensor:
        """Generate images as the pipeline itself makes them, not as a safety checker passes them on."""
        pipeline = self.pipelines[name]
        arguments |= self._sampling(pipeline).arguments
        return generate(without_safety_checker(pipeline), prompts, seed=self.seed + added_to_seed, **arguments)

    def from_images(self, name: str, of: ImageToImageSet, **arguments: Any) -> Tensor:
        """Generate images from those of a set."""
        start = of.images(image_size(self.first))
        return self.images(name, of.prompts, image=start, strength=self.strength, **arguments)

    def save(self, images: Tensor, name: str, *parts: str) -> None:
        """Keep a pipeline's images, if there is a folder for them."""
        if self.folder is not None:
            save_images(images, self._folder_of(name, *parts))

    def save_distances(self, distances: Tensor, name: str, *parts: str) -> None:
        """Keep how far a pipeline's images are from the teacher's, beside the images."""
        if self.folder is not None:
            save_distances(distances, self._folder_of(name, *parts))

    def _folder_of(self, name: str, *parts: str) -> Path:
        assert self.folder is not None
        return self.folder.joinpath(*parts, folder_names(list(self.pipelines))[name])


@dataclass(frozen=True)
class _Quality:
    """Generates and judges the images of all pipelines, split by split; the first pipeline's are the teacher's."""

    generation: _Generation
    sets: Sequence[EvaluationSet]
    starts: Sequence[ImageToImageSet]
    judge: Judge
    real: RealImages | None
    progress: Progress | None

    @classmethod
    def of(
        cls,
        generation: _Generation,
        data: str | Path | None,
        sets: Sequence[EvaluationSet],
        count: int,
        clip: CLIPModel | None,
        progress: Progress | None,
    ) -> _Quality:
        """Read the real images; `count` of each split are started from."""
        judge, first = Judge(generation.first.device), generation.first
        starts = image_to_image_sets(data, sets, count, generation.seed)
        real = None if data is None else RealImages.of(data, [*sets, *starts], judge, first, clip)
        return cls(generation, sets, starts, judge, real, progress)

    def run(self, from_images: ImageToImage | None) -> tuple[list[QualityMetrics], ImageToImage | None]:
        """Return the metrics of text-to-image, and of image-to-image if it was requested."""
        judged = [row for each in self.sets for row in self._text_to_image(each)]
        if from_images is None or from_images.note is not None:
            return judged, from_images
        if not self.starts:
            return judged, from_images.model_copy(update={"note": NO_IMAGES})
        judge, rows, references = ImageToImageJudge(self.judge, self.real), [], []
        for each in self.starts:
            found, of_split = self._image_to_image(each, judge)
            rows += found
            references += of_split
        return judged, from_images.model_copy(update={"rows": rows, "references": references})

    def _text_to_image(self, of: EvaluationSet) -> list[QualityMetrics]:
        teacher_features: Tensor | None = None
        rows = []
        for name in self.generation.pipelines:
            images = self.generation.images(name, of.prompts, progress=self._reporter(f"{name}, {of.split}"))
            self.generation.save(images, name, of.split)
            features = self.judge.features(images)
            teacher_features = features if teacher_features is None else teacher_features
            self.generation.save_distances(feature_distances(features, teacher_features), name, of.split)
            rows.append(
                QualityMetrics(
                    name=name,
                    split=of.split,
                    images=len(images),
                    teacher_distance=feature_distance(features, teacher_features),
                    **({} if self.real is None else self.real.metrics(images, features, of.examples)),
                )
            )
        return rows

    def _image_to_image(
        self, of: ImageToImageSet, judge: ImageToImageJudge
    ) -> tuple[list[ImageToImageMetrics], list[ImageToImageMetrics]]:
        """Return the metrics of all pipelines on one split, and what they are to be compared with."""
        rows: list[ImageToImageMetrics] = []
        references: list[ImageToImageMetrics] = []
        for name in self.generation.pipelines:
            title = f"{name}, image-to-image, {of.split}"
            images = self.generation.from_images(name, of, progress=self._reporter(title))
            self.generation.save(images, name, IMAGE_TO_IMAGE, of.split)
            features = self.judge.features(images)
            if not rows:
                again = partial(self.generation.from_images, name, of, added_to_seed=OTHER_SEED)
                judge.add_teacher(features, of, again)
                references = judge.references(name, self.generation.first, of)
            metrics = judge.metrics(features, of)
            rows.append(ImageToImageMetrics(name=name, split=of.split, images=len(images), **metrics))
        return rows, references

    def _reporter(self, title: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(title, done, total)

        return report
