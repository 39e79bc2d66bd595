"""Supervision on captions that have no image: which captions, and the noisy latents at which they are compared.

Semantic-aware supervision needs no target image: teacher and student are compared with each other and with the
caption. So it reaches captions of which no image exists (inferred): the user's, or splices of two captions of the data.
Such latents are what the teacher's guided solver reaches from pure noise in a few steps. They follow the caption, as
the latents do that a sampler visits. A real image, noised, would show what another caption says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.data.captions import CaptionSource
from asdm.data.examples import Example, Unusable
from asdm.data.names import unusable
from asdm.data.sources import open_source
from asdm.diffusion.conditioning import Conditioning, embed_prompts
from asdm.diffusion.generation import default_guidance
from asdm.diffusion.kinds import is_inpainting
from asdm.diffusion.parameterization import Parameterization
from asdm.distillation.consistency import ddim_step
from asdm.distillation.stages import Stage
from asdm.errors import AsdmError


@dataclass(frozen=True)
class CaptionSampler:
    """Captions without images, and how they are embedded and noised.

    `texts` draws so many captions with a generator; `embed` embeds them; `guidance_scale` is that of the teacher's
    solver.
    """

    texts: Callable[[int, torch.Generator], list[str]]
    embed: Callable[[list[str]], Conditioning]
    guidance_scale: float


def make_caption_sampler(pipeline: DiffusionPipeline, stage: Stage, captions: Sequence[str]) -> CaptionSampler:
    """Make the source of a stage's captions without images: the stage's file, or splices of the data's `captions`.

    Raises:
        AsdmError: no file of captions, or a denoiser that reads an image beside the caption.
    """
    if is_inpainting(pipeline):
        raise AsdmError(f"stage {stage.name}: this denoiser reads an image beside the caption; weigh no caption losses")
    file = stage.caption_only.file
    draw = partial(_spliced, captions) if file is None else partial(_chosen, read_captions(file))
    scale = default_guidance(pipeline) if stage.guidance_scale is None else stage.guidance_scale
    return CaptionSampler(draw, partial(embed_prompts, pipeline), scale)


def read_captions(path: str | Path) -> list[str]:
    """Return the captions of a text file, one a line. No image is read.

    Raises:
        AsdmError: not a file of captions, or an empty one.
    """
    source = open_source(path) if str(path).lower().endswith(".txt") else None
    if not isinstance(source, CaptionSource):
        raise AsdmError(f"{path}: captions without images are a .txt file, one a line")
    rows = [row for piece in range(len(source)) for row in source.read(piece)]
    captions = [row.caption for row in rows if isinstance(row, Example)]
    if not captions:
        raise unusable(path, {row.name: row.reason for row in rows if isinstance(row, Unusable)})
    return captions


def spliced(first: str, second: str, draw: random.Random) -> str:
    """Return the beginning of a caption and the end of another, split at commas where both have some, else at words.

    "rabbit, flat" and "truck, line" make "rabbit, line".
    """
    mark = ", " if ", " in first and ", " in second else " "
    head, tail = first.split(mark), second.split(mark)
    kept = draw.randint(1, max(1, len(head) - 1))
    taken = draw.randint(1, max(1, len(tail) - 1))
    return mark.join([*head[:kept], *tail[-taken:]])


def _spliced(captions: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    draw = _random(generator)
    return [spliced(draw.choice(captions), draw.choice(captions), draw) for _ in range(count)]


def _chosen(captions: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    draw = _random(generator)
    return [draw.choice(captions) for _ in range(count)]


def _random(generator: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(2**62, (), generator=generator)))


@torch.no_grad()
def trajectory(
    parameterization: Parameterization,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    timesteps: Tensor,
    steps: int,
) -> Tensor:
    """Return noisy latents (batch, channels, h, w) at `timesteps` (batch,): what DDIM reaches from pure noise.

    Args:
        predict: the teacher's guided prediction for latents at time steps.
        noise: where it begins, at the schedule's end.
        steps: of the solver, equal parts of the way in time; 0: the noise itself, which is right at the end alone.
    """
    end = parameterization.num_timesteps - 1
    noisy, here = noise, torch.full_like(timesteps, end)
    for step in range(1, steps + 1):
        place = end + (timesteps - end) * (step / steps)
        there = place if timesteps.is_floating_point() else place.round().to(timesteps.dtype)
        noisy = ddim_step(parameterization, predict(noisy, here), noisy, here, there)
        here = there
    return noisy
