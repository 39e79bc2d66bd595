"""The family of PixArt's transformers: PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asdm.choices import CompensationKind
from asdm.errors import AsdmError
from asdm.families.base import ModelFamily
from asdm.families.records import CacheCut
from asdm.families.registry import register_family
from asdm.families.transformer_architecture import PixArtArchitecture
from asdm.families.transformer_folding import fold_projections

_TOKENS = 120  # of a prompt in PixArt-alpha's pipeline


@register_family
class PixArtFamily(PixArtArchitecture, ModelFamily):
    """PixArt's transformers."""

    label = "transformer"
    tags = ("pixart",)
    guidance_scale = 4.5

    def fold_projections(self, model: Any, within_blocks: bool) -> dict[str, CompensationKind]:
        return fold_projections(model, within_blocks)

    def sampling_arguments(self) -> dict[str, Any]:
        """Return images have the requested size, and prompts are embedded as `encode_prompts` does."""
        return {"use_resolution_binning": False, "clean_caption": False}

    def prompt_tokens(self, pipeline: Any) -> int:
        most: int = inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default
        return most

    def size_multiple(self, model: Any) -> int:
        return model.config.patch_size

    def sample_shape(self, model: Any) -> tuple[int, int, int]:
        return model.config.in_channels, model.config.sample_size, model.config.sample_size

    def random_inputs(self, model: Any, batch_size: int, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        channels = model.config.caption_channels or model.inner_dim

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

        return {
            "hidden_states": normal(batch_size, *self.sample_shape(model)),
            "encoder_hidden_states": normal(batch_size, _TOKENS, channels),
            "timestep": torch.full((batch_size,), 500, device=model.device),
            "added_cond_kwargs": self.size_conditions(model, batch_size),
        }

    def encode_prompts(self, pipeline: Any, prompts: list[str], side: int) -> dict[str, Tensor]:
        hidden, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipeline.device)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def conditioned_call(self, model: Any, latents: Tensor, **conditioning: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            **conditioning,
            "added_cond_kwargs": self.size_conditions(model, len(latents)),
        }

    def semantic_module(self, model: Any) -> str:
        """Return the block in the middle."""
        blocks = self.blocks(model)
        return blocks[len(blocks) // 2]

    def prediction(self, model: Any, output: Tensor) -> Tensor:
        """Drop the variance that some models predict, too."""
        return output[:, : model.config.in_channels]

    def size_conditions(self, model: Any, batch_size: int) -> dict[str, Tensor | None]:
        """Return the image size in pixels and the aspect ratio, which models for 1024 pixels read; None for others."""
        if not model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        side = 8.0 * model.config.sample_size
        resolution = torch.full((batch_size, 2), side, device=model.device, dtype=model.dtype)
        return {"resolution": resolution, "aspect_ratio": torch.ones_like(resolution[:, :1])}

    def unlike(self, model: Any, other: Any) -> str | None:
        fields = ("in_channels", "out_channels", "caption_channels", "cross_attention_dim", "sample_size")
        return next((field for field in fields if model.config[field] != other.config[field]), None)

    def cache_cut(self, model: Any, depth: int, fresh: Sequence[str] = ()) -> CacheCut:
        """Return all blocks but the first, those up to the last one of `fresh`, and the last `depth`. What they add to
        the hidden states is cached, so that the new latents pass through.

        Raises:
            AsdmError: a depth out of range.
        """
        deepest, blocks = self.deepest_cut(model), self.blocks(model)
        if not 1 <= depth <= deepest:
            raise AsdmError(f"depth={depth}: this transformer has {len(blocks)} blocks; allowed are 1 to {deepest}")
        first = max([1, *(blocks.index(name) + 1 for name in fresh if name in blocks)])
        cached = blocks[first : len(blocks) - depth]
        if not cached:
            raise AsdmError(f"depth={depth}: nothing is left to cache behind {fresh[-1]}; use a smaller depth")
        return CacheCut(cached, frozenset(cached[-1:]), relative_to=cached[0])

    def deepest_cut(self, model: Any) -> int:
        return len(model.transformer_blocks) - 2
