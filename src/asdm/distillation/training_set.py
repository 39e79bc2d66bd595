"""What a distillation is trained on: prepared latents and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from asdm.data.preparation import prepare_data
from asdm.data.prepared import PreparedData, digest_of, is_prepared, open_prepared
from asdm.diffusion.conditioning import Conditioning, embed_prompts
from asdm.diffusion.parameterization import parameterization_of
from asdm.distillation.recorded import Recorded, open_recorded
from asdm.families import denoiser_of
from asdm.files import MARKER, read_marker


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: prepared latents and captions, the empty caption's embedding, and what the teacher answered
    before, where a stage reads that."""

    prepared: PreparedData
    empty_caption: Conditioning
    recorded: Recorded | None = None

    def __len__(self) -> int:
        return len(self.prepared)

    @property
    def skipped(self) -> dict[str, str]:
        """What of the data could not be used, by name, with the reason."""
        return self.prepared.skipped


def prepare(
    pipeline: DiffusionPipeline, data: str | Path, folder: Path, *, recorded: bool = False, seed: int = 0
) -> TrainingSet:
    """Open `data` where it was prepared, else prepare it into `folder`; with the teacher's features if `recorded`.

    Args:
        seed: of the images and masks that are drawn; a folder that was begun with seed 0 is continued so, as earlier
            versions began all of them.

    Raises:
        AsdmError: the source cannot be used, or was prepared by another model, or has no features of this teacher.
    """
    if is_prepared(data):
        prepared = open_prepared(pipeline, data)
    else:
        is_of_seed_0 = (folder / MARKER).is_file() and not read_marker(folder).get("seed")
        prepared = prepare_data(pipeline, data, folder, seed=0 if is_of_seed_0 else seed)
    features = open_features(pipeline, prepared) if recorded else None
    with torch.no_grad():
        empty_caption = embed_prompts(pipeline, [""]).to("cpu")
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        empty_caption = empty_caption.without_text()
    return TrainingSet(prepared, empty_caption, features)


def open_features(pipeline: DiffusionPipeline, prepared: PreparedData) -> Recorded:
    """Open what a pipeline's denoiser answered before on prepared data.

    Raises:
        AsdmError: nothing was recorded, or of another teacher.
    """
    predicts = parameterization_of(pipeline.scheduler).description
    return open_recorded(prepared, digest_of(denoiser_of(pipeline)), predicts)
