"""The images that image-to-image starts from in an evaluation, and what it is asked to make of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image
from pydantic import ConfigDict

from asdm.data.examples import Example, Split, can_be_decoded, in_split
from asdm.data.sources import open_data
from asdm.evaluation.sampling import SPLITS, EvaluationSet
from asdm.images import as_rgb, cropped
from asdm.records import Record


class ImageToImageSet(Record):
    """Prompts of one split, and an image to start from for each.

    `targets` has the real image of each prompt, another variant of its source's design, so that a result has a right
    answer. Where the data names no designs, it is empty, and each prompt is the source's own caption.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    split: str
    prompts: list[str]
    sources: list[Example]
    targets: list[Example]

    @property
    def examples(self) -> list[Example]:
        """All real images of the set."""
        return [*self.sources, *self.targets]

    def images(self, side: int) -> list[Image.Image]:
        """Return the images to start from, cropped to squares of `side` pixels."""
        found = []
        for source in self.sources:
            with source.image() as image:
                found.append(cropped(as_rgb(image), side))
        return found


def image_to_image_sets(
    data: str | Path | None, sets: Sequence[EvaluationSet], count: int, seed: int
) -> list[ImageToImageSet]:
    """Return at most `count` images of each split to start from; none where the data has no images.

    Args:
        data: as for `open_data`. Images of one `design` are its variants: one is asked for from another one.
        sets: of text-to-image. Without variants, their real images are started from.
        seed: chooses targets and sources.
    """
    if data is None or count == 0 or not any(each.examples for each in sets):
        return []
    variants = _variants(open_data(data, "all").examples)
    if variants:
        found = [_with_targets(name, split, variants, count, seed) for split, name in SPLITS.items()]
    else:
        found = [_without_targets(each, count) for each in sets]
    return [each for each in found if each.sources]


def _variants(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Return the images of each design that has several, told apart by their captions."""
    by_design: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if example.design and example.file is not None:
            by_design[example.design].append(example)
    return {design: found for design, found in by_design.items() if len({example.caption for example in found}) > 1}


def _with_targets(
    name: str, split: Split, variants: Mapping[str, Sequence[Example]], count: int, seed: int
) -> ImageToImageSet:
    pairs = list(islice(_pairs(split, variants, seed), count))
    targets = [target for _, target in pairs]
    prompts = [target.caption for target in targets]
    return ImageToImageSet(split=name, prompts=prompts, sources=[source for source, _ in pairs], targets=targets)


def _pairs(split: Split, variants: Mapping[str, Sequence[Example]], seed: int) -> Iterator[tuple[Example, Example]]:
    """Yield pairs of a source and a target in random order; a source that training saw where there is one."""
    draw = random.Random(seed)
    targets = [each for found in variants.values() for each in found if in_split(each, split)]
    draw.shuffle(targets)
    for target in targets:
        sources = [each for each in variants[str(target.design)] if each.caption != target.caption]
        draw.shuffle(sources)
        sources.sort(key=lambda each: each.held_out)
        source = next(filter(can_be_decoded, sources), None)
        if source is not None and can_be_decoded(target):
            yield source, target


def _without_targets(of: EvaluationSet, count: int) -> ImageToImageSet:
    sources = of.examples[:count]
    return ImageToImageSet(split=of.split, prompts=of.prompts[: len(sources)], sources=sources, targets=[])
