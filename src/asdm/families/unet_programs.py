"""Which UNets other people's programs read from one file in the original layout, and what they infer from its names.

The facts are those of ComfyUI's detection of models, which Forge shares, and of stable-diffusion.cpp's.
"""

from __future__ import annotations

from typing import Any

from diffusers.loaders.single_file_utils import LDM_UNET_KEY

from asdm.choices import Numbering, Program
from asdm.errors import AsdmError
from asdm.families.records import OriginalKind, OriginalLayout
from asdm.families.unet_original import (
    NO_MIDDLE,
    ONE_RESNET,
    OriginalShape,
    OriginalStructure,
    kept_blocks,
    original_names,
    original_structure,
)
from asdm.families.unet_removed import RemovedDownBlock

# The width of the text embedding, that of SDXL's added embeddings, and the number of heads. Heads of SD 2.x and SDXL
# have 64 channels.
_WIDTHS: dict[OriginalKind, tuple[int, int | None, int | None]] = {
    "sd1": (768, None, 8),
    "sd2": (1024, None, None),
    "sdxl": (2048, 2816, None),
}
_CHANNELS_OF_A_HEAD = 64
KIND_NAMES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_CHANNELS = 320  # of the first level
_PLAIN_CHANNELS = 4  # of the input: noisy latents alone; for inpainting there are 9

# ComfyUI knows an SDXL by the depths of its encoder path, whatever its decoder path and mid block are.
COMFYUI_ENCODERS = {
    "SDXL": (0, 0, 2, 2, 10, 10),
    "SSD-1B": (0, 0, 2, 2, 4, 4),
    "Vega": (0, 0, 1, 1, 2, 2),
    "KOALA-700M": (0, 2, 5),
    "KOALA-1B": (0, 2, 6),
}
_SD = OriginalShape(((1, 1), (1, 1), (1, 1), (0, 0)), 1, ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)))
_TINY = OriginalShape(((1,), (1,), (1,)), NO_MIDDLE, ((1, 1), (1, 1), (1, 1)))
SDCPP_SHAPES: dict[str, dict[str, OriginalShape]] = {
    "sd1": {"SD 1.x": _SD, "bk-tiny": _TINY},
    "sd2": {"SD 2.x": _SD, "bk-tiny": _TINY},
    "sdxl": {
        "SDXL": OriginalShape(((0, 0), (2, 2), (10, 10)), 10, ((10, 10, 10), (2, 2, 2), (0, 0, 0))),
        "ssd-1b": OriginalShape(((0, 0), (2, 2), (4, 4)), ONE_RESNET, ((4, 4, 10), (2, 1, 1), (0, 0, 0))),
        "vega": OriginalShape(((0, 0), (1, 1), (2, 2)), ONE_RESNET, ((2, 2, 2), (1, 1, 1), (0, 0, 0))),
    },
}
# ComfyUI takes an SD 2.x of 4 input channels for one that predicts velocities where this tensor is there and its
# standard deviation is larger than that.
_OF_VELOCITY, _SPREAD_OF_VELOCITY = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09


def original_layout(unet: Any, program: Program | None) -> OriginalLayout:
    """Return the names of a UNet's tensors in the original layout, as a program wants them; for None without gaps.

    Raises:
        AsdmError: the UNet has edits that the layout has no place for, or a shape that the program does not read.
    """
    structure = original_structure(unet)
    kind = _kind(unet)
    numbering: Numbering = "dense"
    if program == "diffusers":
        _require_equal_levels(unet)
        _require_first_blocks(unet, structure)
    elif program is not None:
        _require_widths(unet, structure, kind, program)
    if program == "comfyui":
        _require_comfyui(kind, structure.shape)
    if program == "sdcpp":
        numbering = _require_sdcpp(unet, kind, structure.shape)
    names = original_names(unet, numbering)
    velocity = None
    if program == "comfyui" and kind == "sd2" and unet.config.in_channels == _PLAIN_CHANNELS:
        velocity = next(((tensor, _SPREAD_OF_VELOCITY) for tensor, name in names.items() if name == _OF_VELOCITY), None)
    return OriginalLayout({tensor: LDM_UNET_KEY + name for tensor, name in names.items()}, kind, velocity)


def _kind(unet: Any) -> OriginalKind:
    """Return which of the original models has a UNet's parts."""
    if unet.config.addition_embed_type == "text_time":
        return "sdxl"
    return "sd2" if unet.config.use_linear_projection else "sd1"


def _require_widths(unet: Any, structure: OriginalStructure, kind: OriginalKind, program: Program) -> None:
    """Raise an AsdmError unless the UNet has the widths of its kind, which programs do not read from a file."""
    context, pooled, heads = _WIDTHS[kind]
    found = (
        unet.config.cross_attention_dim,
        unet.config.get("projection_class_embeddings_input_dim"),
        unet.config.block_out_channels[0],
    )
    blocks = [_first_kept_block(unet.get_submodule(path), path) for path in structure.attentions]
    attentions = [block.attn1 for block in blocks]
    wrong = [each for each in attentions if each.heads != (heads or each.inner_dim // _CHANNELS_OF_A_HEAD)]
    if found != (context, pooled, _CHANNELS) or wrong:
        about = f"{found[2]} channels, a text embedding of {found[0]}" + (f", {wrong[0].heads} heads" if wrong else "")
        raise AsdmError(
            f"{program}: reads UNets of the widths of SD 1.x, SD 2.x and SDXL, and this one has others ({about}); "
            "keep the folder, or, if each level has equally many layers, export it for diffusers (`--for diffusers`), "
            "whose from_single_file takes a config"
        )


def _first_kept_block(attention: Any, path: str) -> Any:
    return attention.transformer_blocks[kept_blocks(attention, path)[0]]


def _require_equal_levels(unet: Any) -> None:
    """Raise an AsdmError unless diffusers, which divides the numbers of layers by that of a level, finds each."""
    layers = unet.config.layers_per_block
    if isinstance(layers, int) and not isinstance(unet.down_blocks[-1], RemovedDownBlock):
        return
    found = "lacks its lowest level" if isinstance(layers, int) else f"has {list(layers)}"
    raise AsdmError(
        f"diffusers: reads one file only of a UNet with equally many layers in each level, and this one {found}; load "
        "the student's folder there"
    )


def _require_first_blocks(unet: Any, structure: OriginalStructure) -> None:
    """Raise an AsdmError unless each attention keeps its first transformer blocks: the file numbers them without gaps,
    and diffusers takes the numbers for the student's."""
    for path in structure.attentions:
        kept = kept_blocks(unet.get_submodule(path), path)
        if kept != list(range(len(kept))):
            raise AsdmError(
                f"diffusers: reads from one file the first transformer blocks of an attention, and {path} keeps {kept}"
                "; load the student's folder there"
            )


def _require_comfyui(kind: OriginalKind, shape: OriginalShape) -> None:
    """Raise an AsdmError for an encoder path that ComfyUI does not know. Of SD 1.x and 2.x it knows any with an
    attention, by which it tells the two apart."""
    depths = tuple(depth for level in shape.encoder for depth in level)
    if kind != "sdxl":
        if not any(depths):
            raise AsdmError(
                f"comfyui: knows an {KIND_NAMES[kind]} by an attention in the encoder path, and this one has none "
                "there; make a plan with `asdm plan --portable`"
            )
    elif depths not in COMFYUI_ENCODERS.values():
        known = ", ".join(f"{list(each)} ({name})" for name, each in COMFYUI_ENCODERS.items())
        raise AsdmError(
            f"comfyui: knows an SDXL by the transformer blocks of the encoder path's layers, and this one has "
            f"{list(depths)}; known are {known}; make a plan with `asdm plan --portable`"
        )


def _require_sdcpp(unet: Any, kind: OriginalKind, shape: OriginalShape) -> Numbering:
    """Return how stable-diffusion.cpp numbers the layers: those of bk-tiny as diffusers' script does.

    Raises:
        AsdmError: it does not know the shape.
    """
    known = SDCPP_SHAPES[kind]
    # It takes a UNet with more input channels for the whole model.
    is_smaller = shape != next(iter(known.values()))
    if shape not in known.values() or (is_smaller and unet.config.in_channels != _PLAIN_CHANNELS):
        raise AsdmError(
            f"sdcpp: reads of {KIND_NAMES[kind]}'s shape only {', '.join(known)}, no student of another, and none for "
            "inpainting; make a plan with one of these presets, or export it for comfyui"
        )
    return "two_layers" if shape == _TINY else "dense"
