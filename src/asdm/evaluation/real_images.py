"""Real images and their captions: what generated images are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPModel

from asdm.data.examples import Example, load_pixels
from asdm.data.sources import open_data
from asdm.diffusion.conditioning import image_size
from asdm.evaluation.metrics import Judge, feature_distance, kid, nearest_of, recognition, retrieval_at_1
from asdm.evaluation.sampling import EvaluationSet
from asdm.evaluation.starting_images import ImageToImageSet
from asdm.pipelines.clip import clip_statistics, load_clip_tokenizer

_READ_TOGETHER = 64  # images whose pixels are in memory at once


class RealImages:
    """The judge's features of real images, and embeddings of their captions where there is a CLIP."""

    @classmethod
    def of(
        cls,
        data: str | Path,
        sets: Sequence[EvaluationSet | ImageToImageSet],
        judge: Judge,
        pipeline: DiffusionPipeline,
        clip: CLIPModel | None,
    ) -> RealImages | None:
        """Read the images of the sets; None where the data has captions alone.

        All other images of the data come before them if metrics look for the nearest one, by label or by caption, or
        where image-to-image has targets.
        """
        compared = list(dict.fromkeys(example for each in sets for example in each.examples))
        if not compared:
            return None
        has_targets = any(isinstance(each, ImageToImageSet) and each.targets for each in sets)
        others = open_data(data, "all").examples
        if not has_targets and clip is None and not _are_labelled(others):
            others = []
        among = set(compared)
        return cls(judge, pipeline, [*(example for example in others if example not in among), *compared], clip)

    def __init__(self, judge: Judge, pipeline: DiffusionPipeline, examples: list[Example], clip: CLIPModel | None):
        tokenizer = None if clip is None else load_clip_tokenizer(clip.name_or_path, pipeline)
        self.examples, self.features = features_of(judge, examples, image_size(pipeline))
        self.clip = clip
        if clip is not None:
            captions = dict.fromkeys(example.caption for example in self.examples)
            self.row_of_caption = {caption: row for row, caption in enumerate(captions)}
            self.text_embeds = text_embeds(clip, tokenizer, list(captions))

    def metrics(self, images: Tensor, features: Tensor, examples: list[Example]) -> dict[str, Any]:
        """Return fields of `QualityMetrics` for generated images, each of the prompt of one of `examples`.

        Args:
            images: (images, 3, height, width) in [-1, 1].
            features: the judge's of them.
        """
        rows = self.rows(examples)
        found: dict[str, Any] = {}
        if len(images) > 1:
            found["kid"], found["kid_deviation"] = kid(features, self.features[rows])
        if _are_labelled(self.examples):
            labels = [(str(example.concept), str(example.style)) for example in self.examples]
            found |= asdict(recognition(features, [labels[row] for row in rows], self.features, labels))
        if self.clip is not None:
            captions = [self.row_of_caption[example.caption] for example in examples]
            found["retrieval_at_1"] = retrieval_at_1(image_embeds(self.clip, images), self.text_embeds, captions)
        return found

    def target_metrics(self, features: Tensor, targets: Sequence[Example]) -> dict[str, Any]:
        """Return fields of `ImageToImageMetrics` for images of these features, each of which is to be its target."""
        rows = self.rows(targets)
        nearest = nearest_of(features, self.features)
        found = {
            "exact_pair": _share(nearest, rows),
            "target_distance": feature_distance(features, self.features[rows]),
        }
        if _are_labelled(self.examples):
            styles = [example.style for example in self.examples]
            found["style"] = _share([styles[row] for row in nearest], [target.style for target in targets])
        return found

    def rows(self, examples: Sequence[Example]) -> list[int]:
        """Return the rows of these examples' images in `features`."""
        row_of = {example: row for row, example in enumerate(self.examples)}
        return [row_of[example] for example in examples]


def features_of(judge: Judge, examples: Sequence[Example], size: int) -> tuple[list[Example], Tensor]:
    """Return the examples whose images can be read, and the judge's features of these at `size` pixels. Few images
    are in memory at once."""
    kept, features = list[Example](), []
    for start in range(0, len(examples), _READ_TOGETHER):
        some, pixels = load_pixels(examples[start : start + _READ_TOGETHER], size, {})
        if some:
            kept += some
            features.append(judge.features(torch.stack(pixels)))
    return kept, torch.cat(features)


def _share(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Return the part of the places at which both have the same."""
    return sum(one == other for one, other in zip(found, wanted, strict=True)) / len(wanted)


def _are_labelled(examples: Sequence[Example]) -> bool:
    return all(example.concept and example.style for example in examples)


@torch.no_grad()
def image_embeds(clip: CLIPModel, images: Tensor) -> Tensor:
    """Return embeddings (images, channels) of `images` (images, 3, h, w) in [-1, 1] by the image tower, at its size."""
    size = clip.config.vision_config.image_size
    if images.shape[2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in clip_statistics(clip))
    pixels = (images / 2 + 0.5 - mean) / deviation
    pooled = clip.vision_model(pixel_values=pixels.to(clip.device, clip.dtype)).pooler_output
    return clip.visual_projection(pooled)


@torch.no_grad()
def text_embeds(clip: CLIPModel, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Return embeddings (captions, channels) by the text tower."""
    tokens = tokens_of(clip, tokenizer, captions)
    return clip.text_projection(clip.text_model(input_ids=tokens.to(clip.device)).pooler_output)


def tokens_of(clip: CLIPModel, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Return what the text tower reads of captions, (captions, tokens)."""
    longest = clip.config.text_config.max_position_embeddings
    tokens = tokenizer(list(captions), padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
    return tokens.input_ids  # type: ignore[no-any-return]
