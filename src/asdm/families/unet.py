"""The family of Stable Diffusion's UNets: SD 1.x, 2.x and SDXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from asdm.choices import CompensationKind, Program
from asdm.errors import AsdmError
from asdm.families.base import ModelFamily
from asdm.families.records import BlockPlace, CacheCut, OriginalLayout, PortableShape, Preset, UnitLike, block_of
from asdm.families.registry import register_family
from asdm.families.unet_architecture import UNetArchitecture
from asdm.families.unet_calls import guidance_embedding, random_inputs
from asdm.families.unet_folding import fold_projections, projection_folds
from asdm.families.unet_portable import portable_shapes
from asdm.families.unet_presets import PRESETS, preset
from asdm.families.unet_programs import original_layout
from asdm.families.unet_structure import layers, require_known_inputs, unlike


@register_family
class UNetFamily(UNetArchitecture, ModelFamily):
    """Stable Diffusion's UNets."""

    label = "UNet"
    tags = ("stable-diffusion",)
    presets = PRESETS
    layer_classes = (ResnetBlock2D, BasicTransformerBlock)
    takes = frozenset({"image", "mask", "lora", "controlnet", "clip_skip", "weighted"})

    def preset(self, name: str, units: Sequence[UnitLike]) -> Preset:
        return preset(name, units)

    def fold_projections(self, model: Any, within_blocks: bool) -> dict[str, CompensationKind]:
        """As the base class; no fold crosses the border of a UNet's block."""
        return fold_projections(model)

    def projection_folds(self, model: Any, unit: str) -> bool:
        return projection_folds(model, unit)

    def block_places(self, blocks: Sequence[str]) -> dict[str, BlockPlace]:
        """Return the U: the encoder's and the decoder's blocks at their resolution, the mid block below them."""
        levels = sum(block.startswith("down_blocks.") for block in blocks)
        places = {}
        for block in blocks:
            side, _, index = block.partition(".")
            if side == "down_blocks":
                places[block] = BlockPlace(int(index), "encoder")
            elif side == "up_blocks":
                places[block] = BlockPlace(levels - 1 - int(index), "decoder")
            else:
                places[block] = BlockPlace(levels, "middle")
        return places

    def portable_shapes(self, config: Mapping[str, Any], units: Sequence[str]) -> list[PortableShape]:
        return portable_shapes(config, units)

    def original_layout(self, model: Any, program: Program | None) -> OriginalLayout:
        return original_layout(model, program)

    def semantic_module(self, model: Any) -> str | None:
        return None if model.mid_block is None else "mid_block"

    def encode_prompts(self, pipeline: Any, prompts: list[str], side: int) -> dict[str, Tensor]:
        if not hasattr(pipeline, "text_encoder_2"):
            return {"encoder_hidden_states": pipeline.encode_prompt(prompts, pipeline.device, 1, False)[0]}
        hidden, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        time_ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=hidden.dtype, device=hidden.device)
        return {
            "encoder_hidden_states": hidden,
            "text_embeds": pooled,
            "time_ids": time_ids.expand(len(prompts), -1),
        }

    def conditioned_call(self, model: Any, latents: Tensor, **conditioning: Tensor) -> dict[str, Any]:
        """Put `masked` behind the latents, and SDXL's pooled embeddings and image sizes into the added conditions."""
        states = dict(conditioning)
        masked = states.pop("masked", None)
        sample = latents if masked is None else torch.cat([latents, masked.to(latents)], dim=1)
        added = {name: states.pop(name) for name in ("text_embeds", "time_ids") if name in states}
        return {"sample": sample, **states, **({"added_cond_kwargs": added} if added else {})}

    def guidance_embedding(self, model: Any, scales: Tensor) -> Tensor | None:
        return guidance_embedding(model, scales)

    def embeds_guidance(self, model: Any) -> bool:
        return model.config.get("time_cond_proj_dim") is not None

    def require_controlnet(self, model: Any, controlnet: Any, name: str = "") -> None:
        fields = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")
        for field in fields:
            found, expected = (
                tuple(v) if isinstance(v := each.config.get(field), list) else v for each in (controlnet, model)
            )
            if found != expected:
                raise AsdmError(f"{name}: a ControlNet for another UNet, with {field} {found}; this one has {expected}")

    def sample_shape(self, model: Any) -> tuple[int, int, int]:
        size = model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return model.config.in_channels, height, width

    def random_inputs(self, model: Any, batch_size: int, seed: int = 0) -> dict[str, Any]:
        return random_inputs(model, batch_size, seed)

    def require_known_inputs(self, model: Any, name: str = "") -> None:
        require_known_inputs(model, name)

    def unlike(self, model: Any, other: Any) -> str | None:
        return unlike(model, other)

    def cache_cut(self, model: Any, depth: int, fresh: Sequence[str] = ()) -> CacheCut:
        """Return all but the last `depth` layers of the decoder path and, on the encoder path, what their skip
        connections bring; with the first of these the input convolution alone (as DeepCache's branch 0, arXiv
        2312.00858).

        Raises:
            AsdmError: a depth out of range.
        """
        deepest = self.deepest_cut(model)
        if not 1 <= depth <= deepest:
            raise AsdmError(
                f"depth={depth}: this UNet's decoder path has {deepest + 1} layers; allowed are 1 to {deepest}"
            )
        down, up = _items(model, "down_blocks"), _items(model, "up_blocks")
        first = len(up)
        for _ in range(depth):
            first -= 1
            while ".resnets." not in up[first][0]:
                first -= 1
        computed = {name for item in [*down[: depth - 1], *up[first:]] for name in item} | set(fresh)
        border = up[first - 1][-1]
        chosen: list[str] = []
        for block_name in self.blocks(model):
            inside = [name for name in _members(model, block_name) if name not in computed]
            whole = inside == _members(model, block_name)
            chosen += [block_name] if whole else inside
            if whole and border in inside:
                border = block_name
        return CacheCut(chosen, frozenset([border]))

    def deepest_cut(self, model: Any) -> int:
        return sum(".resnets." in item[0] for item in _items(model, "up_blocks")) - 1

    def cache_depths(self, model: Any) -> list[int]:
        """One layer, two, and the whole last block."""
        return sorted({1, 2, len(model.up_blocks[-1].resnets)})


def _items(unet: Any, side: str) -> list[list[str]]:
    """Return the modules of each layer (a resnet and its attention) and of each sampler, in order of execution;
    those of the way down make one skip connection each."""
    items: list[list[str]] = []
    for index in range(len(unet.get_submodule(side))):
        for name in _members(unet, f"{side}.{index}"):
            if ".attentions." in name and items and ".resnets." in items[-1][0]:
                items[-1].append(name)
            else:
                items.append([name])
    return items


def _members(unet: Any, block_name: str) -> list[str]:
    """Return a block's resnets, attentions and samplers, in order of execution."""
    block = unet.get_submodule(block_name)
    names = [name for name in layers(unet) if block_of(name) == block_name]
    for kind in ("downsamplers", "upsamplers"):
        names += [f"{block_name}.{kind}.{i}" for i in range(len(getattr(block, kind, None) or ()))]
    return names
