"""`distill_decoder`: a tiny decoder, trained beside a pipeline's VAE and resumed where it was stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

from asdm import checks
from asdm.data.batches import ShuffledBatches
from asdm.data.prepared import digest_of
from asdm.digests import short_digest
from asdm.distillation.decoder_recipe import DecoderRecipe
from asdm.distillation.decoder_task import DecoderBatch, DecoderTask, encoder_levels
from asdm.distillation.training_set import TrainingSet, prepare
from asdm.errors import AsdmError
from asdm.files import folder_lock, read_settings, write_text
from asdm.measure.hooks import preserve_module_state
from asdm.measure.machine import fast_training
from asdm.pipelines.decoders import is_tiny
from asdm.training.checkpoints import require_same_run
from asdm.training.launch import make_accelerator
from asdm.training.loop import Progress, train
from asdm.training.optimizers import require_installed

# These fields may change when a training is resumed.
CHANGEABLE = {"learning_rate", "warmup_steps", "checkpoint_every", "accumulation", "mixed_precision"}


@dataclass(frozen=True)
class DecoderTraining:
    """A decoder in training: what it was trained on, and whether all its steps are done."""

    decoder: AutoencoderTiny
    examples: TrainingSet
    is_done: bool


@checks.arguments(
    pipeline=checks.PIPELINE,
    data=checks.path,
    folder=checks.path,
    recipe=checks.a(DecoderRecipe),
    minutes=checks.number(above=0),
    seed=checks.SEED,
    progress=checks.function,
)
@fast_training()
def distill_decoder(
    pipeline: DiffusionPipeline,
    data: str | Path,
    folder: str | Path,
    *,
    recipe: DecoderRecipe | None = None,
    minutes: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> DecoderTraining:
    """Train a tiny decoder (AutoencoderTiny) to make the images that the pipeline's VAE makes; resume from what is in
    `folder`.

    `save_decoder` writes the result as a folder, and `with_decoder` puts it into a
    pipeline. Under `accelerate launch` the processes share each step's batch.

    Args:
        data: any source that `--data` takes. From captions alone the pipeline samples latents.
        folder: gets the prepared latents, `log.jsonl` and the newest checkpoint; a run killed at any moment loses the
            steps since that checkpoint at most.
        recipe: the decoder's size and the training's settings; by default those of `DecoderRecipe`.
        minutes: save and return early after so many minutes of training.
        progress: called after each step, in the first process, with `step`, `steps`, the losses and the `seconds` it
            took.

    Raises:
        AsdmError: the data cannot be used, the VAE is a tiny one, a loss is not finite, or `folder` is of another run
            or one is at work there.
    """
    recipe, folder = recipe or DecoderRecipe(), Path(folder)
    require_teachable(pipeline)
    require_installed(recipe.optimizer)
    tiny = recipe.tiny_for(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    vae: Any = pipeline.vae
    accelerator = make_accelerator(vae.device, recipe.mixed_precision, some_unused=True)
    with folder_lock(folder), preserve_module_state(vae):
        vae.eval().requires_grad_(False)
        examples = prepare(pipeline, data, folder / "prepared", seed=seed)
        if accelerator.is_main_process:
            _claim(folder, recipe, seed, digest_of(vae), examples)
        accelerator.wait_for_everyone()
        order = ShuffledBatches(len(examples), recipe.batch_size, seed)

        def batch_at(step: int) -> DecoderBatch:
            indices = order(step)
            return DecoderBatch(examples.prepared.batch(indices)[0], indices, step)

        is_done = train(
            DecoderTask(pipeline, tiny, recipe),
            batch_at,
            recipe.loop(seed),
            folder,
            accelerator=accelerator,
            progress=progress,
            stop_after_seconds=None if minutes is None else 60 * minutes,
        )
    return DecoderTraining(tiny.eval().requires_grad_(False), examples, is_done)


def require_teachable(pipeline: DiffusionPipeline) -> None:
    """
    Raises:
        AsdmError: the pipeline's VAE is a tiny one, in half precision, or of a kind that teaches none.
    """
    vae: Any = pipeline.vae
    if is_tiny(vae):
        raise AsdmError(
            f"{pipeline.config.get('_name_or_path')}: its VAE is an AutoencoderTiny already; name the model with its "
            "own VAE"
        )
    if vae.dtype != torch.float32:
        raise AsdmError(f"a VAE in {vae.dtype} teaches no decoder; load the pipeline in float32")
    if not encoder_levels(vae):
        raise AsdmError(f"vae: a {type(vae).__name__}; a decoder is taught by an AutoencoderKL")


def _claim(folder: Path, recipe: DecoderRecipe, seed: int, vae: str, examples: TrainingSet) -> None:
    """Write beside the checkpoints whose they are, or check that they are this run's, which may be lengthened.

    Raises:
        AsdmError: they are another's.
    """
    path = folder / "run.json"
    now = {
        "seed": seed,
        "teacher": vae,
        "data": examples.prepared.identity,
        "images": short_digest(examples.prepared.first_latents()),
        **recipe.model_dump(mode="json", exclude=CHANGEABLE),
    }
    if path.is_file():
        defaults = DecoderRecipe().model_dump(mode="json", exclude=CHANGEABLE)
        known = {"images": now["images"]} | defaults | read_settings(path)
        require_same_run(folder, known, now)
    write_text(path, json.dumps(now, indent=1) + "\n")
