"""What a UNet call needs beside the noisy latents, for any Stable Diffusion pipeline: prompts to tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from asdm import checks
from asdm.diffusion.kinds import is_sdxl
from asdm.errors import AsdmError

PIPELINES_MULTIPLE = 8  # of diffusers' Stable Diffusion pipelines, whatever the VAE's factor
LARGEST_IMAGE = 8192  # pixels a side


@dataclass(frozen=True)
class Conditioning:
    """Prompts as a UNet reads them.

    `encoder_hidden_states` (prompts, tokens, channels); for SDXL also `text_embeds` (prompts, channels)
    and `time_ids` (prompts, 6); for inpainting UNets `masked` (prompts, 1 + 4, h, w), the mask and the latents of what
    it leaves, which go in behind the noisy latents; for UNets that embed the guidance scale `timestep_cond` (prompts,
    channels), as `guidance_embedding` makes it.
    """

    encoder_hidden_states: Tensor
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    masked: Tensor | None = None
    timestep_cond: Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def __getitem__(self, index: Any) -> Conditioning:
        return self._map(lambda tensor: tensor[index])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def unet_arguments(self, latents: Tensor) -> dict[str, Any]:
        """Keyword arguments of `UNet2DConditionModel.forward` for noisy `latents` (prompts, 4, h, w)."""
        sample = latents if self.masked is None else torch.cat([latents, self.masked.to(latents)], dim=1)
        arguments: dict[str, Any] = {"sample": sample, "encoder_hidden_states": self.encoder_hidden_states}
        if self.text_embeds is not None:
            arguments["added_cond_kwargs"] = {"text_embeds": self.text_embeds, "time_ids": self.time_ids}
        if self.timestep_cond is not None:
            arguments["timestep_cond"] = self.timestep_cond
        return arguments

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """Rows of `self` where `mask` (prompts,) is set, else of `other` (one prompt)."""

        def choose(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            return torch.where(mask.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        return replace(
            self,
            encoder_hidden_states=torch.where(
                mask.view(-1, 1, 1), self.encoder_hidden_states, other.encoder_hidden_states
            ),
            text_embeds=choose(self.text_embeds, other.text_embeds),
            time_ids=choose(self.time_ids, other.time_ids),
        )

    def spliced(self, others: Conditioning, places: Tensor) -> Conditioning:
        """With the tokens of `others` (prompts) from the `places` (prompts,) on."""
        tokens = torch.arange(self.encoder_hidden_states.shape[1], device=places.device)
        behind = (tokens >= places[:, None])[:, :, None]
        hidden = torch.where(behind, others.encoder_hidden_states, self.encoder_hidden_states)
        return replace(self, encoder_hidden_states=hidden)

    def without_text(self) -> Conditioning:
        """What SDXL's guidance takes for an empty prompt: zeros, at the same image size."""
        pooled = None if self.text_embeds is None else torch.zeros_like(self.text_embeds)
        return Conditioning(torch.zeros_like(self.encoder_hidden_states), pooled, self.time_ids)

    def _map(self, function: Any) -> Conditioning:
        return replace(self, **{name: function(value) for name, value in vars(self).items() if value is not None})


@torch.no_grad()
def embed_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
    """Embed prompts with the pipeline's own text encoders, at the pipeline's native image size."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        if is_sdxl(pipeline):
            hidden, _, pooled, _ = pipeline.encode_prompt(
                batch, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            side = image_size(pipeline)
            time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=hidden.dtype, device=hidden.device)
            parts.append(Conditioning(hidden, pooled, time_ids.expand(len(batch), -1)))
        else:
            hidden, _ = pipeline.encode_prompt(batch, pipeline.device, 1, False)
            parts.append(Conditioning(hidden))
    if parts[0].text_embeds is None:
        return Conditioning(torch.cat([part.encoder_hidden_states for part in parts]))
    return Conditioning(
        torch.cat([part.encoder_hidden_states for part in parts]),
        torch.cat([part.text_embeds for part in parts if part.text_embeds is not None]),
        torch.cat([part.time_ids for part in parts if part.time_ids is not None]),
    )


def latent_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """(channels, height, width) of a latent at the pipeline's native image size."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipeline.vae.config.latent_channels, height, width


def masked_latents(pipeline: DiffusionPipeline, images: Tensor, generator: torch.Generator) -> Tensor:
    """What an inpainting UNet reads behind the noisy latents, (images, 1 + 4, h, w): a mask, and the latents of what it
    leaves of `images` (images, 3, height, width) in [-1, 1].

    Every fourth mask covers the whole image, the others a rectangle of at least a quarter of each side.
    """
    images = images.cpu()
    height, width = (side // pipeline.vae_scale_factor for side in images.shape[2:])
    masks = torch.zeros(len(images), 1, height, width)
    for number, mask in enumerate(masks):
        if number % 4 == 3:
            mask.fill_(1)
            continue
        sizes = torch.rand(2, generator=generator) * 0.75 + 0.25
        corner = torch.rand(2, generator=generator) * (1 - sizes)
        top, left = (round(float(at) * side) for at, side in zip(corner, (height, width), strict=True))
        down, across = (max(1, round(float(part) * side)) for part, side in zip(sizes, (height, width), strict=True))
        mask[:, top : top + down, left : left + across] = 1
    left_over = images * (1 - torch.nn.functional.interpolate(masks, size=images.shape[2:], mode="nearest"))
    return torch.cat([masks, encode_images(pipeline.vae, left_over).cpu().float()], dim=1)


def image_size(pipeline: DiffusionPipeline) -> int:
    """The side in pixels of the images that the pipeline was made for."""
    return latent_shape(pipeline)[1] * pipeline.vae_scale_factor


def require_size(pipeline: DiffusionPipeline, size: int) -> None:
    """
    Raises:
        AsdmError: the VAE has no latents for images of so many pixels a side, or the pipeline does not draw them.
    """
    checks.whole(1, LARGEST_IMAGE)("size", size)
    multiple = math.lcm(PIPELINES_MULTIPLE, pipeline.vae_scale_factor)
    if size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise AsdmError(f"size={size}: must be a positive multiple of {multiple}; the nearest is {nearest}")


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Latents (images, 4, h, w), the posterior's means scaled as the UNet expects them, of `images`
    (images, 3, height, width) in [-1, 1]; as many at a time as make a 512x512 pixel image."""
    at_once = max(1, 512 * 512 // images.shape[2:].numel())
    latents = []
    with _without_overflow(vae):
        for batch in images.split(at_once):
            posterior = vae.encode(batch.to(vae.device, vae.dtype))
            latents.append(posterior.latents if hasattr(posterior, "latents") else posterior.latent_dist.mode())
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (torch.cat(latents) - shift) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images (batch, 3, height, width) in about [-1, 1] of `latents` (batch, 4, h, w); as many at a time as make a
    512x512 pixel image."""
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    at_once = max(1, 64 * 64 // latents.shape[2:].numel())
    with _without_overflow(vae):
        scaled = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + shift
        return torch.cat([vae.decode(batch).sample for batch in scaled.split(at_once)])


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """In float32, where a VAE's activations are known to be too large for half precision: SDXL's."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)


def noise_schedule(pipeline: DiffusionPipeline) -> DDPMScheduler:
    """The forward process that the pipeline's scheduler assumes: adds noise, makes training targets.

    Raises:
        AsdmError: it has none that a DDPM has (EDM's, of Playground v2.5).
    """
    if not {"beta_schedule", "trained_betas"} & pipeline.scheduler.config.keys():
        raise AsdmError(
            f"{type(pipeline.scheduler).__name__}: its noise levels are not those of Stable Diffusion's training; use "
            "a checkpoint with a DDPM's schedule"
        )
    return DDPMScheduler.from_config(pipeline.scheduler.config)


TimestepDensity = Literal["uniform", "angle"]


def stratified_timesteps(
    count: int,
    schedule: DDPMScheduler,
    generator: torch.Generator,
    density: TimestepDensity = "uniform",
    above: float = 0.0,
) -> Tensor:
    """Training time steps (count,), one at random from each of `count` equal parts, in random order: the
    loss varies less from batch to batch than with independent draws; none from below the part `above` of the schedule.

    The parts are equal in time, or in the angle whose cosine is the signal's share of the noisy latents: the sampled
    latents are the integral of the v-prediction over that (arXiv 2202.00512, App. D), and so is their error.
    """
    total = schedule.config.num_train_timesteps
    parts = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    first = int(above * total)
    if density == "angle":
        angles = schedule.alphas_cumprod.cpu().sqrt().acos()  # adding noise moves the schedule to the latents' device
        least = angles[first] if first else 0.0
        return torch.searchsorted(angles, least + parts * (angles[-1] - least)).clamp(max=total - 1)
    return (first + parts * (total - first)).long().clamp(max=total - 1)


def predicted_original(schedule: DDPMScheduler, noise_pred: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The x0 estimate (batch, 4, h, w) of a prediction at `timesteps` (batch,)
    (v-prediction: arXiv 2202.00512, App. D)."""
    alphas = schedule.alphas_cumprod.to(noisy.device)[timesteps].to(noisy.dtype).view(-1, 1, 1, 1)
    kind = schedule.config.prediction_type
    if kind == "v_prediction":
        return alphas.sqrt() * noisy - (1 - alphas).sqrt() * noise_pred
    return (noisy - (1 - alphas).sqrt() * noise_pred) / alphas.sqrt() if kind == "epsilon" else noise_pred


def prediction_target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is trained to predict (batch, 4, h, w): the noise, the velocity or the sample."""
    kind = schedule.config.prediction_type
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise if kind == "epsilon" else latents
