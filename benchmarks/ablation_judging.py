"""How good a recipe's images are, beside the teacher's of the same seeds."""

from __future__ import annotations

import random
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ablation_recipes import LONG, NAMED, SETTLED, STEPS, SWITCHED, WORK
from ablation_rows import METRICS_OF_IMAGES
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

import asdm
from asdm.compensation.fitting import prediction_error, predictions
from asdm.data.calibration import CalibrationCall, calibration_calls
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.files import replacing_file
from asdm.images import to_images
from asdm.pipelines.clip import load_clip
from asdm.sensitivity.expert_usage import expert_usage, prompts_by_label

PREDICTED, TIMESTEPS = 48, 8  # held-out prompts, and time steps of each, at which predictions are compared
EXPERT_PROMPTS = 16  # of each style, by which it is told whether expert kernels divide the styles among them
SHOWN = 16  # held-out prompts, of the first seed of the recipes in `DRAWN`
DRAWN = ("teacher", *NAMED, SWITCHED, *(f"{name}{LONG}" for name in NAMED))


class Judged:
    """Metrics of a pipeline's images on the fixed prompts, beside the teacher's of the same seeds."""

    def __init__(self, pipeline: DiffusionPipeline, samples: int):
        self.judge = Judge(pipeline.device)
        self.sets = _sets(samples)
        self.real = RealImages.of("demo", self.sets, self.judge, pipeline, load_clip(pipeline))
        self.pipeline, self.samples = pipeline, samples

    @cached_property
    def _calls(self) -> tuple[list[CalibrationCall], list[Tensor]]:
        """Calls of the denoiser with held-out prompts and the teacher's latents of them, and its predictions."""
        prompts = held_out(PREDICTED).prompts
        calls = calibration_calls(self.pipeline, None, prompts, TIMESTEPS, len(prompts), 0)
        return calls, predictions(self.pipeline.unet, calls)

    @torch.no_grad()
    def prediction_error(self, student: UNet2DConditionModel) -> float:
        """Return the squared error of held-out predictions relative to the teacher's. It varies less between seeds than
        all that is told from images."""
        return round(prediction_error(student, *self._calls), 5)

    def __call__(self, pipeline: DiffusionPipeline, seed: int, strip: Path | None) -> dict[str, float]:
        metrics: dict[str, float] = {"images": self.samples}
        for each in self.sets:
            images = asdm.generate(pipeline, each.prompts, steps=STEPS, seed=1000 * seed)
            if strip is not None and each.split == "held_out":
                with replacing_file(strip) as partial:
                    to_images(torch.cat(list(images[:SHOWN]), dim=2)[None])[0].save(partial, "PNG")
            features = self.judge.features(images)
            expected = self._teacher_features(each, seed, features if pipeline is self.pipeline else None)
            found = self.real.metrics(images, features, each.examples)
            found |= self.real.target_metrics(features, each.examples)
            found["teacher_distance"] = feature_distance(features, expected)
            split = each.split.replace("_", "")
            metrics |= {f"{metric}_{split}": round(float(found[metric]), 4) for metric in METRICS_OF_IMAGES}
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


def expert_division(pipeline: DiffusionPipeline) -> dict[str, float]:
    """Return how far a student's expert kernels divide the styles among them, as means over its convolutions: the bits
    that kernel and style share, those that a division by chance has, and the share of the mixtures' variance between
    prompts that the styles explain."""
    draw = random.Random(0)
    styles = {style: draw.sample(texts, EXPERT_PROMPTS) for style, texts in prompts_by_label("demo", "style").items()}
    found = expert_usage(pipeline, styles).convolutions
    return {
        f"expert_{name}": round(sum(getattr(conv, name) for conv in found) / len(found), 5)
        for name in ("information", "chance", "explained")
    }


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
    plain = name.replace(" (", "-").replace(")", "").replace(" ", "")
    return SETTLED / ("teacher.png" if name == "teacher" else f"{plain}-{target:g}.png")


def cut(strip: Image.Image) -> list[Image.Image]:
    """Return the square images that a strip shows side by side."""
    side = strip.height
    return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]
