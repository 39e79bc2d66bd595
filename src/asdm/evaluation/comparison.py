"""Teacher and students side by side: speed in one run, quality on the same prompts and seeds."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPModel

from asdm import checks
from asdm.diffusion.generation import default_guidance, generate, is_few_step, require_steps
from asdm.evaluation.image_folders import folder_names, save_images
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.results import Evaluation, QualityMetrics
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets, sampling_of
from asdm.evaluation.speed import measure_speed
from asdm.families import denoiser_of, family_of
from asdm.pipelines.derived import without_safety_checker

Progress = Callable[[str, int, int], None]


@checks.arguments(
    pipelines=checks.named(checks.PIPELINE),
    data=checks.path,
    prompts=checks.PROMPTS,
    samples=checks.whole(0, 10**6),
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

    Args:
        data: the source of prompts and real images, as for `open_data`. Its held-out rows are a split of their own.
        prompts: used where there is no `data`. Without real images the only metric is the distance to the teacher's.
        samples: the most prompts of each split.
        steps: of all but few-step pipelines, which have steps and guidance of their own.
        guidance_scale: of all but few-step pipelines; the first pipeline's default by default.
        rounds: the least number of timed rounds of the denoiser call, 10 by default. Three images of each pipeline
            follow, in turns. On a busy machine there are more of both, until the speed-ups' intervals are narrow.
        quality: False to measure speed alone.
        clip: a CLIPModel for retrieval metrics; its tokenizer is the first pipeline's.
        images_folder: where to keep every image as `SPLIT/NAME/0000.png`.

    Raises:
        AsdmError: the data cannot be used, or the judge is not installed.
    """
    first = next(iter(pipelines.values()))
    for pipeline in pipelines.values():
        if not is_few_step(pipeline):
            require_steps(pipeline, steps)
    guidance = default_guidance(first) if guidance_scale is None else guidance_scale
    sets = evaluation_sets(data, prompts, samples, seed) if quality else []
    judged: list[QualityMetrics] = []
    if sets:
        judge = Judge(first.device)
        real = None if data is None else RealImages.of(data, sets, judge, first, clip)
        folder = None if images_folder is None else Path(images_folder)
        generation = _Generation(steps, guidance, seed, folder, progress)
        judged = _judge(pipelines, sets, generation, judge, real)
    speed = measure_speed(pipelines, steps=steps, guidance_scale=guidance, rounds=rounds)
    return Evaluation(
        date=date.today().isoformat(),
        machine=f"{platform.machine()}, {first.device}, torch {torch.__version__}",
        threads=torch.get_num_threads(),
        dtype=str(denoiser_of(first).dtype).removeprefix("torch."),
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        denoiser=family_of(first).label,
        other_cores=speed.other_cores,
        contention=speed.contention,
        speed=speed.rows,
        quality=judged,
    )


@dataclass(frozen=True)
class _Generation:
    """How the images of all pipelines are generated, and where they are kept."""

    steps: int
    guidance_scale: float
    seed: int
    folder: Path | None
    progress: Progress | None

    def images(self, name: str, pipeline: DiffusionPipeline, prompts: EvaluationSet) -> Tensor:
        """Generate images as the pipeline itself makes them, not as a safety checker passes them on."""

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"{name}, {prompts.split}", done, total)

        arguments = sampling_of(pipeline, self.steps, self.guidance_scale).arguments
        pipeline = without_safety_checker(pipeline)
        return generate(pipeline, prompts.prompts, **arguments, seed=self.seed, progress=report)


def _judge(
    pipelines: Mapping[str, DiffusionPipeline],
    sets: Sequence[EvaluationSet],
    generation: _Generation,
    judge: Judge,
    real: RealImages | None,
) -> list[QualityMetrics]:
    """Generate and judge the images of all pipelines, split by split; the first pipeline's are the teacher's."""
    folders = folder_names(list(pipelines))
    rows = []
    for evaluation_set in sets:
        teacher_features: Tensor | None = None
        for name, pipeline in pipelines.items():
            images = generation.images(name, pipeline, evaluation_set)
            if generation.folder is not None:
                save_images(images, generation.folder / evaluation_set.split / folders[name])
            features = judge.features(images)
            teacher_features = features if teacher_features is None else teacher_features
            rows.append(
                QualityMetrics(
                    name=name,
                    split=evaluation_set.split,
                    images=len(images),
                    teacher_distance=feature_distance(features, teacher_features),
                    **({} if real is None else real.metrics(images, features, evaluation_set.examples)),
                )
            )
    return rows
