"""One handler per kind of edit: what an edit does to a UNet's modules. Names of what stays never change."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from asdm.errors import AsdmError
from asdm.student.edits import Remove
from asdm.units import TRANSFORMER_BRANCHES, is_branch, layers, removable_units


class RemovedResnet(nn.Module):
    """The shortcut of a removed ResnetBlock2D: the identity, or its pretrained 1x1 convolution."""

    def __init__(self, resnet: ResnetBlock2D):
        super().__init__()
        self.conv_shortcut = resnet.conv_shortcut
        self.output_scale_factor = resnet.output_scale_factor

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor


class RemovedAttention(nn.Module):
    """The identity in place of a Transformer2DModel."""

    def forward(self, hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


class RemovedBranch(nn.Module):
    """Adds nothing in place of an attention or feed-forward branch of a transformer block."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states.new_zeros(())


class RemovedMidBlock(nn.Module):
    """The identity in place of the mid block."""

    has_cross_attention = False

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        return hidden_states


class RemovedDownBlock(nn.Module):
    """The identity in place of the innermost down block; still hands on as many skip connections."""

    has_cross_attention = False

    def __init__(self, skips: int):
        super().__init__()
        self.skips = skips

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states, (hidden_states,) * self.skips


class RemovedUpBlock(nn.Module):
    """The identity in place of the innermost up block; takes as many skip connections and leaves them."""

    has_cross_attention = False

    def __init__(self, skips: int):
        super().__init__()
        self.resnets = nn.ModuleList(nn.Identity() for _ in range(skips))  # the UNet counts them

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def apply_edits(unet: UNet2DConditionModel, edits: Sequence[Remove]) -> None:
    """Change `unet` in place.

    Raises:
        AsdmError: an edit names a unit that is not there, one named before, or one inside another.
    """
    names = [edit.unit for edit in edits]
    for name in names:
        if names.count(name) > 1:
            raise AsdmError(f"{name}: removed twice by the plan; name it once")
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise AsdmError(f"{name}: lies inside {outer}, which the plan removes as a whole; drop one of them")
    for edit in edits:
        for path, module in _HANDLERS[type(edit)](unet, edit).items():
            set_module(unet, path, module)


@contextmanager
def edited(unet: UNet2DConditionModel, edit: Remove) -> Iterator[None]:
    """Apply one edit for the length of the block, then put the original modules back."""
    replacements = _HANDLERS[type(edit)](unet, edit)
    originals = {path: unet.get_submodule(path) for path in replacements}
    try:
        for path, module in replacements.items():
            set_module(unet, path, module)
        yield
    finally:
        for path, module in originals.items():
            set_module(unet, path, module)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path below `root`."""
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def inherit_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Copy every tensor that the student has from the teacher's tensor of the same name."""
    source = teacher.state_dict()
    inherited = {name: source[name].detach().clone() for name in student.state_dict()}
    student.load_state_dict(inherited, strict=True, assign=True)


def _remove(unet: UNet2DConditionModel, edit: Remove) -> dict[str, nn.Module]:
    name = edit.unit
    innermost = f"down_blocks.{len(unet.down_blocks) - 1}"
    if name == "mid_block" and unet.mid_block is not None:
        return {name: RemovedMidBlock()}
    if name == innermost and len(unet.down_blocks) > 1:
        return _remove_innermost_stage(unet)
    if name in layers(unet):
        return {name: _removed_layer(name, unet.get_submodule(name))}
    return _remove_branch(unet, name)


def _removed_layer(name: str, layer: nn.Module) -> nn.Module:
    if isinstance(layer, ResnetBlock2D):
        return RemovedResnet(layer)
    if isinstance(layer, Transformer2DModel):
        return RemovedAttention()
    raise AsdmError(f"{name}: removed from this UNet already; drop it from the plan")


def _remove_branch(unet: UNet2DConditionModel, name: str) -> dict[str, nn.Module]:
    block_name, _, branch = name.rpartition(".")
    try:
        block = unet.get_submodule(block_name)
    except AttributeError:
        raise _no_such_unit(unet, name) from None
    if branch not in TRANSFORMER_BRANCHES or not is_branch(block, branch):
        raise _no_such_unit(unet, name)
    norm = TRANSFORMER_BRANCHES[branch][1]
    return {name: RemovedBranch(), f"{block_name}.{norm}": nn.Identity()}


def _remove_innermost_stage(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """As BK-SDM-Tiny does (arXiv 2305.15798, Sec. 3.1): the two innermost blocks and the resampling."""
    last = len(unet.down_blocks) - 1
    outer, inner = unet.config.block_out_channels[last - 1 :]
    if outer != inner:
        raise AsdmError(
            f"down_blocks.{last}: the innermost stage of this UNet cannot go, as it changes the channels "
            f"({outer} to {inner}); remove its units instead"
        )
    return {
        f"down_blocks.{last}": RemovedDownBlock(len(unet.down_blocks[last].resnets)),
        "up_blocks.0": RemovedUpBlock(len(unet.up_blocks[0].resnets)),
        f"down_blocks.{last - 1}.downsamplers": nn.ModuleList([nn.Identity()]),
    }


def _no_such_unit(unet: UNet2DConditionModel, name: str) -> AsdmError:
    known = [unit.name for unit in removable_units(unet)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return AsdmError(
        f"{name}: no such unit in this UNet, which has {len(known)}; "
        f"the nearest is {near[0] if near else 'none'} (`asdm analyze` lists them)"
    )


_HANDLERS: dict[type, Callable[[UNet2DConditionModel, Any], dict[str, nn.Module]]] = {Remove: _remove}
