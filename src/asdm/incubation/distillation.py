"""A student UNet learns from its teacher: the task that the loop trains, and `distill`, which runs the stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from asdm.conditioning import (
    Conditioning,
    embed_prompts,
    encode_images,
    image_size,
    noise_schedule,
    prediction_target,
    stratified_timesteps,
)
from asdm.errors import AsdmError
from asdm.files import replacing_file
from asdm.incubation.data import Data, ShuffledBatches, load_pixels, open_data
from asdm.incubation.losses import feature_losses, output_loss, task_loss, weighted_sum
from asdm.incubation.stages import Stage, joint_stages, small_model_stages
from asdm.incubation.trainer import Progress, TrainingTask, make_accelerator, train
from asdm.inference.runtime import prepare_for_training
from asdm.student.stock import name_in_original
from asdm.units import stages as unet_blocks

_SMALL_MODEL_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class TrainingSet:
    """Latents (images, 4, h, w) with their captions' embeddings, the empty caption's, and what was skipped."""

    latents: Tensor
    captions: Conditioning
    empty_caption: Conditioning
    skipped: dict[str, str]


class DistillationTask(TrainingTask):
    """Task, output and per-block feature losses of a student that sees what its teacher sees.

    Batch: indices (batch,) into the training set. The teacher runs without gradient.
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        schedule: DDPMScheduler,
        examples: TrainingSet,
        stage: Stage,
    ):
        super().__init__()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.requires_grad_(True)
        self.schedule, self.examples, self.stage = schedule, examples, stage
        self.blocks = unet_blocks(student)
        self.teacher_blocks = {block: name_in_original(block, student, teacher) for block in self.blocks}

    def train(self, mode: bool = True) -> DistillationTask:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        device = self.student.device
        latents = self.examples.latents[batch].to(device, torch.float32)
        captions = self._captions(batch, generator).to(device, torch.float32)
        timesteps = stratified_timesteps(len(latents), self.schedule, generator).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = prediction_target(self.schedule, latents, noise, timesteps)
        with torch.no_grad(), capturing(self.teacher, list(self.teacher_blocks.values())) as teacher_features:
            dtype = self.teacher.dtype
            teacher_pred = self.teacher(
                noisy.to(dtype), timesteps, **captions.to(dtype).unet_arguments(), return_dict=False
            )[0]
        with capturing(self.student, self.blocks) as student_features:
            noise_pred = self.student(noisy, timesteps, **captions.unet_arguments(), return_dict=False)[0]
        expected = {name: teacher_features[block] for name, block in self.teacher_blocks.items()}
        by_block = feature_losses(student_features, expected)
        losses = {
            "task": task_loss(noise_pred, target),
            "output": output_loss(noise_pred, teacher_pred),
            "feature": torch.stack(list(by_block.values())).mean(),
        }
        total = weighted_sum(losses, self.stage.losses.model_dump())
        return {"loss": total, **losses, **{f"feature/{name}": value for name, value in by_block.items()}}

    def _captions(self, batch: Tensor, generator: torch.Generator) -> Conditioning:
        kept = torch.rand(len(batch), generator=generator) >= self.stage.caption_dropout
        return self.examples.captions[batch].where(kept, self.examples.empty_caption)


@contextmanager
def capturing(unet: UNet2DConditionModel, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the hidden states (batch, channels, h, w) that the named blocks put out in the block."""
    features: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            features[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [unet.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def distill(
    teacher: DiffusionPipeline,
    student: UNet2DConditionModel,
    data: str | Path,
    folder: str | Path,
    *,
    stages: Sequence[Stage] | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingSet:
    """Train `student` in place to do as the teacher's UNet does; resumes from what is in `folder`.

    Args:
        data: images with captions: a folder, or "demo".
        folder: gets the prepared latents and, for each stage, `log.jsonl`, TensorBoard events and the
            newest checkpoint; a run killed at any moment loses the steps since that checkpoint at most.
        stages: what to train how long; by default one joint stage of `steps` steps (1000).
        progress: called after each step with `done` and `total` of all stages' steps, the losses and
            the `seconds` it took.

    Returns:
        What was trained on.

    Raises:
        AsdmError: the data cannot be used, a loss is not finite, `folder` is of another run, or the student's
            weights are not in float32.
    """
    if student.dtype != torch.float32:
        raise AsdmError(
            f"a student in {student.dtype} cannot be trained; give it as student.float(), and choose the precision "
            "of the computation with a stage's mixed_precision"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prepare_for_training()
    stages = list(stages) if stages is not None else default_stages(student, 1000 if steps is None else steps)
    examples = prepare(teacher, data, folder / "prepared.safetensors")
    schedule = noise_schedule(teacher)
    total, before = sum(stage.steps for stage in stages), 0
    for index, stage in enumerate(stages):
        report = None if progress is None else partial(_reported, progress, before, total)
        task = DistillationTask(teacher.unet, student, schedule, examples, stage)
        order = ShuffledBatches(len(examples.latents), stage.batch_size, seed)
        train(
            task,
            order,
            stage.loop(seed),
            folder / f"{index:02d}-{stage.name}",
            accelerator=make_accelerator(teacher.device, stage.mixed_precision),
            progress=report,
        )
        before += stage.steps
    student.eval().requires_grad_(False)
    return examples


def _reported(progress: Progress, before: int, total: int, row: dict[str, float]) -> None:
    progress(row | {"done": before + row["step"], "total": total})


def default_stages(student: UNet2DConditionModel, steps: int) -> list[Stage]:
    """One joint stage at a pace that suits the student's size."""
    small = sum(p.numel() for p in student.parameters()) <= _SMALL_MODEL_PARAMETERS
    return small_model_stages(steps) if small else joint_stages(steps)


@torch.no_grad()
def prepare(pipeline: DiffusionPipeline, data: str | Path, cache: Path, batch_size: int = 16) -> TrainingSet:
    """Latents and caption embeddings of a data source, kept in `cache` for the next time.

    Raises:
        AsdmError: the source cannot be used, or `cache` holds another source's.
    """
    source = open_data(data)
    digest = _digest(source, image_size(pipeline))
    if not cache.is_file():
        skipped, examples, latents = dict(source.skipped), [], []
        for start in range(0, len(source), batch_size):
            batch = source.examples[start : start + batch_size]
            readable, pixels = load_pixels(batch, image_size(pipeline), skipped)
            if pixels:
                latents.append(encode_images(pipeline.vae, torch.stack(pixels)).cpu())
                examples += readable
        if not examples:
            raise AsdmError(f"{data}: none of its {len(source)} images can be decoded; mend the folder")
        captions = embed_prompts(pipeline, [example.caption for example in examples])
        tensors = {name: value.cpu().contiguous() for name, value in vars(captions).items() if value is not None}
        about = {"source": digest, "skipped": json.dumps(skipped)}
        with replacing_file(cache) as partial:
            save_file({"latents": torch.cat(latents).contiguous(), **tensors}, partial, metadata=about)
    with safe_open(cache, "pt") as stored:
        about = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if about["source"] != digest:
        raise AsdmError(f"{cache}: prepared from other data than {data}; use another output folder")
    latents = tensors.pop("latents")
    empty_caption = embed_prompts(pipeline, [""]).to("cpu")
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        empty_caption = empty_caption.without_text()
    return TrainingSet(latents, Conditioning(**tensors), empty_caption, json.loads(about["skipped"]))


def _digest(source: Data, size: int) -> str:
    rows = [[example.path.name, example.caption] for example in source.examples]
    return hashlib.sha256(json.dumps([size, rows]).encode()).hexdigest()[:16]
