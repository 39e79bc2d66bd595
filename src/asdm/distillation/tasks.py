"""The tasks of a distillation's stages: the whole student beside its teacher, or its edited blocks each alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.diffusion.generation import default_guidance
from asdm.diffusion.parameterization import Parameterization, parameterization_of
from asdm.distillation.caption_only import CaptionSampler, make_caption_sampler, trajectory
from asdm.distillation.consistency import ConsistencyTask
from asdm.distillation.incubation import block_error, calls_of, chosen_blocks, incubated_blocks, parts_of
from asdm.distillation.losses import (
    CaptionComparison,
    Comparison,
    SemanticFeatures,
    feature_losses,
    losses_of,
    relative_error,
    squared_error,
)
from asdm.distillation.semantics import SemanticEncoder, make_encoder
from asdm.distillation.stages import Stage
from asdm.distillation.teaching import WHOLE, Batch, Noised, TeachingTask
from asdm.distillation.training_set import TrainingSet
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_of, family_of
from asdm.measure.hooks import outputs_of
from asdm.training.task import BatchSlice, TrainingTask


def make_task(
    teacher: DiffusionPipeline,
    student: Denoiser,
    examples: TrainingSet,
    stage: Stage,
    share: BatchSlice = WHOLE,
    encoder: SemanticEncoder | None = None,
) -> TrainingTask:
    """Make what the loop trains in a stage.

    Args:
        share: of the incubated blocks.
        encoder: in the place of the one that the stage names.

    Raises:
        AsdmError: the stage requires what this student, this teacher or this machine has not.
    """
    denoiser, parameterization = denoiser_of(teacher), parameterization_of(teacher.scheduler)
    if stage.scope == "incubate":
        return IncubationTask(denoiser, student, parameterization, examples, stage, share)
    if stage.scope == "consistency":
        scale = default_guidance(teacher) if stage.guidance_scale is None else stage.guidance_scale
        return ConsistencyTask(denoiser, student, parameterization, examples, stage, scale)
    encoder, captions = semantic_parts(teacher, stage, examples, encoder)
    return DistillationTask(denoiser, student, parameterization, examples, stage, encoder, captions)


def semantic_parts(
    teacher: DiffusionPipeline, stage: Stage, examples: TrainingSet, encoder: SemanticEncoder | None = None
) -> tuple[SemanticEncoder | None, CaptionSampler | None]:
    """Return the encoder, or this one in its place, and the source of captions without images that a joint stage's
    losses read; None where none does.

    Raises:
        AsdmError: the stage requires what this teacher has not.
    """
    sampler = None
    if not stage.losses.any_reads("semantics", "caption_semantics"):
        encoder = None
    elif encoder is None:
        encoder = _encoder_of(stage, teacher)
    if stage.losses.any_reads("captions", "caption_semantics"):
        sampler = make_caption_sampler(teacher, stage, examples.prepared.captions)
    return encoder, sampler


def _encoder_of(stage: Stage, teacher: DiffusionPipeline) -> SemanticEncoder:
    """Make the encoder that a stage names; it has a text tower where a loss reads one."""
    semantics, weights = stage.semantics, stage.losses.model_dump()
    reading = next((name for name in ("semantic_text", "caption_text") if weights[name]), None)
    encoder = make_encoder(semantics.encoder, teacher, semantics.decoder, reads_captions=reading is not None)
    if reading is not None and encoder.text_features([""]) is None:
        raise AsdmError(
            f"{reading}={weights[reading]:g}: the encoder {semantics.encoder} has no text tower; choose clip, or give "
            "it no weight"
        )
    return encoder


class DistillationTask(TeachingTask):
    """The loss terms of a student that sees what its teacher sees.

    The teacher runs without gradient, once for each batch, and both read the same embeddings.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        parameterization: Parameterization,
        examples: TrainingSet,
        stage: Stage,
        encoder: SemanticEncoder | None = None,
        caption_sampler: CaptionSampler | None = None,
    ):
        super().__init__(teacher, student, parameterization, examples, stage)
        self.blocks = family_of(student).blocks(student)
        self.teacher_blocks = {block: family_of(student).teacher_key(block, student, teacher) for block in self.blocks}
        # Weights have a mean of 1 over the sampled time steps: in each batch, a single sample's would cancel out.
        sampled = self.timesteps(parameterization.num_timesteps, torch.Generator().manual_seed(0))
        self.mean_signal_power = parameterization.signal_power(sampled).mean()
        self.mean_snr_weight: Tensor | None = None
        if stage.min_snr_gamma is not None:
            self.mean_snr_weight = parameterization.min_snr_weights(sampled, stage.min_snr_gamma).mean()
        self.encoder, self.caption_sampler = encoder, caption_sampler
        self.text_features: Tensor | None = None
        if encoder is not None and stage.losses.semantic_text:
            self.text_features = encoder.text_features(examples.prepared.captions)

    def forward(self, batch: Batch, generator: torch.Generator, part: BatchSlice = WHOLE) -> dict[str, Tensor]:
        """The losses of a part of the batch: the total, each term, and the features of each block."""
        indices, step = batch
        noised = self.noised(indices, generator, part)
        comparison = self._compare(noised, indices[part.of(len(indices))], step)
        if self.caption_sampler is not None and step % self.stage.semantics.every == 0:
            on_captions = partial(self._compare_on_captions, self.caption_sampler, len(indices), part, generator)
            comparison = replace(
                comparison,
                captions=cache(on_captions),
                has_caption_semantics=self.encoder is not None,
                has_caption_text=self.encoder is not None and self.stage.losses.caption_text > 0,
            )
        by_block = {f"feature/{name}": value for name, value in comparison.by_block.items()}
        return {**self.weighted(losses_of(comparison)), **by_block}

    def snr_weights(self, timesteps: Tensor) -> Tensor | None:
        """Min-SNR weights (batch,) with a mean of 1; None where all time steps count alike."""
        if self.stage.min_snr_gamma is None or self.mean_snr_weight is None:
            return None
        weights = self.parameterization.min_snr_weights(timesteps, self.stage.min_snr_gamma)
        return weights / self.mean_snr_weight.to(weights.device)

    def _compare(self, noised: Noised, indices: Tensor, step: int) -> Comparison:
        """Run both networks on a batch of the images `indices`."""
        stage = self.stage
        teacher_pred, expected = self._teacher_answers(noised)
        with outputs_of(self.student, self.blocks) as student_outputs:
            noise_pred = self.student_pred(noised)
        family = family_of(self.student)
        features = {
            name: family.block_io(self.student, name).image_states(output) for name, output in student_outputs.items()
        }
        has_semantics = stage.losses.any_reads("semantics") and step % stage.semantics.every == 0
        texts = None if self.text_features is None else self.text_features[indices]
        look = partial(self._semantic_features, noised, noise_pred, teacher_pred, texts)
        return Comparison(
            noise_pred=noise_pred,
            teacher_pred=teacher_pred,
            target=noised.target,
            weights=self.snr_weights(noised.timesteps),
            student_features=features,
            teacher_features=expected,
            by_block=feature_losses(features, expected, stage.relative),
            guided_predictions=cache(partial(self._guided_predictions, noised, noise_pred, teacher_pred)),
            semantic_features=cache(look) if has_semantics else None,
            relative=stage.relative,
            feature_weighting=stage.feature_weighting,
        )

    @torch.no_grad()
    def _teacher_answers(self, noised: Noised) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the teacher's prediction, and its blocks' features by the student's names."""
        if noised.recorded is not None:
            recorded = noised.recorded
            return recorded.prediction, {name: recorded.features(block) for name, block in self.teacher_blocks.items()}
        family = family_of(self.teacher)
        with outputs_of(self.teacher, list(self.teacher_blocks.values())) as outputs:
            teacher_pred = self.teacher_pred(noised)
        return teacher_pred, {
            name: family.block_io(self.teacher, block).image_states(outputs[block])
            for name, block in self.teacher_blocks.items()
        }

    def _guided_predictions(self, noised: Noised, noise_pred: Tensor, teacher_pred: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's predictions, or the guided ones (arXiv 2207.12598, Eq. 6), whose
        unconditional branch runs here."""
        scale = self.stage.guidance_scale
        if scale is None or self.embeds_guidance:  # recorded answers have no scale
            return noise_pred, teacher_pred
        empty = self.examples.empty_caption[[0] * len(noised.noisy)].to(noised.noisy.device, torch.float32)
        without = replace(noised, captions=replace(empty, masked=noised.captions.masked))
        with torch.no_grad():
            unconditional = self.teacher_pred(without)
        teacher_pred = unconditional + scale * (teacher_pred - unconditional)
        own = self.student_pred(without)
        return own + scale * (noise_pred - own), teacher_pred

    def _semantic_features(
        self, noised: Noised, noise_pred: Tensor, teacher_pred: Tensor, texts: Tensor | None
    ) -> SemanticFeatures:
        """Return what the x_0 estimates mean; those at high noise mean little, and weigh by the signal's power. Beside
        their captions' features `texts` (batch, channels) count those alone that the networks read."""
        assert self.encoder is not None
        mine, theirs = (
            self.parameterization.to_x0(pred.float(), noised.noisy, noised.timesteps)
            for pred in (noise_pred, teacher_pred)
        )
        features = self.encoder(mine, noised.captions)
        with torch.no_grad():
            expected = self.encoder(theirs, noised.captions)
        power = self.parameterization.signal_power(noised.timesteps)
        weights = power / self.mean_signal_power.to(power.device)
        texts = None if texts is None else texts.to(features)
        is_own = noised.has_own_caption
        return SemanticFeatures(features, expected, texts, weights, weights if is_own is None else weights * is_own)

    def _compare_on_captions(
        self, source: CaptionSampler, count: int, part: BatchSlice, generator: torch.Generator
    ) -> CaptionComparison | None:
        """Run both networks on this part's captions without an image; None where it has none."""
        here, rows = range(count)[part.of(count)], self.stage.caption_rows(count, part)
        if not rows:
            return None
        texts = source.texts(count, generator)
        texts = [texts[row] for row in rows]
        noised = self._noised_captions(source, texts, rows, count, generator)
        with torch.no_grad():
            teacher_pred = self.teacher_pred(noised)
        noise_pred = self.student_pred(noised)
        reading = self.encoder if self.stage.losses.caption_text else None
        expected = None if reading is None else reading.text_features(texts)
        features = cache(partial(self._semantic_features, noised, noise_pred, teacher_pred, expected))
        share = len(rows) / len(here) / (len(self.stage.caption_rows(count)) / count)
        return CaptionComparison(noise_pred, teacher_pred, self.snr_weights(noised.timesteps), share, features)

    def _noised_captions(
        self, source: CaptionSampler, texts: list[str], rows: list[int], count: int, generator: torch.Generator
    ) -> Noised:
        """Return captions `texts` without an image at the noisy latents that the teacher comes to with them.

        Random numbers are those of the whole batch of `count`; `rows` are the captions' places in it.
        """
        device, steps = self.student.device, self.stage.caption_only.sampling_steps
        timesteps = self.timesteps(count, generator)[rows].to(device)
        if not steps:
            timesteps = torch.full_like(timesteps, self.parameterization.num_timesteps - 1)
        shape = family_of(self.teacher).sample_shape(self.teacher)
        noise = torch.randn(count, *shape, generator=generator)[rows].to(device)
        captions = source.embed(texts).to(device, torch.float32)
        if self.embeds_guidance:
            scales = torch.full((len(texts),), source.guidance_scale)
            captions = replace(captions, timestep_cond=family_of(self.teacher).guidance_embedding(self.teacher, scales))
        noised = Noised(noise, timesteps, noise, captions)  # there is no denoising target

        def predict(noisy: Tensor, here: Tensor) -> Tensor:
            return self.guided_teacher_pred(replace(noised, noisy=noisy, timesteps=here), source.guidance_scale)

        return replace(noised, noisy=trajectory(self.parameterization, predict, noise, timesteps, steps))


class IncubationTask(TeachingTask):
    """Each edited block of the student alone: on what enters the teacher's block, to what leaves it.

    One teacher forward feeds all of them, and no block sees another's gradient (Deep Incubation, arXiv 2212.04129).
    Of a launch of several processes, each has its share of the blocks.

    Raises:
        AsdmError: the student has no edited block.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        parameterization: Parameterization,
        examples: TrainingSet,
        stage: Stage,
        share: BatchSlice = WHOLE,
    ):
        super().__init__(teacher, student, parameterization, examples, stage)
        if not incubated_blocks(student):
            raise AsdmError(f"stage {stage.name}: nothing to incubate in this student; leave the stage out")
        self.blocks = chosen_blocks(stage, student)[share.index :: share.count]
        incubated = {id(p) for name in self.blocks for p in student.get_submodule(name).parameters()}
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in incubated)
        # A removed block has nothing that could learn.
        self.blocks = [
            name for name in self.blocks if any(p.requires_grad for p in student.get_submodule(name).parameters())
        ]
        self.error: Callable[[Tensor, Tensor], Tensor] = relative_error if stage.relative else squared_error
        if stage.teacher == "recorded":  # then nothing but the blocks is needed on the device
            self.student = parts_of(student, self.blocks)

    def forward(self, batch: Batch, generator: torch.Generator, part: BatchSlice = WHOLE) -> dict[str, Tensor]:
        """The error of each block, and their sum."""
        noised = self.noised(batch[0], generator, part)
        calls = self._teacher_calls(noised)
        losses = {}
        for name in self.blocks:
            args, kwargs, expected = convert_to_fp32(calls.pop(name))
            output = self.student.get_submodule(name)(*args, **kwargs)
            losses[f"block/{name}"] = block_error(output, expected, self.error)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def _teacher_calls(self, noised: Noised) -> dict[str, tuple[Any, Any, Any]]:
        """Return the teacher's calls of the blocks: (args, kwargs, output)."""
        if noised.recorded is not None:
            return {name: noised.recorded.call(name) for name in self.blocks}
        with calls_of(self.teacher, self.blocks) as calls:
            self.teacher_pred(noised)
        return calls
