"""Full-size Stable Diffusion shapes with random weights: for speed and memory, never for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from asdm.diffusion.kinds import RANDOM
from asdm.errors import AsdmError
from asdm.families import ModelFamily, UNetFamily
from asdm.registry import PIPELINES, registered_folder
from asdm.student.classes import student_class_of
from asdm.student.unet import AsdmUNet2DConditionModel

# The published configs, where they differ from the defaults of the UNet's class (which are SD 1.x's).
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sd15-inpainting": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "in_channels": 9},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
_CLIP_G = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def require_shape(shape: str) -> None:
    """Raise an AsdmError unless it is one of `UNETS`."""
    if shape not in UNETS:
        raise AsdmError(f"{RANDOM}{shape}: no such shape; allowed: {', '.join(f'{RANDOM}{name}' for name in UNETS)}")


def random_pipeline(shape: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Make a pipeline of a shape of `UNETS`, about as large in memory as the real one.

    Raises:
        AsdmError: there is no such shape.
    """
    require_shape(shape)
    unet = randomly_filled(lambda: UNetFamily.model_class(**UNETS[shape]), dtype)
    vae = randomly_filled(lambda: _vae(0.13025 if shape == "sdxl" else 0.18215), dtype)
    tokenizer = CLIPTokenizer.from_pretrained(_tokenizer_folder(), model_max_length=77)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if shape == "sd21" else "epsilon",
    )
    shared = {"vae": vae, "unet": unet, "tokenizer": tokenizer, "scheduler": scheduler}
    if shape == "sdxl":
        return StableDiffusionXLPipeline(
            **shared,
            text_encoder=_text_encoder(CLIPTextModel, _CLIP_L, tokenizer, dtype),
            tokenizer_2=tokenizer,
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection, _CLIP_G, tokenizer, dtype),
            add_watermarker=False,
        )
    kind = StableDiffusionInpaintPipeline if shape.endswith("-inpainting") else StableDiffusionPipeline
    return kind(
        **shared,
        text_encoder=_text_encoder(CLIPTextModel, _CLIP_H if shape == "sd21" else _CLIP_L, tokenizer, dtype),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer_folder() -> Path:
    """Return where a CLIP tokenizer is at hand without the network."""
    folder = registered_folder("demo", PIPELINES)
    assert folder is not None
    return folder / "tokenizer"


def random_denoiser(family: ModelFamily, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Make a denoiser of this family and config (edits included) with random weights."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return randomly_filled(lambda: student_class_of(family).from_config(plain), dtype)


def random_unet(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> AsdmUNet2DConditionModel:
    """Make a UNet of this config (edits included) with random weights."""
    return random_denoiser(UNetFamily(), config, dtype)


def randomly_filled(make: Any, dtype: torch.dtype) -> Any:
    """Make a module and fill it cheaply: normal weights of variance 1 / fan-in, zero biases."""
    with init_empty_weights(include_buffers=False):
        module: nn.Module = make()
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    if dtype != torch.float32:  # tensors without memory, for estimates, stand no conversion
        module.to(dtype)
    return module.eval()


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
        scaling_factor=scaling_factor,
    )


def _text_encoder(kind: Any, sizes: dict[str, Any], tokenizer: CLIPTokenizer, dtype: torch.dtype) -> Any:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **sizes, **ids)
    return randomly_filled(lambda: kind(config), dtype)
