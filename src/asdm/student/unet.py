"""The student's UNet: a UNet2DConditionModel with edits, which other people's tools use as they use the stock one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from asdm.edits.expert_adapters import experts_following, require_fusable
from asdm.edits.expert_kernels import OneTimestepEmbedding, repeated_row
from asdm.edits.regional_attention import GriAttnProcessor
from asdm.families.unet_architecture import UNetArchitecture
from asdm.families.unet_removed import RemovedDownBlock
from asdm.student.adapters import renumber
from asdm.student.edited_model import EditedModel, register_student, signature_with_edits

MODULE_NAME = "asdm_unet"  # of the module file beside the weights


@register_student
class AsdmUNet2DConditionModel(EditedModel, UNet2DConditionModel):
    """A UNet2DConditionModel with a list of edits applied; `forward` and module names are the stock ones.

    Args:
        edits: records of `asdm.edits`, or the same as dicts; exclusive ones are ignored, as they make stock models.
        unet_config: the arguments of `UNet2DConditionModel`.

    Raises:
        AsdmError: an edit that this UNet does not allow.
    """

    architecture = UNetArchitecture()
    module_name = MODULE_NAME
    home = "asdm.student.unet"
    disguised_fields = ("down_block_types", "up_block_types")

    def __init__(self, edits: Sequence[Any] = (), **unet_config: Any):
        super().__init__(**unet_config)
        self.apply_edits(edits)

    __init__.__signature__ = signature_with_edits(UNet2DConditionModel)  # type: ignore[attr-defined]

    @wraps(UNet2DConditionModel.forward)
    def forward(self, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        innermost = self.down_blocks[-1]
        if isinstance(innermost, RemovedDownBlock):
            kwargs |= _fitted_residuals(kwargs, innermost.skips)
        return super().forward(sample, timestep, *args, **kwargs)

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor | None:
        embedded = super().get_time_embed(sample, timestep)
        one = not isinstance(timestep, Tensor) or timestep.numel() == 1
        return repeated_row(embedded) if one and isinstance(self.time_embedding, OneTimestepEmbedding) else embedded

    def _load_ip_adapter_weights(self, state_dicts: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock UNet, from a file that was made for the original or for this student (`renumber`)."""
        super()._load_ip_adapter_weights(self._renumbered(state_dicts), *args, **kwargs)

    def _load_ip_adapter_loras(self, state_dicts: Any) -> dict[int, dict[str, Tensor]]:
        return super()._load_ip_adapter_loras(self._renumbered(state_dicts))

    def _renumbered(self, state_dicts: Any) -> list[dict[str, Any]]:
        given, original = state_dicts if isinstance(state_dicts, list) else [state_dicts], self.original()
        return [renumber(each, original, self) for each in given]

    def set_adapters(self, adapter_names: Any, weights: Any = None) -> None:
        """As the stock UNet. Scales by block and layer are resolved for the original, whose class name diffusers
        knows."""
        given = weights if isinstance(weights, list) else [weights]
        if any(isinstance(each, dict) for each in given):
            expanded = _maybe_expand_lora_scales(self.original(), [1.0 if each is None else each for each in given])
            weights = expanded if isinstance(weights, list) else expanded[0]
        super().set_adapters(adapter_names, weights)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As the stock UNet. A LoRA that takes another one's place may be for layers that the student lacks, too."""
        weights = pretrained_model_name_or_path_or_dict
        if hotswap and isinstance(weights, dict):
            present = {name for name, _ in self.named_modules()}
            gone = {name for name, _ in self.original().named_modules()} - present
            weights = {key: tensor for key, tensor in weights.items() if not _lies_in(key, prefix, gone)}
        return super().load_lora_adapter(weights, prefix=prefix, hotswap=hotswap, **kwargs)

    @wraps(UNet2DConditionModel.fuse_lora)
    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        require_fusable(self)
        with experts_following(self):
            super().fuse_lora(*args, **kwargs)

    def set_attn_processor(self, processor: Any) -> None:
        """As the stock UNet, and from a dict for the original. Only another regional processor replaces regional
        attention, which is part of the student's architecture."""
        given = processor if isinstance(processor, dict) else dict.fromkeys(self.attn_processors, processor)
        gone = given.keys() - self.attn_processors.keys()
        if gone and gone <= self.original().attn_processors.keys():
            given = {name: each for name, each in given.items() if name not in gone}
        kept = {name: old for name, old in self._regional().items() if not getattr(given.get(name), "regions", 0)}
        super().set_attn_processor({**given, **kept})

    def set_default_attn_processor(self) -> None:
        self.set_attn_processor(AttnProcessor())

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        with self._regional_kept():
            super().set_attention_slice(slice_size)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        with self._regional_kept():
            super().set_use_memory_efficient_attention_xformers(valid, attention_op)

    def _regional(self) -> dict[str, GriAttnProcessor]:
        return {name: each for name, each in self.attn_processors.items() if isinstance(each, GriAttnProcessor)}

    @contextmanager
    def _regional_kept(self) -> Iterator[None]:
        """Restore regional processors after a block that replaces each attention's processor."""
        processors = self._regional()
        yield
        for name, processor in processors.items():
            self.get_submodule(name.removesuffix(".processor")).set_processor(processor)  # type: ignore[operator]


# By this name a pipeline's index finds the class: in the file beside the weights, or in this package.
AsdmUNet2DConditionModel.__module__ = MODULE_NAME


def _lies_in(key: str, prefix: str | None, modules: Collection[str]) -> bool:
    """Return whether a tensor's name in a LoRA file is inside one of these modules."""
    path = key.removeprefix(f"{prefix}.") if prefix else key
    return any(name in modules for name in accumulate(path.split("."), "{}.{}".format))


def _fitted_residuals(kwargs: dict[str, Any], skips: int) -> dict[str, Any]:
    """Fit the residuals of a ControlNet or T2I-Adapter for the original to a student without the lowest level.

    Residuals for that level's output go to the level above it, resized; those for its skip connections are dropped.
    """
    fitted: dict[str, Any] = {}
    down = kwargs.get("down_block_additional_residuals")
    middle = kwargs.get("mid_block_additional_residual")
    within = kwargs.get("down_intrablock_additional_residuals")
    if down is not None and middle is not None:
        kept, gone = down[: -skips - 1], down[-skips - 1 :]
        fitted["down_block_additional_residuals"] = (*kept, *(residual.new_zeros(1) for residual in gone))
        fitted["mid_block_additional_residual"] = F.interpolate(middle, size=kept[-1].shape[2:])
    if within:
        inner = F.interpolate(within[-1], size=within[-2].shape[2:])
        fitted["down_intrablock_additional_residuals"] = [*within[:-1], inner]
    return fitted
