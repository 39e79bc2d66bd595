"""The work of training a tiny decoder: a step is timed, as its parts are not calls of the denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from asdm.data.prepared import is_prepared
from asdm.data.sources import count_of_examples
from asdm.diffusion.conditioning import latent_shape
from asdm.distillation.decoder_recipe import DecoderRecipe
from asdm.distillation.decoder_task import DecoderBatch, DecoderTask
from asdm.estimates.sampling import preparation
from asdm.estimates.work import StepWork, Work
from asdm.measure.hooks import preserve_module_state
from asdm.measure.latency import seconds_of
from asdm.training.checkpoints import checkpoint_step

SAMPLES = 2  # latents of the timed step, of which a whole batch is a multiple


def decoder_training(
    pipeline: DiffusionPipeline, recipe: DecoderRecipe, *, data: str | Path, folder: Path
) -> list[StepWork]:
    """Return the work of `distill_decoder`: that of preparing the data, and that of the steps that are left in
    `folder`. A quick step without an optimiser is timed."""
    works = []
    if not is_prepared(data) and not is_prepared(folder / "prepared"):
        works.append(StepWork.exactly("prepare data", preparation(pipeline, data)))
    left = max(0, recipe.steps - checkpoint_step(folder))
    each = recipe.batch_size / SAMPLES * _seconds_of_a_pair(pipeline, recipe) if left else 0.0
    work = Work(seconds=left * each)
    if left and recipe.crop >= max(latent_shape(pipeline)[1:]):  # the teacher answers once
        answers = min(left * recipe.batch_size, 2 * count_of_examples(data)[0])
        work += Work(encodes=answers, decodes=answers)
    works.append(StepWork.exactly(f"distil {left:,} steps", work))
    return works


def _seconds_of_a_pair(pipeline: DiffusionPipeline, recipe: DecoderRecipe) -> float:
    """Return the seconds of the passes of two latents, on average over the steps. Where latents are whole, the teacher
    has answered before."""
    latents = torch.randn(SAMPLES, *latent_shape(pipeline), generator=torch.Generator().manual_seed(0))
    tiny = recipe.tiny_for(pipeline).to(pipeline.vae.device)
    # The first step compares pixels alone, the second one latents too, the third one features too.
    task = DecoderTask(pipeline, tiny, recipe.model_copy(update={"encoder_every": 2, "features_every": 3}))

    def seconds(step: int) -> float:
        def passes() -> None:
            batch = DecoderBatch(latents, torch.arange(SAMPLES), step)
            task(batch, torch.Generator().manual_seed(0))["loss"].backward()

        passes()
        return seconds_of(passes, pipeline.device)

    with preserve_module_state(pipeline.vae), torch.enable_grad():
        pipeline.vae.eval().requires_grad_(False)
        plain, with_encoder, with_features = (seconds(step) for step in (1, 2, 3))
    return plain + (with_encoder - plain) / recipe.encoder_every + (with_features - plain) / recipe.features_every
