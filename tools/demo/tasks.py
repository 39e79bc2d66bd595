"""What each stage of the embedded pipeline's recipe trains: CLIP by contrast, the VAE, the UNet."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from transformers import CLIPModel

from asdm.diffusion.parameterization import parameterization_of
from asdm.training.task import TrainingTask


class ContrastTask(TrainingTask):
    """Image-text contrast (CLIP, arXiv 2103.00020, Fig. 3), of images with captions and with the names of concepts.

    A batch holds several drawings of each of its concepts, so that their captions differ in the style alone, and other
    captions besides; the names of all concepts, without a style, make one more set to choose from: drawings that share
    nothing but their concept then lie together.

    Batch: `images` (batch, 3, h, w) in [-1, 1], `input_ids` (captions, length), whose first captions are the images'
    own, and `concepts` (batch,), the images' indices into `concept_ids` (concepts, length).
    """

    def __init__(self, clip: CLIPModel, concept_ids: Tensor):
        super().__init__()
        self.clip = clip
        self.register_buffer("concept_ids", concept_ids)
        self.concept_ids: Tensor

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images = self._image_embeds(augmented(batch["images"], generator))
        captions = self._text_embeds(batch["input_ids"])
        scale = self.clip.logit_scale.exp().clamp(max=100)
        logits = scale * images @ captions.T
        own = torch.arange(len(images))
        by_image = F.cross_entropy(logits, own)
        by_text = F.cross_entropy(logits[:, : len(images)].T, own)
        by_concept = F.cross_entropy(scale * images @ self._text_embeds(self.concept_ids).T, batch["concepts"])
        return {
            "loss": (by_image + by_text + by_concept) / 3,
            "by_image": by_image,
            "by_text": by_text,
            "by_concept": by_concept,
        }

    def _image_embeds(self, images: Tensor) -> Tensor:
        pooled = self.clip.vision_model(pixel_values=images).pooler_output
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=1)

    def _text_embeds(self, input_ids: Tensor) -> Tensor:
        """Nothing is attended to behind a caption's end, so the longest one's length will do."""
        end = input_ids == self.clip.config.text_config.eos_token_id
        length = int(end.int().argmax(dim=1).max()) + 1
        pooled = self.clip.text_model(input_ids=input_ids[:, :length]).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=1)


class ImageTowerTask(TrainingTask):
    """The image tower alone, and both projections: contrast of images with all captions and with all concepts' names.

    The text tower, in which a UNet may be reading already, stays as it is, so that all of its texts can be chosen from
    at every step. An image of a concept in a style in which it was not seen is recognised by a tower that knows both
    apart, and so part of a batch teaches one of them alone:

    - Concepts by their shape: images drawn again in black (`inked`), and ones blended with another drawing of their
      design, which leads from one style to the other.
    - Styles, by the mean of their captions: collages of several images in one style (`collages`). From plain images
      alone a tower learns in which styles it has seen a concept, too.

    Part of the patches is left out (arXiv 2212.00794), for speed and as one more variation.

    Batch: `images` (batch, 3, h, w) in [-1, 1], `others`, a drawing of the same design for each, and the images'
    indices `captions` and `concepts` (batch,).

    Args:
        caption_states, concept_states: the text tower's pooled outputs (texts, channels).
        styles: each caption's, as an index.
    """

    inked_part, blended_part, collage_part = 0.25, 0.15, 0.3
    caption_weight, style_weight = 0.3, 2.0
    patches_kept = 0.8

    def __init__(self, clip: CLIPModel, caption_states: Tensor, concept_states: Tensor, styles: Tensor):
        super().__init__()
        self.clip = clip
        clip.text_model.requires_grad_(False)
        self.register_buffer("styles", styles)
        self.register_buffer("of_style", F.one_hot(styles).float().T)
        self.styles: Tensor
        self.of_style: Tensor
        self.register_buffer("caption_states", caption_states)
        self.register_buffer("concept_states", concept_states)
        self.caption_states: Tensor
        self.concept_states: Tensor

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images, styles = batch["images"], self.styles[batch["captions"]]
        ends = [
            round(part * len(images)) for part in accumulate((self.inked_part, self.blended_part, self.collage_part))
        ]
        inks, blends, mixed = (slice(start, end) for start, end in pairwise((0, *ends)))
        strength = torch.rand(len(images[blends]), 1, 1, 1, generator=generator)
        changed = [
            inked(images[inks], generator),
            images[blends].lerp(batch["others"][blends], strength),
            collages(images, styles, generator)[mixed],
            images[mixed.stop :],
        ]
        embeds = self._image_embeds(augmented(torch.cat(changed), generator), generator)
        scaled = self.clip.logit_scale.exp().clamp(max=100) * embeds
        captions = self._projected(self.caption_states)
        styled, named, plain = (
            slice(mixed.start, None),
            torch.ones(len(images), dtype=torch.bool),
            slice(mixed.stop, None),
        )
        named[mixed] = False
        by_style = F.normalize(self.of_style @ (captions - captions.mean(dim=0)), dim=1)
        names = self._projected(self.concept_states)
        losses = {
            "by_caption": F.cross_entropy(scaled[plain] @ captions.T, batch["captions"][plain]),
            "by_style": F.cross_entropy(scaled[styled] @ by_style.T, styles[styled]),
            "by_concept": F.cross_entropy(scaled[named] @ names.T, batch["concepts"][named]),
        }
        loss = (
            self.caption_weight * losses["by_caption"] + self.style_weight * losses["by_style"] + losses["by_concept"]
        )
        return {"loss": loss, **losses}

    def _projected(self, states: Tensor) -> Tensor:
        return F.normalize(self.clip.text_projection(states).float(), dim=1)

    def _image_embeds(self, images: Tensor, generator: torch.Generator) -> Tensor:
        tower = self.clip.vision_model
        tokens = tower.embeddings(images)
        patches = torch.randperm(tokens.shape[1] - 1, generator=generator) + 1
        kept = torch.cat([torch.zeros(1, dtype=torch.long), patches[: int(self.patches_kept * len(patches))]])
        states = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens[:, kept])).last_hidden_state
        pooled = tower.post_layernorm(states[:, 0])
        return F.normalize(self.clip.visual_projection(pooled).float(), dim=1)


class AutoencoderTask(TrainingTask):
    """Reconstruction with a light KL term, on images in all eight orientations.

    Batch: `images` (batch, 3, h, w) in [-1, 1].
    """

    kl_weight = 1e-4

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images = _reoriented(batch["images"], generator)
        posterior = self.vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        squared = F.mse_loss(reconstruction, images)
        absolute = F.l1_loss(reconstruction, images)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {
            "loss": squared + 0.1 * absolute + self.kl_weight * kl,
            "squared": squared,
            "absolute": absolute,
            "kl": kl,
        }


class NoisePredictionTask(TrainingTask):
    """v-prediction (arXiv 2202.00512), unweighted, captions dropped at times.

    Time steps are uniform. Min-SNR weights (arXiv 2303.09556) gave the high noise levels a tenth of the weight, and
    shapes came late.

    Batch: `latents` (batch, 4, h, w), and (batch, length, channels) each `design_states` and `rendering_states`: the
    captions as the blocks that `read_two_captions` names read them.
    """

    empty_caption: Tensor
    caption_dropout = 0.1

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, empty_caption: Tensor):
        super().__init__()
        self.unet, self.parameterization = unet, parameterization_of(scheduler)
        self.register_buffer("empty_caption", empty_caption)

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        latents = batch["latents"]
        count = len(latents)
        timesteps = self.parameterization.sample_timesteps(count, generator)
        noise = torch.randn(latents.shape, generator=generator)
        dropped = torch.rand(count, generator=generator) < self.caption_dropout
        captions = [
            torch.where(dropped[:, None, None], self.empty_caption, batch[name])
            for name in ("design_states", "rendering_states")
        ]
        noisy = self.parameterization.add_noise(latents, noise, timesteps)
        target = self.parameterization.target(latents, noise, timesteps)
        velocity = self.unet(noisy, timesteps, encoder_hidden_states=torch.cat(captions, dim=1)).sample.float()
        return {"loss": F.mse_loss(velocity, target)}


def read_two_captions(unet: UNet2DConditionModel, rendering: tuple[str, ...]) -> None:
    """Let the cross-attentions of the blocks `rendering` read the second half of the tokens, all others the first."""
    unet.set_attn_processor({name: _HalfOfTokens(name.startswith(rendering)) for name in unet.attn_processors})


class _HalfOfTokens(AttnProcessor):
    """Attention to one half of a caption's tokens. Torch's fused attention takes twice as long backwards on CPUs."""

    def __init__(self, second: bool):
        super().__init__()
        self.second = second

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.chunk(2, dim=1)[self.second]
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def _reoriented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch in one of the square's eight orientations."""
    turns, mirrored = torch.randint(4, (1,), generator=generator), torch.randint(2, (1,), generator=generator)
    images = torch.rot90(images, int(turns), dims=(2, 3))
    return images.flip(3) if mirrored else images


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image slightly moved, scaled, turned and stretched, its colours mixed, with a rectangle missing at
    times; white stays around it.

    The drawings of one design lie alike, so that what has to be recognised again differs in its colours first of all.
    """
    images = _moved(1 - images, generator)  # white is zero, and so is what enters
    images = _recoloured(images, generator)
    return _cut_out(1 - images, generator)


def collages(images: Tensor, styles: Tensor, generator: torch.Generator, across: int = 4) -> Tensor:
    """Return as many images, each of squares, `across` in a row, that are the same squares of images of its style."""
    count, channels, height, width = images.shape
    sources = torch.multinomial((styles[:, None] == styles).float(), across**2, replacement=True, generator=generator)
    squares = images.view(count, channels, across, height // across, across, width // across)
    rows, columns = torch.meshgrid(torch.arange(across), torch.arange(across), indexing="ij")
    sources = sources.view(count, across, across)
    chosen = squares.permute(0, 2, 4, 1, 3, 5)[sources, rows, columns]  # (count, rows, columns, channels, h, w)
    return chosen.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def inked(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image in black on white: its edges, its dark parts, or both."""
    count = len(images)
    darkness = (1 - images).mean(dim=1, keepdim=True) / 2
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).repeat(1, 1, 1, 1) / 4
    slopes = F.conv2d(darkness, torch.cat([across, across.mT]), padding=1).square().sum(dim=1, keepdim=True).sqrt()
    edges = F.max_pool2d(slopes * _uniform(generator, 2, 8, count, 1, 1, 1), 3, stride=1, padding=1).clamp(max=1)
    filled = torch.sigmoid(16 * (darkness - _uniform(generator, 0.15, 0.6, count, 1, 1, 1)))
    kinds = torch.randint(3, (count, 1, 1, 1), generator=generator)
    ink = torch.where(kinds == 0, edges, torch.where(kinds == 1, filled, torch.maximum(edges, filled)))
    return (1 - 2 * ink).expand_as(images)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    count = len(images)
    scale, stretch = _uniform(generator, 0.92, 1.12, count), _uniform(generator, 0.92, 1.08, count)
    angle = _uniform(generator, -0.12, 0.12, count)
    x, y = _uniform(generator, -0.08, 0.08, 2, count)
    rows = [
        torch.stack([scale * stretch * angle.cos(), -scale * angle.sin(), x], 1),
        torch.stack([scale * stretch * angle.sin(), scale * angle.cos(), y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _recoloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images whose parts that are not white have other colours: channels mixed at random, and grey for some."""
    count = len(images)
    mixing = torch.eye(3) + 0.25 * torch.randn(count, 3, 3, generator=generator)
    grey = (torch.rand(count, generator=generator) < 0.4).float() * _uniform(generator, 0.3, 1, count)
    mixing = torch.lerp(mixing, torch.full((3, 3), 1 / 3), grey[:, None, None])
    mixing = mixing * _uniform(generator, 0.7, 1.2, count, 1, 1)
    return torch.einsum("nchw,ndc->ndhw", images, mixing)


def _cut_out(images: Tensor, generator: torch.Generator, longest: float = 0.4) -> Tensor:
    count, _, height, width = images.shape
    side = _uniform(generator, 0, longest, 2, count) * (torch.rand(count, generator=generator) < 0.4)
    top, left = torch.rand(2, count, generator=generator)

    def span(start: Tensor, length: Tensor, pixels: int) -> Tensor:
        places = torch.linspace(0, 1, pixels)
        return (places >= (start - length / 2)[:, None]) & (places <= (start + length / 2)[:, None])

    missing = span(top, side[0], height)[:, :, None] & span(left, side[1], width)[:, None, :]
    missing &= (side > 0).all(dim=0)[:, None, None]
    return torch.where(missing[:, None], torch.ones(()), images).clamp(-1, 1)
