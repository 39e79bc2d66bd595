"""The recipe of a tiny decoder: its size, and how it is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderTiny, DiffusionPipeline
from pydantic import Field, field_validator

from asdm.errors import AsdmError, one_line
from asdm.pipelines.decoders import make_tiny
from asdm.reading import parse_yaml
from asdm.records import Record
from asdm.training.loop import LoopSettings
from asdm.training.optimizers import OptimizerName

MAX_PARAMETERS = 10**8  # of a tiny decoder; TAESD has 2.4 million, Stable Diffusion's VAE 84 million
NARROW = 64  # channels of a VAE's outermost level, below which the decoder is half as wide


class DecoderRecipe(Record):
    """The size of a tiny decoder, and how it is trained."""

    width: int | None = Field(
        None, ge=1, le=1024, description="Channels of all layers; by default 64, and 32 for a narrow VAE."
    )
    blocks: list[int] | None = Field(
        None,
        description="Residual blocks of each level, from the latents to the pixels; by default 3, 3, 3, 1 for the four "
        "levels of a VAE whose images have eight times the latents' side.",
    )
    steps: int = Field(1500, ge=1, le=10**9, description="Steps of the optimiser.")
    batch_size: int = Field(16, ge=1, le=10**6, description="Latents in a step, of all processes together.")
    accumulation: int = Field(1, ge=1, description="Rounds in which a step's batch is computed, for less memory.")
    crop: int = Field(32, ge=1, description="Side of the part of a latent that a step trains on, cut at random.")
    optimizer: OptimizerName = Field("muon", description="adamw, adamw8bit or muon.")
    learning_rate: float = Field(3e-3, gt=0, description="The peak, reached after the warm-up.")
    warmup_steps: int = Field(30, ge=0, description="Steps in which the learning rate rises.")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="Decay of the averaged weights, which are the result.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    mixed_precision: Literal["no", "auto", "bf16", "fp16"] = Field(
        "auto", description="Precision of the student's computation; auto is the device's fastest."
    )
    pixels: float = Field(1.0, gt=0, description="Weight of the error of pixels.")
    features: float = Field(0.05, ge=0, description="Weight of the error of the VAE encoder's features.")
    features_every: int = Field(16, ge=1, description="The error of features is computed at every k-th step.")
    encoder: float = Field(
        0.1, gt=0, description="Weight of the error of the student's encoder, by which image-to-image starts."
    )
    encoder_every: int = Field(2, ge=1, description="The encoder is trained at every k-th step.")

    @field_validator("blocks")
    @classmethod
    def _each_is_possible(cls, blocks: list[int] | None) -> list[int] | None:
        if blocks is not None and not (blocks and all(0 <= count <= 100 for count in blocks)):
            raise ValueError("must be numbers from 0 to 100, one for each level")
        return blocks

    def tiny_for(self, pipeline: DiffusionPipeline) -> AutoencoderTiny:
        """Make the decoder for a pipeline's latents, with random weights.

        Raises:
            AsdmError: the blocks are not those of as many levels as the pipeline's VAE has, or the decoder is not tiny.
        """
        vae: Any = pipeline.vae
        is_narrow = vae.config.block_out_channels[0] < NARROW
        levels = round(math.log2(pipeline.vae_scale_factor)) + 1
        blocks = self.blocks or _default_blocks(levels, is_narrow)
        if len(blocks) != levels:
            raise AsdmError(
                f"blocks={','.join(map(str, blocks))}: the levels of this model's VAE are {levels}, as an image has "
                f"{pipeline.vae_scale_factor} times the latents' side; give {levels} numbers"
            )
        size = (vae.config.latent_channels, self.width or (32 if is_narrow else 64), blocks)
        with init_empty_weights():
            parameters = sum(parameter.numel() for parameter in make_tiny(*size).parameters())
        if parameters > MAX_PARAMETERS:
            raise AsdmError(
                f"width={size[1]}, blocks={','.join(map(str, blocks))}: a decoder of {parameters / 1e6:.0f}M "
                f"parameters; a tiny one has at most {MAX_PARAMETERS // 10**6}M"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make_tiny(*size)

    def loop(self, seed: int) -> LoopSettings:
        """Return the settings of the training loop."""
        names = ("steps", "optimizer", "learning_rate", "warmup_steps", "ema_decay", "checkpoint_every", "accumulation")
        return LoopSettings(**{name: getattr(self, name) for name in names}, weight_decay=0.0, seed=seed)


def _default_blocks(levels: int, is_narrow: bool) -> list[int]:
    """Return TAESD's blocks; beside a narrow VAE more of them where a block costs least, and none at the pixels."""
    return [6, *[4] * (levels - 2), 0] if is_narrow else [*[3] * (levels - 1), 1]


def read_decoder_recipe(path: str | Path) -> DecoderRecipe:
    """Read a recipe from a YAML or JSON file with its fields.

    Raises:
        AsdmError: no such file, or one with other fields.
    """
    path = Path(path)
    if not path.is_file():
        raise AsdmError(f"{path}: no such recipe of a decoder; name a YAML file with its fields")
    try:
        fields = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AsdmError(f"{path}: not a recipe in YAML: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise AsdmError(f"{path}: not a recipe of a decoder; write its fields by name, such as steps: 1500")
    return DecoderRecipe(**fields)
