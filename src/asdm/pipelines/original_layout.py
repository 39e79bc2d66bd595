"""A pipeline's tensors by their names in the original code's layout, one file for all parts.

The denoiser's names are its family's. Here are the VAE's and the text encoders': SD 1.x's and SDXL's first one in the
layout of CLIP, SD 2.x's and SDXL's second one in that of OpenCLIP.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from torch import Tensor

from asdm.choices import Program
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of
from asdm.families.records import OriginalKind, OriginalLayout
from asdm.pipelines.tensor_faults import OF_TEXT, TEXT_ENCODERS

CONFIG_KEY = "asdm.unet_config"  # in the metadata: the config of the denoiser, edits included
_VAE = "first_stage_model."
_CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
_OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
_QKV = ("q_proj", "k_proj", "v_proj")  # in the order in which OpenCLIP joins them


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its name, its shape, and the function that makes it from the pipeline's, the sources."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    sources: tuple[Tensor, ...] = ()


def original_tensors(
    pipeline: DiffusionPipeline, program: Program, unet_only: bool = False
) -> tuple[list[StoredTensor], OriginalLayout]:
    """Return the tensors of a pipeline in the original layout, and the layout of its denoiser.

    Nothing is copied before a tensor is made.

    Raises:
        AsdmError: a part has no place in the layout, or `program` does not read its shape.
    """
    denoiser = denoiser_of(pipeline)
    layout = family_of(denoiser).original_layout(denoiser, program)
    state = denoiser.state_dict()
    found = [_stored(name, state[tensor]) for tensor, name in layout.names.items()]
    if not unet_only:
        parts = pipeline.components
        found += _vae_tensors(parts["vae"])
        found += _text_tensors(parts["text_encoder"], "text_encoder", layout.kind, open_clip=layout.kind == "sd2")
        if layout.kind == "sdxl":
            found += _text_tensors(parts["text_encoder_2"], "text_encoder_2", layout.kind, open_clip=True)
    return found, layout


def _stored(name: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(name, tuple(tensor.shape), lambda: tensor, (tensor,))


# -- the VAE -----------------------------------------------------------------------------------------------

_SINGLE = DIFFUSERS_TO_LDM_MAPPING["vae"]
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_tensors(vae: Any) -> Iterator[StoredTensor]:
    if type(vae) is not AutoencoderKL:
        raise AsdmError(
            f"vae: a {type(vae).__name__}, and the original layout is for an AutoencoderKL; export the denoiser alone "
            "(unet_only, --unet-only)"
        )
    levels = len(vae.config.block_out_channels)
    for tensor, value in vae.state_dict().items():
        name = _SINGLE.get(tensor) or _vae_name(tensor, levels)
        if name is None:
            raise AsdmError(f"vae: the original code has no tensor such as {tensor}; export the denoiser alone")
        if ".mid.attn_1." in name and name.endswith(".weight") and value.ndim == 2:  # a 1x1 convolution there
            value = value[:, :, None, None]
        yield _stored(_VAE + name, value)


def _vae_name(tensor: str, levels: int) -> str | None:
    """Return a tensor's name in the original VAE; None where it has none."""
    found = re.fullmatch(
        r"(encoder|decoder)\.(?:(?:down|up)_blocks\.(\d+)|(mid)_block)\."
        r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        tensor,
    )
    if found is None:
        return None
    side, level, middle, kind, number, rest = found.groups()
    if kind == "resnets":
        rest = rest.replace("conv_shortcut", "nin_shortcut")
        inside = f"block_{int(number) + 1}.{rest}" if middle else f"block.{number}.{rest}"
    elif kind == "attentions":
        name, _, last = rest.rpartition(".")
        if not middle or name not in _VAE_ATTENTION:
            return None
        inside = f"attn_1.{_VAE_ATTENTION[name]}.{last}"
    else:
        inside = f"{kind.removesuffix('rs')}.{rest}"
    if middle:
        return f"{side}.mid.{inside}"
    # The original counts the decoder's levels from the highest resolution.
    return f"encoder.down.{level}.{inside}" if side == "encoder" else f"decoder.up.{levels - 1 - int(level)}.{inside}"


# -- text encoders -----------------------------------------------------------------------------------------


def _text_tensors(encoder: Any, part: str, kind: OriginalKind, open_clip: bool) -> Iterator[StoredTensor]:
    if not isinstance(encoder, TEXT_ENCODERS):
        raise AsdmError(
            f"{part}: a {type(encoder).__name__}, and the original layout is for CLIP's text encoder; export the "
            "denoiser alone (unet_only, --unet-only)"
        )
    state = {OF_TEXT.sub("", name): tensor for name, tensor in encoder.state_dict().items()}
    state.pop("embeddings.position_ids", None)  # numbers from 0, which no program needs
    if open_clip:
        yield from _open_clip_tensors(state, _OPEN_CLIP[kind])
        return
    for name, tensor in state.items():
        yield _stored(_CLIP[kind] + (name if name.startswith("text_projection") else f"text_model.{name}"), tensor)


def _open_clip_tensors(state: Mapping[str, Tensor], prefix: str) -> Iterator[StoredTensor]:
    """Yield tensors as OpenCLIP has them: q, k and v joined, the projection transposed."""
    tables = DIFFUSERS_TO_LDM_MAPPING["openclip"]
    single = {OF_TEXT.sub("", ours): theirs for ours, theirs in tables["layers"].items()}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            yield StoredTensor(prefix + single[name], tuple(tensor.shape[::-1]), partial(torch.t, tensor), (tensor,))
        elif name in single:
            yield _stored(prefix + single[name], tensor)
        elif any(f".{each}." in name for each in _QKV):
            if f".{_QKV[0]}." in name:
                yield _joined(state, name, prefix)
        else:
            yield _stored(f"{prefix}transformer.{_open_clip_name(name)}", tensor)


def _joined(state: Mapping[str, Tensor], name: str, prefix: str) -> StoredTensor:
    attention, _, kind = name.partition(f".{_QKV[0]}.")
    parts = tuple(state[f"{attention}.{each}.{kind}"] for each in _QKV)
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    joined = f"{prefix}transformer.{_open_clip_name(attention)}.in_proj_{kind}"
    return StoredTensor(joined, shape, lambda: torch.cat(parts), parts)


def _open_clip_name(name: str) -> str:
    for ours, theirs in DIFFUSERS_TO_LDM_MAPPING["openclip"]["transformer"].items():
        name = name.replace(OF_TEXT.sub("", ours), theirs)
    return name
