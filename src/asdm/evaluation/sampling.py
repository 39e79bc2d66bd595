"""How each pipeline of an evaluation samples, and the prompts that all of them sample."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from pydantic import ConfigDict

from asdm.data.calibration import DEFAULT_PROMPTS
from asdm.data.examples import Example, Split, can_be_decoded
from asdm.data.sources import open_data
from asdm.diffusion.generation import default_guidance, default_steps, is_few_step
from asdm.records import Record

SPLITS: dict[Split, str] = {"train": "seen", "held_out": "held_out"}


@dataclass(frozen=True)
class Sampling:
    """One pipeline's steps and guidance."""

    steps: int
    guidance_scale: float
    is_few_step: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale}


def common_guidance(pipelines: Iterable[DiffusionPipeline], given: float | None) -> float:
    """Return the guidance scale of all but few-step pipelines: the given one, or the usual one of the first of them; of
    the first pipeline where all are few-step ones."""
    if given is not None:
        return given
    first, *others = pipelines
    return default_guidance(next((each for each in (first, *others) if not is_few_step(each)), first))


def sampling_of(pipeline: DiffusionPipeline, steps: int, guidance_scale: float) -> Sampling:
    """Return the steps and guidance of a pipeline: a few-step one has its own."""
    if is_few_step(pipeline):
        return Sampling(default_steps(pipeline), default_guidance(pipeline), is_few_step=True)
    return Sampling(steps, guidance_scale)


class EvaluationSet(Record):
    """Prompts of one split, and the real images that they describe where there are any."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    split: str
    prompts: list[str]
    examples: list[Example]


def evaluation_sets(
    data: str | Path | None, prompts: Sequence[str] | None, samples: int, seed: int
) -> list[EvaluationSet]:
    """Return the fixed prompts of a run: seen and held-out ones of the data, or the given prompts."""
    if data is None:
        chosen = list(prompts or DEFAULT_PROMPTS)[:samples]
        return [EvaluationSet(split="prompts", prompts=chosen, examples=[])]
    sets = []
    for name, examples in examples_by_split(data).items():
        random.Random(seed).shuffle(examples)
        if examples[0].file is None:  # captions alone
            captions = [example.caption for example in examples[:samples]]
            sets.append(EvaluationSet(split=name, prompts=captions, examples=[]))
            continue
        examples = list(islice(filter(can_be_decoded, examples), samples))
        if examples:
            captions = [example.caption for example in examples]
            sets.append(EvaluationSet(split=name, prompts=captions, examples=examples))
    return sets


def examples_by_split(data: str | Path) -> dict[str, list[Example]]:
    """Return a source's examples by the name that results have for their split; held-out ones of a kind are apart."""
    named: dict[str, list[Example]] = {}
    for split, name in SPLITS.items():
        found: dict[str, list[Example]] = {name: []}
        for example in open_data(data, split).examples:
            own = example.held_out_kind if example.held_out else None
            found.setdefault(own or name, []).append(example)
        named |= {kind: examples for kind, examples in found.items() if examples}
    return named
