"""The family of Stable Diffusion's UNets: SD 1.x, 2.x and SDXL."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from diffusers import UNet2DConditionModel

from asdm.errors import AsdmError
from asdm.families import unet_calls, unet_structure
from asdm.families.base import Branch, CacheCut, ModelFamily, Unit, register_family
from asdm.families.unet_structure import TRANSFORMER_BRANCHES, block_of, layers


@register_family
class UNetFamily(ModelFamily):
    """Stable Diffusion's UNets."""

    component = "unet"
    model_class = UNet2DConditionModel

    def blocks(self, model: Any) -> list[str]:
        return unet_structure.blocks(model)

    def layers(self, model: Any) -> list[str]:
        return layers(model)

    def units(self, model: Any) -> list[Unit]:
        return unet_structure.removable_units(model)

    def execution_order(self, model: Any) -> list[str]:
        return unet_structure.execution_order(model)

    def branch(self, model: Any, unit: str) -> Branch:
        module: Any = model.get_submodule(unit)
        if unit == "mid_block":
            return Branch(unit, model.config.block_out_channels[-1], kept=lambda hidden_states: hidden_states)
        if unit in layers(model):
            shortcut = getattr(module, "conv_shortcut", None)
            scale = getattr(module, "output_scale_factor", 1.0)

            def kept(hidden_states: Any) -> Any:
                return (hidden_states if shortcut is None else shortcut(hidden_states)) / scale

            folds_into = None if shortcut is None else f"{unit}.conv_shortcut"
            return Branch(unit, module.in_channels, kept=kept, scale=scale, folds_into=folds_into)
        block, _, name = unit.rpartition(".")
        return Branch(unit, model.get_submodule(block).dim, norm=f"{block}.{TRANSFORMER_BRANCHES[name][1]}")

    def removals(self, model: Any) -> list[str]:
        """The mid block, and the lowest-resolution level by its down block."""
        return ["mid_block", f"down_blocks.{len(model.down_blocks) - 1}"]

    def is_covered_by(self, name: str, removed: Collection[str]) -> bool:
        return unet_structure.is_covered_by(name, removed)

    def sample_shape(self, model: Any) -> tuple[int, int, int]:
        size = model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return model.config.in_channels, height, width

    def random_inputs(self, model: Any, batch_size: int, seed: int = 0) -> dict[str, Any]:
        return unet_calls.random_inputs(model, batch_size, seed)

    def fingerprint(self, model: Any) -> str:
        return unet_structure.fingerprint(model)

    def unlike(self, model: Any, other: Any) -> str | None:
        return unet_structure.unlike(model, other)

    def cache_cut(self, model: Any, depth: int, fresh: Sequence[str] = ()) -> CacheCut:
        """All but the last `depth` layers of the decoder path and, on the encoder path, what their skip connections
        bring; with the first of these the input convolution alone (as DeepCache's branch 0, arXiv 2312.00858).

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


def _items(unet: Any, side: str) -> list[list[str]]:
    """The modules of each layer (a resnet and its attention) and of each sampler, in order of execution; those of the
    way down make one skip connection each."""
    items: list[list[str]] = []
    for index in range(len(unet.get_submodule(side))):
        for name in _members(unet, f"{side}.{index}"):
            if ".attentions." in name and items and ".resnets." in items[-1][0]:
                items[-1].append(name)
            else:
                items.append([name])
    return items


def _members(unet: Any, block_name: str) -> list[str]:
    """A block's resnets, attentions and samplers, in order of execution."""
    block = unet.get_submodule(block_name)
    names = [name for name in layers(unet) if block_of(name) == block_name]
    for kind in ("downsamplers", "upsamplers"):
        names += [f"{block_name}.{kind}.{i}" for i in range(len(getattr(block, kind, None) or ()))]
    return names
