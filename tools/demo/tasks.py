"""What each stage of the embedded default's recipe trains: CLIP by contrast, the VAE, the UNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel

from asdm.diffusion.parameterization import parameterization_of
from asdm.training.task import TrainingTask


class ContrastTask(TrainingTask):
    """Image-text contrast (CLIP, arXiv 2103.00020, Fig. 3). Batch: `images` (batch, 3, h, w) in
    [-1, 1] and `input_ids` (batch, length)."""

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        images = _shifted_and_tinted(batch["images"], generator)
        output = self.clip(pixel_values=images, input_ids=batch["input_ids"])
        targets = torch.arange(len(images))
        by_image = F.cross_entropy(output.logits_per_image.float(), targets)
        by_text = F.cross_entropy(output.logits_per_text.float(), targets)
        return {"loss": (by_image + by_text) / 2, "by_image": by_image, "by_text": by_text}


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

    Time steps are uniform. Min-SNR weights
    (arXiv 2303.09556) gave the high noise levels a tenth of the say, and shapes came late.

    Batch: `latents` (batch, 4, h, w) and `encoder_hidden_states` (batch, length, channels).
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
        captions = torch.where(dropped[:, None, None], self.empty_caption, batch["encoder_hidden_states"])
        noisy = self.parameterization.add_noise(latents, noise, timesteps)
        target = self.parameterization.target(latents, noise, timesteps)
        velocity = self.unet(noisy, timesteps, encoder_hidden_states=captions).sample.float()
        return {"loss": F.mse_loss(velocity, target)}


def _reoriented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the batch in one of the square's eight orientations."""
    turns, mirrored = torch.randint(4, (1,), generator=generator), torch.randint(2, (1,), generator=generator)
    images = torch.rot90(images, int(turns), dims=(2, 3))
    return images.flip(3) if mirrored else images


def _shifted_and_tinted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image slightly moved, scaled, mirrored at times, its colours shifted; white stays around it."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    scale, mirror = uniform(0.85, 1.25), (uniform(0, 1) < 0.5).float() * 2 - 1
    angle = uniform(-0.2, 0.2)
    rows = [
        torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), uniform(-0.15, 0.15)], 1),
        torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), uniform(-0.15, 0.15)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(1 - images, grid, align_corners=False)  # white is zero, and so is what enters
    tint = uniform(0.85, 1.15, 3, 1, 1) * uniform(0.85, 1.15, 1, 1, 1)
    return (1 - moved * tint).clamp(-1, 1)
