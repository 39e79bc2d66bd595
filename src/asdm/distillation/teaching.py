"""A student beside its frozen teacher, and the noised batches that both see: what the tasks of all stages share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from asdm.diffusion.conditioning import Conditioning, predict
from asdm.diffusion.parameterization import Parameterization
from asdm.distillation.incubation import set_trainable
from asdm.distillation.losses import weighted_sum
from asdm.distillation.recorded import RecordedBatch
from asdm.distillation.stages import Stage
from asdm.distillation.training_set import TrainingSet
from asdm.families import Denoiser, family_of
from asdm.training.task import BatchSlice, TrainingTask

Batch = tuple[Tensor, int]  # indices (batch,) into the training set, and the step
WHOLE = BatchSlice()
GUIDANCE_SCALES = (3.0, 15.0)  # that embeddings are trained for: 2 to 14 as LCM counts them (arXiv 2310.04378, Sec. 5)


@dataclass(frozen=True)
class Noised:
    """A batch as both networks see it: latents `noisy` (batch, channels, h, w) at `timesteps` (batch,), their captions,
    and the denoising `target`; `has_own_caption` (batch,) says whose caption is the image's, neither left out nor
    mixed; None: all. `recorded` is what the teacher answered, where that was recorded."""

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    captions: Conditioning
    has_own_caption: Tensor | None = None
    recorded: RecordedBatch | None = None

    @classmethod
    def of(cls, batch: RecordedBatch) -> Noised:
        """Return recorded draws."""
        noisy, timesteps, target = (batch.tensor(name) for name in ("noisy", "timesteps", "target"))
        return cls(noisy, timesteps, target, batch.captions, recorded=batch)


class TeachingTask(TrainingTask):
    """A student beside its frozen teacher, and the batches that both see.

    Where the stage reads recorded answers, the teacher is no part of the task, and a batch's indices number draws.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        parameterization: Parameterization,
        examples: TrainingSet,
        stage: Stage,
    ):
        super().__init__()
        set_trainable(student, stage.trained)
        if stage.checkpointing:
            student.enable_gradient_checkpointing()
        else:
            student.disable_gradient_checkpointing()
        teacher.eval().requires_grad_(False)
        self.teacher: Any = None if stage.teacher == "recorded" else teacher
        self.student: Any = student
        self.parameterization, self.examples, self.stage = parameterization, examples, stage

    def train(self, mode: bool = True) -> TeachingTask:
        """Switch the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the time steps (count,) at which a step's batch is noised."""
        stage = self.stage
        return self.parameterization.sample_timesteps(
            count, generator, stage.timestep_sampling, stage.min_timestep_fraction
        )

    def noised(self, indices: Tensor, generator: torch.Generator, part: BatchSlice) -> Noised:
        """Add noise to this part of the images `indices` (batch,), or read this part of the draws `indices`.

        Random numbers are those of the whole batch, so that parts of it together are the whole.
        """
        device, count = next(self.student.parameters()).device, len(indices)
        chosen = part.of(count)
        if self.stage.teacher == "recorded":
            assert self.examples.recorded is not None
            return Noised.of(self.examples.recorded.batch(indices[chosen], device))
        latents, captions = self.examples.prepared.batch(indices[chosen])
        latents = latents.to(device)
        is_mixed = torch.zeros(len(captions), dtype=torch.bool)
        if self.stage.caption_mixing:
            captions, is_mixed = self._mixed(captions, indices, generator, part)
        kept = torch.rand(count, generator=generator) >= self.stage.caption_dropout
        captions = captions.where(kept[chosen], self.examples.empty_caption)
        timesteps = self.timesteps(count, generator)[chosen].to(device)
        noise = torch.randn(count, *latents.shape[1:], generator=generator)[chosen].to(latents)
        noisy = self.parameterization.add_noise(latents, noise, timesteps)
        target = self.parameterization.target(latents, noise, timesteps)
        if self.embeds_guidance:
            scales = self._guidance_scales(count, generator)
            embedding = family_of(self.teacher).guidance_embedding(self.teacher, scales)
            captions = replace(captions.to(device), timestep_cond=None if embedding is None else embedding[chosen])
        has_own_caption = (kept[chosen] & ~is_mixed).to(device)
        return Noised(noisy, timesteps, target, captions.to(device, torch.float32), has_own_caption=has_own_caption)

    @property
    def embeds_guidance(self) -> bool:
        """Whether both networks read the guidance scale, and predict what is guided (LCM's)."""
        return family_of(self.teacher).embeds_guidance(self.teacher)

    def teacher_pred(self, noised: Noised) -> Tensor:
        """Return the teacher's prediction (batch, channels, h, w), in its own dtype."""
        dtype = self.teacher.dtype
        return predict(self.teacher, noised.noisy.to(dtype), noised.timesteps, noised.captions.to(dtype))

    def student_pred(self, noised: Noised) -> Tensor:
        """Return the student's prediction (batch, channels, h, w)."""
        return predict(self.student, noised.noisy, noised.timesteps, noised.captions)

    @torch.no_grad()
    def guided_teacher_pred(self, noised: Noised, scale: float) -> Tensor:
        """Return the teacher's guided prediction (batch, channels, h, w), both branches in one call; one that embeds
        the scale needs no second branch."""
        if self.embeds_guidance:
            return self.teacher_pred(noised).float()
        count = len(noised.noisy)
        rows = torch.arange(count, device=noised.noisy.device).repeat(2)
        with_text = torch.arange(2 * count, device=rows.device) < count
        empty = self.examples.empty_caption.to(rows.device, torch.float32)
        both = replace(
            noised,
            noisy=noised.noisy[rows],
            timesteps=noised.timesteps[rows],
            captions=noised.captions[rows].where(with_text, empty),
        )
        conditional, unconditional = self.teacher_pred(both).float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the total, and each term as it counts in it."""
        weights = self.stage.losses.model_dump()
        by_weight = {f"weighted/{name}": weights[name] * value for name, value in losses.items() if weights.get(name)}
        return {"loss": weighted_sum(losses, weights), **losses, **by_weight}

    def _mixed(
        self, captions: Conditioning, indices: Tensor, generator: torch.Generator, part: BatchSlice
    ) -> tuple[Conditioning, Tensor]:
        """Captions of which some are another one's of the batch from a token on; and which (part of the batch,) are.

        Where captions are padded without meaning, both have tokens that count at this place.
        """
        count, chosen = len(indices), part.of(len(indices))
        order = torch.randperm(count, generator=generator)
        # A part of the batch has to read what other parts have.
        others = captions[order] if part.count == 1 else self.examples.prepared.batch(indices[order][chosen])[1]
        tokens = captions.encoder_hidden_states.shape[1]
        places = torch.randint(1, tokens, (count,), generator=generator)[chosen]
        is_mixed = (torch.rand(count, generator=generator) < self.stage.caption_mixing)[chosen]
        if captions.encoder_attention_mask is None or others.encoder_attention_mask is None:
            return captions.mixed_with(others, torch.where(is_mixed, places, tokens)), is_mixed
        least = torch.minimum(captions.encoder_attention_mask.sum(1), others.encoder_attention_mask.sum(1)).long()
        places = 1 + (places - 1) * (least - 1) // (tokens - 1)
        mixed = captions.mixed_with(others, torch.where(is_mixed & (least > 1), places, tokens))
        return mixed, (mixed.encoder_hidden_states != captions.encoder_hidden_states).flatten(1).any(1)

    def _guidance_scales(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the scales (count,) that networks which embed them read: the stage's, or random ones of the usual
        range."""
        if self.stage.guidance_scale is not None:
            return torch.full((count,), self.stage.guidance_scale)
        least, most = GUIDANCE_SCALES
        return least + (most - least) * torch.rand(count, generator=generator)
