"""What a denoiser reads beside the noisy latents: prompts to tensors; and images to latents and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm import checks
from asdm.families import Denoiser, denoiser_of, family_of

PIPELINES_MULTIPLE = 8  # of diffusers' Stable Diffusion pipelines, whatever the VAE's factor
LARGEST_IMAGE = 8192  # pixels a side
_OF_PROMPTS = ("encoder_hidden_states", "text_embeds", "time_ids", "encoder_attention_mask")


@dataclass(frozen=True)
class Conditioning:
    """Prompts as a denoiser reads them.

    `encoder_hidden_states` (prompts, tokens, channels); for SDXL also `text_embeds` (prompts, channels) and `time_ids`
    (prompts, 6); for inpainting `masked` (prompts, 1 + 4, h, w), the mask and the latents of what it leaves, which go
    in behind the noisy latents; for denoisers that embed the guidance scale `timestep_cond` (prompts, channels), as
    the family's `guidance_embedding` makes it; where prompts are padded without meaning `encoder_attention_mask`
    (prompts, tokens), 1 for tokens that count.
    """

    encoder_hidden_states: Tensor
    text_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    masked: Tensor | None = None
    timestep_cond: Tensor | None = None
    encoder_attention_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def __getitem__(self, index: Any) -> Conditioning:
        return self._map(lambda tensor: tensor[index])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def denoiser_arguments(self, denoiser: Denoiser, latents: Tensor) -> dict[str, Any]:
        """Keyword arguments of a call of `denoiser` on noisy `latents` (prompts, channels, h, w), but for the time
        step."""
        return family_of(denoiser).conditioned_call(denoiser, latents, **self._fields())

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """Rows of `self` where `mask` (prompts,) is set, else of `other` (one prompt); of what prompts bring."""
        chosen = {}
        for name in _OF_PROMPTS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None:
                chosen[name] = torch.where(mask.view(-1, *[1] * (mine.ndim - 1)), mine, theirs)
        return replace(self, **chosen)

    def mixed_with(self, others: Conditioning, places: Tensor) -> Conditioning:
        """Take the tokens of `others` (prompts) from the `places` (prompts,) on."""
        tokens = torch.arange(self.encoder_hidden_states.shape[1], device=places.device)
        is_behind = tokens >= places[:, None]
        hidden = torch.where(is_behind[:, :, None], others.encoder_hidden_states, self.encoder_hidden_states)
        mixed = replace(self, encoder_hidden_states=hidden)
        if self.encoder_attention_mask is None or others.encoder_attention_mask is None:
            return mixed
        mask = torch.where(is_behind, others.encoder_attention_mask, self.encoder_attention_mask)
        return replace(mixed, encoder_attention_mask=mask)

    def without_text(self) -> Conditioning:
        """Return what SDXL's guidance takes for an empty prompt: zeros, at the same image size."""
        pooled = None if self.text_embeds is None else torch.zeros_like(self.text_embeds)
        return Conditioning(torch.zeros_like(self.encoder_hidden_states), pooled, self.time_ids)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return replace(self, **{name: function(value) for name, value in self._fields().items()})

    def _fields(self) -> dict[str, Tensor]:
        """Return the fields that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@torch.no_grad()
def embed_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
    """Embed prompts with the pipeline's own text encoders, at the pipeline's native image size."""
    family, side = family_of(pipeline), image_size(pipeline)
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    parts = [family.encode_prompts(pipeline, batch, side) for batch in batches]
    return Conditioning(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def latent_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """(channels, height, width) of a latent at the pipeline's native image size."""
    _, height, width = family_of(pipeline).sample_shape(denoiser_of(pipeline))
    return pipeline.vae.config.latent_channels, height, width


def masked_latents(pipeline: DiffusionPipeline, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return what an inpainting denoiser reads behind the noisy latents, (images, 1 + 4, h, w): a mask, and the latents
    of what it leaves of `images` (images, 3, height, width) in [-1, 1].

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
    """Return the side in pixels of the images that the pipeline was made for."""
    return latent_shape(pipeline)[1] * pipeline.vae_scale_factor


def size_multiple(pipeline: DiffusionPipeline) -> int:
    """Return what the sides of a pipeline's images in pixels are multiples of."""
    latent_multiple = family_of(pipeline).size_multiple(denoiser_of(pipeline))
    return math.lcm(PIPELINES_MULTIPLE, pipeline.vae_scale_factor * latent_multiple)


def require_size(pipeline: DiffusionPipeline, size: int, name: str = "size") -> None:
    """
    Raises:
        AsdmError: the VAE has no latents for images of so many pixels a side, or the pipeline does not generate them.
    """
    checks.multiple_of(size_multiple(pipeline), LARGEST_IMAGE)(name, size)


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Return latents (images, 4, h, w), the posterior's means scaled as the denoiser expects them, of `images`
    (images, 3, height, width) in [-1, 1]; as many at a time as make a 512x512 pixel image."""
    at_once = max(1, 512 * 512 // images.shape[2:].numel())
    latents = []
    with _without_overflow(vae):
        for batch in images.split(at_once):
            posterior = vae.encode(batch.to(vae.device, vae.dtype))
            latents.append(posterior.latents if hasattr(posterior, "latents") else posterior.latent_dist.mode())
    return _scaled(vae, torch.cat(latents))


@torch.no_grad()
def decode_latents(pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Return images (batch, 3, height, width) in about [-1, 1] of `latents` (batch, 4, h, w); as many at a time as
    make a 512x512 pixel image."""
    vae = pipeline.vae
    at_once = max(1, 64 * 64 // latents.shape[2:].numel())
    with _without_overflow(vae):
        scaled = unscaled(vae, latents.to(vae.device, vae.dtype))
        return torch.cat([vae.decode(batch).sample for batch in scaled.split(at_once)])


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Return latents (batch, 4, h, w) as a VAE decodes them, of those that the denoiser works on."""
    mean, deviation = _statistics(vae, latents)
    return latents * deviation / vae.config.scaling_factor + mean


def _scaled(vae: Any, latents: Tensor) -> Tensor:
    mean, deviation = _statistics(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / deviation


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return the mean and the deviation by channel that a VAE's config gives (Playground's); where it has none, its
    shift and 1."""
    found = [getattr(vae.config, name, None) for name in ("latents_mean", "latents_std")]
    if None in found:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0
    mean, deviation = (torch.tensor(each).view(1, -1, 1, 1).to(latents) for each in found)
    return mean, deviation


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """Run a VAE in float32 whose activations are known to be too large for half precision: SDXL's."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)


def predict(denoiser: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the denoiser's prediction (batch, channels, h, w) for noisy latents at time steps (batch,)."""
    arguments = conditioning.denoiser_arguments(denoiser, latents)
    output = denoiser(timestep=timesteps, **arguments, return_dict=False)[0]
    return family_of(denoiser).prediction(denoiser, output)
