"""Tiny pipelines of the real classes: SD 1.x's and SDXL's topology at a few channels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asdm_demo import pipeline_folder
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from asdm import AsdmUNet2DConditionModel, PruningPlan, build_student
from asdm.evaluation import image_timing
from asdm.families import denoiser_of
from asdm.measure import latency
from asdm.pipelines.decoders import make_tiny
from asdm.sensitivity.analysis import structure_map
from asdm.sensitivity.profile import RedundancyMap

# Tests run beside each other, on a machine that is never quiet; they do not wait for narrow intervals.
latency.PATIENCE = image_timing.IMAGES_PATIENCE = 0.5

SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


def tiny_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 16,
        **SD_BLOCKS,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def lora_file(unet: UNet2DConditionModel, file: Path) -> Path:
    """Write a LoRA of random weights for a UNet, which gets its layers; return the file."""
    import peft

    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = peft.get_peft_model_state_dict(unet).items()
    save_file({f"unet.{name}": tensor.contiguous() for name, tensor in state}, file)
    return file


def text_lora_file(encoder: CLIPTextModel, file: Path) -> Path:
    """Write a LoRA of random weights for a text encoder; return the file."""
    torch.manual_seed(0)
    layer, width = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", encoder.config.hidden_size
    save_file({f"{layer}.lora_A.weight": torch.randn(2, width), f"{layer}.lora_B.weight": torch.randn(width, 2)}, file)
    return file


def ip_adapter(unet: UNet2DConditionModel) -> dict:
    """Weights as an IP-Adapter's file has them: the cross-attentions numbered 1, 3, 5 and so on."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for index, name in enumerate(name for name in unet.attn_processors if name.endswith("attn2.processor")):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for kind in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * index + 1}.{kind}.weight"] = torch.randn(attention.to_k.weight.shape, generator=generator)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * width, 24, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def load_ip_adapter(pipeline: Any) -> None:
    """Load an IP-Adapter of random weights, as users do."""
    file = ip_adapter(pipeline.unet)
    pipeline.load_ip_adapter(file, subfolder=None, weight_name=None, image_encoder_folder=None)


def tiny_sdxl_unet() -> UNet2DConditionModel:
    return tiny_unet(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48 + 32,
        cross_attention_dim=64,
    )


def unet_inputs(unet: UNet2DConditionModel, batch: int = 2, size: int | None = None) -> dict:
    generator = torch.Generator().manual_seed(7)
    size = size or unet.config.sample_size
    inputs = {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.tensor(321),
        "encoder_hidden_states": torch.randn(batch, 5, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 32, generator=generator),
            "time_ids": torch.full((batch, 6), 16.0),
        }
    return inputs


def predict(unet: UNet2DConditionModel, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return unet(**(inputs or unet_inputs(unet)), return_dict=False)[0]


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


def _text_encoder(kind, width: int, tokenizer: CLIPTokenizer, layers: int = 2):
    torch.manual_seed(2)
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()


def tiny_pipeline() -> StableDiffusionPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=_text_encoder(CLIPTextModel, 32, tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_inpainting_pipeline() -> StableDiffusionInpaintPipeline:
    """The real ones' UNet has 9 channels: noisy latents, the mask, the latents of what it leaves."""
    pipeline = StableDiffusionInpaintPipeline(
        **{**tiny_pipeline().components, "unet": tiny_unet(in_channels=9)}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl_pipeline() -> StableDiffusionXLPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer")
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=_text_encoder(CLIPTextModel, 32, tokenizer),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, 32, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_sdxl_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        ),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_transformer(seed: int = 0, **changes: Any) -> PixArtTransformer2DModel:
    """PixArt's shape with five blocks, for 8x8 latents and a T5 of 24 channels."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "num_layers": 5,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 24,
    }
    return PixArtTransformer2DModel(**{**config, **changes}).eval()


def tiny_pixart_pipeline() -> PixArtAlphaPipeline:
    """With a T5 that knows single letters."""
    letters = [(letter, -1.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789,."]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
    torch.manual_seed(2)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval(),
        vae=tiny_vae(),
        transformer=tiny_transformer(),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_clip(folder: Path, seed: int, tokenizer: CLIPTokenizer) -> None:
    """Write a CLIPModel of random weights and its tokenizer."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    statistics = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))


def tiny_decoder(channels: int = 4, blocks: Sequence[int] = (1, 1)) -> AutoencoderTiny:
    """For the tiny pipelines' VAE, whose images have twice the latents' side."""
    torch.manual_seed(3)
    return make_tiny(channels, 8, blocks).eval()


def profile_by_hand(pipeline: Any) -> RedundancyMap:
    """Return a profile whose latencies are in proportion to MACs, and whose sensitivities rise and fall from unit to
    unit."""
    structure = structure_map(denoiser_of(pipeline), "by hand")
    ms_per_gmac = 100 / structure.gmacs

    def measured(record: Any, index: int) -> Any:
        known = {"latency_ms": ms_per_gmac * record.gmacs, "sensitivity": 0.001 * 1.3 ** (7 * index % 23)}
        shares = {"latency_share": record.gmacs / structure.gmacs} if hasattr(record, "latency_share") else {}
        return record.model_copy(update=known | shares)

    return structure.model_copy(
        update={
            "latency_ms": 100.0,
            "latency_doubt": 0.0,
            "estimator": "ablation",
            "compensate": "linear",
            "units": [measured(unit, index) for index, unit in enumerate(structure.units)],
            "others": [measured(other, index) for index, other in enumerate(structure.others)],
        }
    )


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_unet()


@pytest.fixture
def pipeline() -> StableDiffusionPipeline:
    return tiny_pipeline()


def captioned_images(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write an image of 16 random pixels a side for each row of metadata, and the metadata."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for row in rows:
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """Six captioned images of 16 px, one of them held out."""
    rows = [{"file_name": f"{index}.png", "text": f"image {index}", "held_out": index == 5} for index in range(6)]
    return captioned_images(tmp_path / "data", rows)


@pytest.fixture
def designs(tmp_path: Path) -> Path:
    """Four concepts, each drawn in three variants of one design, and once otherwise; three images are held out."""
    rows = []
    for concept in ("ant", "bee", "cat", "dog"):
        for style in ("flat", "line", "gradient", "photo"):
            design = {} if style == "photo" else {"design": f"{concept} 1"}
            held_out = (concept, style) in {("ant", "line"), ("bee", "flat"), ("cat", "photo")}
            about = {"text": f"{concept}, {style}", "concept": concept, "style": style, "held_out": held_out}
            rows.append({"file_name": f"{concept}-{style}.png"} | about | design)
    return captioned_images(tmp_path / "designs", rows)


class PixelJudge:
    """A judge of images that sees the pixels alone."""

    def __init__(self, device: Any = "cpu"):
        pass

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) + 2


def without_asdm(script: str, tmp_path) -> subprocess.CompletedProcess:
    """Run a script where this package is not there to be imported."""
    modules = ("asdm", "asdm_unet", "asdm_transformer")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({modules}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )


def saved_by_0_1() -> dict:
    """A small student with every kind of edit, as version 0.1 saved it: the UNet's shape, the edits, the shapes of the
    tensors that the original does not have, and the fingerprint."""
    return json.loads((Path(__file__).parent / "student_0_1.json").read_text())


def student_of_every_kind(without: str = "") -> AsdmUNet2DConditionModel:
    """That student, as if it was trained: what starts at zero or at one is somewhere else.

    Args:
        without: a word in the edits that are left out.
    """
    saved = saved_by_0_1()
    unet = tiny_unet(**saved["unet"])
    edits = [edit for edit in saved["edits"] if not without or without not in str(edit)]
    student = build_student(unet, PruningPlan.for_unet(unet, edits))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if any(part in name for part in ("router", "compensation", "expert")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return student
