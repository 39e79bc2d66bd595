"""What a tiny decoder learns from a pipeline's VAE.

Teacher and student decode the same latents. The student's images are compared with the teacher's as pixels, and as the
teacher's own encoder sees them. The student's encoder learns the latents that the teacher's finds for those images. No
term is adversarial.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import Tensor, nn

from asdm.diffusion.conditioning import decode_latents, encode_images
from asdm.distillation.decoder_recipe import DecoderRecipe
from asdm.distillation.losses import relative_error, squared_error, weighted_sum
from asdm.measure.hooks import outputs_of
from asdm.training.task import BatchSlice, TrainingTask

ABSOLUTE = 0.1  # weight of the absolute error of pixels beside the squared one
REMEMBERED = 1 << 30  # bytes of the teacher's answers that stay in memory


@dataclass(frozen=True)
class DecoderBatch:
    """Latents (batch, channels, h, w) as the denoiser makes them, which of the data they are (batch,), and the step."""

    latents: Tensor
    indices: Tensor
    step: int


class DecoderTask(TrainingTask):
    """A tiny decoder beside the pipeline's VAE, which stays as it is.

    The logged terms are `pixels`, the squared error of values in [-1, 1] and a tenth of the absolute one; `features`,
    the mean over the levels of the VAE's encoder of the squared error relative to the mean square of the teacher's
    features; `encoder`, the squared error of latents. The last two are not computed at every step.
    """

    def __init__(self, pipeline: DiffusionPipeline, tiny: AutoencoderTiny, recipe: DecoderRecipe):
        super().__init__()
        self.tiny, self.recipe = tiny.requires_grad_(True), recipe
        self._teacher = _Teacher(pipeline)

    def forward(
        self, batch: DecoderBatch, generator: torch.Generator, part: BatchSlice | None = None
    ) -> dict[str, Tensor]:
        recipe, teacher = self.recipe, self._teacher
        chosen = _chosen(batch, recipe.crop, generator, (part or BatchSlice()))
        with_encoder = batch.step % recipe.encoder_every == 0
        with _in_full_precision(teacher.device):
            images, target = teacher.answers(chosen, with_encoder)
        decoded = self.tiny.decode(chosen.latents.to(teacher.device)).sample.float()
        losses = {"pixels": squared_error(decoded, images) + ABSOLUTE * (decoded - images).abs().mean()}
        if recipe.features and batch.step % recipe.features_every == 0:
            with _in_full_precision(teacher.device):
                losses["features"] = teacher.feature_error(decoded.clamp(-1, 1), images)
        if with_encoder:
            losses["encoder"] = squared_error(self.tiny.encode(images).latents, target)
        weights = {name: getattr(recipe, name) for name in losses}
        return {"loss": weighted_sum(losses, weights), **losses}


@dataclass(frozen=True)
class _Chosen:
    """Latents as a step trains on them, and by what each is known again, where it is a whole one."""

    latents: Tensor
    keys: list[tuple[int, bool]] | None


def _chosen(batch: DecoderBatch, side: int, generator: torch.Generator, part: BatchSlice) -> _Chosen:
    """Return a part of the batch: one square of all latents, of at most this side; each is mirrored with a probability
    of 1/2."""
    latents = batch.latents
    height, width = latents.shape[2:]
    top, left = (int(torch.randint(max(1, size - side + 1), (), generator=generator)) for size in (height, width))
    mirrored = torch.rand(len(latents), generator=generator) < 0.5
    rows = part.of(len(latents))
    latents, mirrored, indices = (each[rows] for each in (latents, mirrored, batch.indices))
    latents = latents[:, :, top : top + side, left : left + side]
    latents = torch.where(mirrored[:, None, None, None], latents.flip(3), latents)
    is_whole = side >= max(height, width)
    return _Chosen(latents, list(zip(indices.tolist(), mirrored.tolist(), strict=True)) if is_whole else None)


class _Teacher:
    """The pipeline's VAE. What it says of whole latents is remembered, as epochs repeat them; each is decoded alone, so
    that a resumed training reads the same answers."""

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self.vae: Any = pipeline.vae
        self.device: torch.device = self.vae.device
        self.levels = encoder_levels(self.vae)
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def answers(self, chosen: _Chosen, with_encoder: bool) -> tuple[Tensor, Tensor]:
        """Return the images (batch, 3, height, width) of latents, and if requested the latents that the encoder finds
        for them."""
        if chosen.keys is None:
            return self._answer(chosen.latents, with_encoder)
        answers = [
            self._known.get(key) or self._remember(key, self._answer(latents[None], True))
            for key, latents in zip(chosen.keys, chosen.latents, strict=True)
        ]
        images, latents = (torch.cat(parts).to(self.device).float() for parts in zip(*answers, strict=True))
        return images, latents

    def feature_error(self, images: Tensor, expected: Tensor) -> Tensor:
        """Return the mean over the levels of the relative error of the encoder's features."""
        with torch.no_grad():
            wanted = self._features(expected)
        found = self._features(images)
        return torch.stack([relative_error(found[name], wanted[name]) for name in self.levels]).mean()

    @torch.no_grad()
    def _answer(self, latents: Tensor, with_encoder: bool) -> tuple[Tensor, Tensor]:
        images = decode_latents(self.pipeline, latents).float().clamp(-1, 1)
        return images, encode_images(self.vae, images).float() if with_encoder else images.new_empty(0)

    def _remember(self, key: tuple[int, bool], answer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, latents = answer
        kept = images.to("cpu", torch.float16), latents.cpu()
        size = sum(each.numel() * each.element_size() for each in kept)
        if self._bytes + size <= REMEMBERED:
            self._known[key] = kept
            self._bytes += size
        return kept

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        with outputs_of(self.vae.encoder, self.levels) as features:
            self.vae.encoder(images.to(self.vae.dtype))
        return dict(features)


def encoder_levels(vae: Any) -> list[str]:
    """Return the names of the levels of a VAE's encoder: what it keeps in lists. A VAE of another kind has none."""
    encoder = getattr(vae, "encoder", None)
    children = () if encoder is None else encoder.named_children()
    lists = ((name, child) for name, child in children if isinstance(child, nn.ModuleList))
    return [f"{name}.{index}" for name, child in lists for index in range(len(child))]


@contextmanager
def _in_full_precision(device: torch.device) -> Iterator[None]:
    """Compute what the teacher says in its own precision, whatever the student's is."""
    with torch.autocast(device.type, enabled=False):
        yield
