"""The names of a UNet's tensors in the original code's layout, which ComfyUI, Forge and stable-diffusion.cpp read.

Each layer of the encoder path has a number, and so has each downsampler. Each layer of the decoder path has a number,
and an upsampler stands behind its level's last layer. diffusers reads this layout and does not write it. Its tables of
single names are used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from asdm.choices import Numbering
from asdm.edits.base import parse_edits
from asdm.edits.remove import RemovedUnit
from asdm.errors import AsdmError
from asdm.families.unet_removed import RemovedAttention, RemovedBranch, RemovedDownBlock, RemovedMidBlock
from asdm.families.unet_structure import TRANSFORMER_BRANCHES

LAYERS_OF_THE_ORIGINAL = 2  # of each level of the encoder path; the decoder path has one more
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_REMEDY = "make a plan with `asdm plan --portable`, or keep the student as a pipeline's folder"
NO_MIDDLE, ONE_RESNET = -2, -1  # of `OriginalShape.middle`, beside the depth of its attention


@dataclass(frozen=True)
class OriginalShape:
    """What programs infer from the names of a file: transformer blocks of each layer, level by level.

    `encoder` and `decoder` are lists by level in order of execution, the decoder's from the lowest resolution. 0 is a
    layer without attention. `middle`: the depth of the mid block's attention, `ONE_RESNET` or `NO_MIDDLE`.
    """

    encoder: tuple[tuple[int, ...], ...]
    middle: int
    decoder: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class OriginalStructure:
    """Modules of a UNet by their paths and the prefixes of their tensors' names in the original layout."""

    shape: OriginalShape
    resnets: dict[str, str]
    attentions: dict[str, str]
    samplers: dict[str, str]


def original_names(unet: Any, numbering: Numbering = "dense") -> dict[str, str]:
    """Return each tensor's name in the original layout, without the prefix of the UNet.

    Raises:
        AsdmError: the UNet has edits or tensors that the original code has no place for.
    """
    structure = original_structure(unet, numbering)
    tables = DIFFUSERS_TO_LDM_MAPPING["unet"]
    single = tables["layers"] | tables["addition_embed_type"]
    places = dict(structure.samplers)
    for path, place in structure.resnets.items():
        places |= {f"{path}.{ours}": f"{place}.{theirs}" for ours, theirs in _RESNET.items()}
    for path, place in structure.attentions.items():
        kept = kept_blocks(unet.get_submodule(path), path)
        numbers = {f"{path}.transformer_blocks.{old}": new for new, old in enumerate(kept)}
        places |= {block: f"{place}.transformer_blocks.{number}" for block, number in numbers.items()}
        places |= {f"{path}.{name}": f"{place}.{name}" for name in ("norm", "proj_in", "proj_out")}
    names = {}
    for tensor in unet.state_dict():
        module = next((parent for parent in _parents(tensor) if parent in places), None)
        if module is None and tensor not in single:
            raise AsdmError(f"{tensor}: the original code has no such tensor; {_REMEDY}")
        names[tensor] = single[tensor] if module is None else places[module] + tensor.removeprefix(module)
    return names


def original_structure(unet: Any, numbering: Numbering = "dense") -> OriginalStructure:
    """Return where the original layout has a UNet's layers.

    Raises:
        AsdmError: the UNet has edits that the original code has no place for.
    """
    _require_removals(unet)
    down, up = list(enumerate(unet.down_blocks)), list(enumerate(unet.up_blocks))
    if isinstance(unet.down_blocks[-1], RemovedDownBlock):
        down, up = down[:-1], up[1:]
    walk = _Walk(unet, numbering)
    encoder = tuple(walk.encoder_level(f"down_blocks.{index}", last=block is down[-1][1]) for index, block in down)
    middle = walk.middle()
    decoder = tuple(walk.decoder_level(f"up_blocks.{index}", last=block is up[-1][1]) for index, block in up)
    return OriginalStructure(OriginalShape(encoder, middle, decoder), walk.resnets, walk.attentions, walk.samplers)


class _Walk:
    """Numbers a UNet's layers in order of execution."""

    def __init__(self, unet: Any, numbering: Numbering):
        self.unet = unet
        self.numbering = numbering
        self.encoder_number, self.decoder_number = 1, 0  # the input convolution has the encoder's first
        self.resnets: dict[str, str] = {}
        self.attentions: dict[str, str] = {}
        self.samplers: dict[str, str] = {}

    def encoder_level(self, block: str, last: bool) -> tuple[int, ...]:
        """Return the depths of a level's layers."""
        start, depths = self.encoder_number, []
        for index in range(len(self.unet.get_submodule(block).resnets)):
            depths.append(self._layer(block, index, f"input_blocks.{self.encoder_number}"))
            self.encoder_number += 1
        if self.numbering == "two_layers":
            self.encoder_number = start + LAYERS_OF_THE_ORIGINAL
        if not last:
            self.samplers[f"{block}.downsamplers.0.conv"] = f"input_blocks.{self.encoder_number}.0.op"
            self.encoder_number += 1
        return tuple(depths)

    def decoder_level(self, block: str, last: bool) -> tuple[int, ...]:
        """Return the depths of a level's layers."""
        start, depths = self.decoder_number, []
        for index in range(len(self.unet.get_submodule(block).resnets)):
            depths.append(self._layer(block, index, f"output_blocks.{self.decoder_number}"))
            self.decoder_number += 1
        place = f"output_blocks.{self.decoder_number - 1}.{2 if depths[-1] else 1}"
        if self.numbering == "two_layers":
            self.decoder_number = start + LAYERS_OF_THE_ORIGINAL + 1
            # As the converter has it: in the lowest level behind the resnet, in the others behind the attention.
            place = f"output_blocks.{self.decoder_number - 1}.{1 if start == 0 else 2}"
        if not last:
            self.samplers[f"{block}.upsamplers.0.conv"] = f"{place}.conv"
        return tuple(depths)

    def middle(self) -> int:
        """Return what the mid block has, as `OriginalShape.middle`."""
        block = self.unet.mid_block
        if block is None or isinstance(block, RemovedMidBlock):
            return NO_MIDDLE
        first, *others = block.resnets
        _require_stock(first, ResnetBlock2D, "mid_block.resnets.0")
        self.resnets["mid_block.resnets.0"] = "middle_block.0"
        attentions = [each for each in block.attentions if each is not None]
        if all(isinstance(each, RemovedUnit) for each in [*attentions, *others]):
            return ONE_RESNET
        if len(attentions) != 1 or len(others) != 1:
            raise AsdmError(f"mid_block: has {len(attentions)} attentions, and the original code's has one; {_REMEDY}")
        _require_stock(others[0], ResnetBlock2D, "mid_block.resnets.1")
        self.resnets["mid_block.resnets.1"] = "middle_block.2"
        depth = self._attention("mid_block.attentions.0", "middle_block.1")
        if not depth:
            raise AsdmError(f"mid_block.attentions.0: removed, and mid_block.resnets.1 is not; {_REMEDY}")
        return depth

    def _layer(self, block: str, index: int, place: str) -> int:
        """Place a resnet and its attention; return the attention's depth."""
        path = f"{block}.resnets.{index}"
        _require_stock(self.unet.get_submodule(path), ResnetBlock2D, path)
        self.resnets[path] = f"{place}.0"
        attentions = getattr(self.unet.get_submodule(block), "attentions", None)
        return 0 if attentions is None else self._attention(f"{block}.attentions.{index}", f"{place}.1")

    def _attention(self, path: str, place: str) -> int:
        module = self.unet.get_submodule(path)
        if isinstance(module, RemovedAttention):
            return 0
        _require_stock(module, Transformer2DModel, path)
        kept = kept_blocks(module, path)
        if not kept:
            raise AsdmError(f"{path}: all its branches are removed, and its projections stay; remove it as a whole")
        self.attentions[path] = place
        return len(kept)


def kept_blocks(attention: Any, path: str) -> list[int]:
    """Return the numbers of the transformer blocks that compute something.

    Raises:
        AsdmError: a block lacks some of its branches.
    """
    kept = []
    for index, block in enumerate(attention.transformer_blocks):
        name = f"{path}.transformer_blocks.{index}"
        _require_stock(block, BasicTransformerBlock, name)
        removed = [branch for branch in TRANSFORMER_BRANCHES if isinstance(getattr(block, branch), RemovedBranch)]
        if removed and len(removed) < len(TRANSFORMER_BRANCHES):
            raise AsdmError(
                f"{name}.{removed[0]}: removed alone, and programs need whole transformer blocks; {_REMEDY}"
            )
        if not removed:
            kept.append(index)
    return kept


def _require_removals(unet: Any) -> None:
    """Raise an AsdmError for an edit that changes what a module computes, or leaves a projection."""
    for edit in parse_edits(unet.config.get("edits") or []):
        if not edit.is_removal:
            raise AsdmError(f"{edit}: only this package's own code computes it; {_REMEDY}")
    for path, module in unet.named_modules():
        projections = (getattr(module, name, None) for name in ("compensation", "time_compensation"))
        if isinstance(module, RemovedUnit) and any(each is not None for each in projections):
            raise AsdmError(f"{path}: removed with a projection in its place that folds into no other layer; {_REMEDY}")


def _require_stock(module: Any, kind: type[Any], path: str) -> None:
    if type(module) is not kind:
        removed = "removed, and its layer stays" if isinstance(module, RemovedUnit) else f"a {type(module).__name__}"
        raise AsdmError(f"{path}: {removed}; the original code has a {kind.__name__} there; {_REMEDY}")


def _parents(tensor: str) -> Iterator[str]:
    """Yield the paths that contain a tensor, the innermost first."""
    path = tensor
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
