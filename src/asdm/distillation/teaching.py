"""A student beside its frozen teacher, and the noised batches that both see: what the tasks of all stages share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from asdm.data.prepared import PreparedData
from asdm.diffusion.conditioning import Conditioning, prediction_target, stratified_timesteps
from asdm.distillation.incubation import set_trainable
from asdm.distillation.losses import weighted_sum
from asdm.distillation.stages import Stage
from asdm.families.unet_calls import guidance_embedding
from asdm.training.loop import BatchSlice, TrainingTask


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: prepared latents and captions, and the empty caption's embedding."""

    prepared: PreparedData
    empty_caption: Conditioning

    def __len__(self) -> int:
        return len(self.prepared)

    @property
    def skipped(self) -> dict[str, str]:
        """What of the data could not be used, by name, with the reason."""
        return self.prepared.skipped


Batch = tuple[Tensor, int]  # indices (batch,) into the training set, and the step
WHOLE = BatchSlice()
GUIDANCE_SCALES = (3.0, 15.0)  # that embeddings are trained for: 2 to 14 as LCM counts them (arXiv 2310.04378, Sec. 5)


@dataclass(frozen=True)
class Noised:
    """A batch as both networks see it: latents `noisy` (batch, 4, h, w) at `timesteps` (batch,), their captions, and
    the denoising `target`."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    captions: Conditioning


class TeachingTask(TrainingTask):
    """A student beside its frozen teacher, and the batches that both see."""

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        schedule: DDPMScheduler,
        examples: TrainingSet,
        stage: Stage,
    ):
        super().__init__()
        set_trainable(student, stage.trained)
        if stage.checkpointing:
            student.enable_gradient_checkpointing()
        else:
            student.disable_gradient_checkpointing()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student
        self.schedule, self.examples, self.stage = schedule, examples, stage

    def train(self, mode: bool = True) -> TeachingTask:
        super().train(mode)
        self.teacher.eval()
        return self

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """At which time steps (count,) a step's batch is noised."""
        stage = self.stage
        return stratified_timesteps(count, self.schedule, generator, stage.timesteps, stage.min_timestep_fraction)

    def noised(self, indices: Tensor, generator: torch.Generator, part: BatchSlice) -> Noised:
        """A part of a step's batch; what is drawn for the step does not depend on how it is parted."""
        device, count = self.student.device, len(indices)
        chosen = part.of(count)
        latents, captions = self.examples.prepared.batch(indices[chosen])
        latents = latents.to(device)
        if self.stage.caption_mixing:
            order = torch.randperm(count, generator=generator)
            # Those of the same batch; a part of it has to read what others have.
            others = captions[order] if part.count == 1 else self.examples.prepared.batch(indices[order][chosen])[1]
            places = self._splices(count, captions.encoder_hidden_states.shape[1], generator)
            captions = captions.spliced(others, places[chosen])
        kept = torch.rand(count, generator=generator) >= self.stage.caption_dropout
        captions = captions.where(kept[chosen], self.examples.empty_caption)
        timesteps = self.timesteps(count, generator)[chosen].to(device)
        noise = torch.randn(count, *latents.shape[1:], generator=generator)[chosen].to(latents)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = prediction_target(self.schedule, latents, noise, timesteps)
        if self.embeds_guidance:
            embedding = guidance_embedding(self.teacher, self._guidance_scales(count, generator))
            captions = replace(captions.to(device), timestep_cond=None if embedding is None else embedding[chosen])
        return Noised(noisy, timesteps, target, captions.to(device, torch.float32))

    @property
    def embeds_guidance(self) -> bool:
        """Whether both networks are told the guidance scale, and predict what is guided (LCM's)."""
        return self.teacher.config.time_cond_proj_dim is not None

    def _guidance_scales(self, count: int, generator: torch.Generator) -> Tensor:
        """The scales (count,) that networks which embed them are told: the stage's, or some of all that are in use."""
        if self.stage.guidance_scale is not None:
            return torch.full((count,), self.stage.guidance_scale)
        least, most = GUIDANCE_SCALES
        return least + (most - least) * torch.rand(count, generator=generator)

    def _splices(self, count: int, tokens: int, generator: torch.Generator) -> Tensor:
        """From which token (count,) on each caption is another's; behind the last where it stays whole."""
        places = torch.randint(1, tokens, (count,), generator=generator)
        return torch.where(torch.rand(count, generator=generator) < self.stage.caption_mixing, places, tokens)

    def teacher_pred(self, noised: Noised) -> Tensor:
        dtype = self.teacher.dtype
        arguments = noised.captions.to(dtype).unet_arguments(noised.noisy.to(dtype))
        return self.teacher(timestep=noised.timesteps, **arguments, return_dict=False)[0]

    def student_pred(self, noised: Noised) -> Tensor:
        arguments = noised.captions.unet_arguments(noised.noisy)
        return self.student(timestep=noised.timesteps, **arguments, return_dict=False)[0]

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the total, and each term as it counts in it."""
        weights = self.stage.losses.model_dump()
        by_weight = {f"weighted/{name}": weights[name] * value for name, value in losses.items() if weights.get(name)}
        return {"loss": weighted_sum(losses, weights), **losses, **by_weight}
