"""How good a recipe's images are, beside the teacher's of the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ablation_recipes import NAMED, SETTLED, STEPS, SWITCHED, WORK
from ablation_rows import METRICS
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import asdm
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.images import to_images
from asdm.pipelines.clip import load_clip

SHOWN = 16  # held-out prompts, of the first seed of the recipes in `DRAWN`
DRAWN = ("teacher", *NAMED, SWITCHED)


class Judged:
    """Metrics of a pipeline's images on the fixed prompts, beside the teacher's of the same seeds."""

    def __init__(self, pipeline: DiffusionPipeline, samples: int):
        self.judge = Judge(pipeline.device)
        self.sets = _sets(samples)
        self.real = RealImages.of("demo", self.sets, self.judge, pipeline, load_clip(pipeline))
        self.pipeline, self.samples = pipeline, samples

    def __call__(self, pipeline: DiffusionPipeline, seed: int, strip: Path | None) -> dict[str, float]:
        metrics: dict[str, float] = {"images": self.samples}
        for each in self.sets:
            images = asdm.generate(pipeline, each.prompts, steps=STEPS, seed=1000 * seed)
            if strip is not None and each.split == "held_out":
                to_images(torch.cat(list(images[:SHOWN]), dim=2)[None])[0].save(strip)
            features = self.judge.features(images)
            expected = self._teacher_features(each, seed, features if pipeline is self.pipeline else None)
            found = self.real.metrics(images, features, each.examples)
            found |= self.real.target_metrics(features, each.examples)
            found["teacher_distance"] = feature_distance(features, expected)
            split = each.split.replace("_", "")
            metrics |= {f"{metric}_{split}": round(float(found[metric]), 4) for metric in METRICS}
        return metrics

    def see_teacher(self, seed: int) -> None:
        """Draw the teacher's images now, of which all processes keep the features."""
        for each in self.sets:
            self._teacher_features(each, seed, None)

    def _teacher_features(self, each: Any, seed: int, known: Tensor | None) -> Tensor:
        path = WORK / f"teacher-{each.split}-{seed}-{self.samples}.pt"
        if not path.is_file():
            if known is None:
                known = self.judge.features(asdm.generate(self.pipeline, each.prompts, seed=1000 * seed))
            torch.save(known, path)
        return torch.load(path, weights_only=True)


def _sets(count: int) -> list[EvaluationSet]:
    """Return so many held-out pairs of one right answer, and a quarter as many seen ones."""
    by_split = {each.split: each for each in evaluation_sets("demo", None, count, 0)}
    seen, few = by_split["seen"], count // 4
    shorter = seen.model_copy(update={"prompts": seen.prompts[:few], "examples": seen.examples[:few]})
    return [shorter, by_split["held_out"]]


def held_out(count: int) -> EvaluationSet:
    """Return so many held-out pairs of one right answer."""
    return _sets(count)[1]


def strip_path(name: str, target: float) -> Path:
    """Return where the first images of a recipe's first seed are, side by side."""
    return SETTLED / ("teacher.png" if name == "teacher" else f"{name.replace(' ', '')}-{target:g}.png")


def cut(strip: Image.Image) -> list[Image.Image]:
    """Return the square images that a strip shows side by side."""
    side = strip.height
    return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]
