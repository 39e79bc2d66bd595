"""Inputs of UNets: random ones for measurements, and the embedding of the guidance scale."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from asdm.families.unet_structure import require_known_inputs


def random_inputs(unet: UNet2DConditionModel, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """Return random arguments of a UNet call at its native size, with 77 tokens (16 for narrow models).

    Raises:
        AsdmError: the UNet has inputs that no prompt gives, such as an IP-Adapter's image.
    """
    config = unet.config
    require_known_inputs(unet)
    generator = torch.Generator().manual_seed(seed)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.cross_attention_dim
    channels = channels if isinstance(channels, int) else channels[0]
    tokens = 77 if channels >= 768 else 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    arguments: dict[str, Any] = {
        "sample": normal(batch_size, config.in_channels, height, width),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": normal(batch_size, tokens, config.get("encoder_hid_dim") or channels),
    }
    if config.addition_embed_type == "text_time":
        time_width = 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {
            "text_embeds": normal(batch_size, config.projection_class_embeddings_input_dim - time_width),
            "time_ids": torch.full((batch_size, 6), 1024.0, device=unet.device, dtype=unet.dtype),
        }
    timestep_cond = guidance_embedding(unet, torch.full((batch_size,), 7.5))
    return arguments if timestep_cond is None else {**arguments, "timestep_cond": timestep_cond}


def guidance_embedding(unet: UNet2DConditionModel, scales: Tensor) -> Tensor | None:
    """Return `timestep_cond` (batch, channels) for guidance scales (batch,); None where the UNet embeds none.

    LCM's UNets embed it (`time_cond_proj_dim`).
    """
    width = unet.config.get("time_cond_proj_dim")
    if width is None:
        return None
    embed: Any = StableDiffusionPipeline.get_guidance_scale_embedding  # it uses nothing of the pipeline
    return embed(None, scales.cpu().float() - 1, embedding_dim=width).to(unet.device, unet.dtype)
