"""The UNet class whose config holds the edits: it is built stock, edited, then loaded strictly."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.model_loading_utils import load_state_dict
from torch import Tensor, nn

from asdm.edits.base import EDIT_KINDS, UnitEdit, apply_edits, parse_edits
from asdm.edits.cond_conv import OneTimestepEmbedding, experts_following, repeated_row, require_fusable
from asdm.edits.projections import Projection, reshape_saved
from asdm.edits.regional_attention import GriAttnProcessor
from asdm.errors import AsdmError, one_line
from asdm.families.unet_architecture import UNetArchitecture
from asdm.families.unet_removed import RemovedDownBlock
from asdm.student.adapters import renumber
from asdm.student.standalone import module_source

MODULE_NAME = "asdm_unet"  # of the module file beside the weights
_HOME = "asdm.student.unet"
# On disk the block types carry this prefix: the stock class would otherwise accept the folder, ignore the
# edits and fill the missing weights at random; so it stops with "asdm.CrossAttnDownBlock2D does not exist".
_BLOCK_PREFIX = "asdm."
_ALIGNMENT = 64  # bytes, of torch's allocator on CPUs


class AsdmUNet2DConditionModel(UNet2DConditionModel):
    """A UNet2DConditionModel with a list of edits applied; `forward` and module names are the stock ones.

    Args:
        edits: records of `asdm.edits`, or the same as dicts, but exclusive ones, which make stock models. Without any,
            the stock UNet.
        unet_config: the arguments of `UNet2DConditionModel`.

    Raises:
        AsdmError: an edit that this UNet does not allow.
    """

    _no_split_modules: ClassVar = [
        *UNet2DConditionModel._no_split_modules,
        *(name for kind in EDIT_KINDS.values() for name in kind.no_split_modules),
    ]

    def __init__(self, edits: Sequence[Any] = (), **unet_config: Any):
        super().__init__(**unet_config)
        records = [edit for edit in parse_edits(edits) if isinstance(edit, UnitEdit)]
        apply_edits(self, records, UNetArchitecture())
        self.register_to_config(edits=[record.to_dict() for record in records])

    @wraps(UNet2DConditionModel.forward)
    def forward(self, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        innermost = self.down_blocks[-1]
        if isinstance(innermost, RemovedDownBlock):
            kwargs |= _for_what_is_left(kwargs, innermost.skips)
        return super().forward(sample, timestep, *args, **kwargs)

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor | None:
        embedded = super().get_time_embed(sample, timestep)
        one = not isinstance(timestep, Tensor) or timestep.numel() == 1
        return repeated_row(embedded) if one and isinstance(self.time_embedding, OneTimestepEmbedding) else embedded

    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(UNet2DConditionModel.__init__).parameters.values(),
            inspect.Parameter("edits", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=()),
        ]
    )

    @wraps(UNet2DConditionModel.save_pretrained)  # by the signature, a pipeline knows that a variant can be saved
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        # Beside the weights, the module file that loads them without asdm.
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{MODULE_NAME}.py").write_text(module_source(_HOME), "utf-8")

    def _original(self) -> UNet2DConditionModel:
        """The UNet without the edits and without weights (on the meta device)."""
        with torch.device("meta"):
            return UNet2DConditionModel.from_config({key: self.config[key] for key in self.config if key != "edits"})

    def _load_ip_adapter_weights(self, state_dicts: Any, *args: Any, **kwargs: Any) -> None:
        """As the stock UNet, from a file that was made for the original or for this student (`renumber`)."""
        super()._load_ip_adapter_weights(self._renumbered(state_dicts), *args, **kwargs)

    def _load_ip_adapter_loras(self, state_dicts: Any) -> dict[int, dict[str, Tensor]]:
        return super()._load_ip_adapter_loras(self._renumbered(state_dicts))

    def _renumbered(self, state_dicts: Any) -> list[dict[str, Any]]:
        given, original = state_dicts if isinstance(state_dicts, list) else [state_dicts], self._original()
        return [renumber(each, original, self) for each in given]

    def set_adapters(self, adapter_names: Any, weights: Any = None) -> None:
        """As the stock UNet; scales by block and layer are those of the original, which diffusers knows by its class's
        name."""
        given = weights if isinstance(weights, list) else [weights]
        if any(isinstance(each, dict) for each in given):
            expanded = _maybe_expand_lora_scales(self._original(), [1.0 if each is None else each for each in given])
            weights = expanded if isinstance(weights, list) else expanded[0]
        super().set_adapters(adapter_names, weights)

    @wraps(UNet2DConditionModel.fuse_lora)
    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        require_fusable(self)
        with experts_following(self):
            super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self) -> None:
        with experts_following(self):
            super().unfuse_lora()

    def set_attn_processor(self, processor: Any) -> None:
        """As the stock UNet, and from a dict for the original; but regional attention is the student's architecture,
        and gives way to its kind alone."""
        given = processor if isinstance(processor, dict) else dict.fromkeys(self.attn_processors, processor)
        gone = given.keys() - self.attn_processors.keys()
        if gone and gone <= self._original().attn_processors.keys():
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
        """Through what sets each attention's processor by itself."""
        processors = self._regional()
        yield
        for name, processor in processors.items():
            self.get_submodule(name.removesuffix(".processor")).set_processor(processor)  # type: ignore[operator]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if isinstance(config, dict):
            config = {**config, **{key: _without_prefix(config[key]) for key in _block_keys(config)}}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        for key in _block_keys(config):
            config[key] = [f"{_BLOCK_PREFIX}{kind}" for kind in config[key]]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _load_pretrained_model(
        cls,
        model: nn.Module,
        state_dict: dict[str, Tensor] | None,
        resolved_model_file: list[Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the stock class, from folders of version 0.1, too (`reshape_saved`)."""
        maps = {name: module for name, module in model.named_modules() if isinstance(module, Projection)}
        if maps and state_dict is None:
            resolved_model_file = [load_state_dict(file) for file in resolved_model_file]
        for tensors in resolved_model_file if state_dict is None else [state_dict]:
            if isinstance(tensors, dict):
                reshape_saved(maps, tensors)
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `ModelMixin.from_pretrained`, but strict; and weights that lie oddly in a mapped file are copied to where
        the allocator puts others, as some CPUs' matrix products are rounded by the address: what was saved and loaded
        computes the same bits.

        Raises:
            AsdmError: a tensor is missing, extra or misshapen; its name is in the message.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            unet, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, AsdmError):
                raise
            raise AsdmError(f"{pretrained_model_name_or_path}: {one_line(error, 300)}") from error
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[fault]:
                names = sorted(str(name) for name in info[fault])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise AsdmError(
                    f"{pretrained_model_name_or_path}: {fault.replace('_keys', '')} tensors for the edits in its "
                    f"config: {', '.join(names[:3])}{more}; save the student again"
                )
        align_weights(unet)
        return (unet, info) if wants_info else unet


# By this name a pipeline's index finds the class: in the file beside the weights, or in this package.
AsdmUNet2DConditionModel.__module__ = MODULE_NAME


def align_weights(network: nn.Module) -> None:
    """Copy weights that lie oddly in a mapped file to where others lie: some CPUs round by the address."""
    for parameter in network.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _for_what_is_left(kwargs: dict[str, Any], skips: int) -> dict[str, Any]:
    """What a ControlNet or T2I-Adapter made for the original adds, where the innermost stage is gone: what met it meets
    the stage around it, at that one's size; the skip connections into it go nowhere."""
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


def _block_keys(config: dict[str, Any]) -> list[str]:
    return [key for key in ("down_block_types", "up_block_types") if key in config]


def _without_prefix(kinds: Sequence[str]) -> list[str]:
    return [kind.removeprefix(_BLOCK_PREFIX) for kind in kinds]


def edits_of(unet: UNet2DConditionModel) -> list[Any]:
    """The edits already applied to a UNet; none for a stock one.

    Raises:
        AsdmError: a student's class that was loaded from its folder, whose modules this package does not know.
    """
    if type(unet).__name__ == AsdmUNet2DConditionModel.__name__ and not isinstance(unet, AsdmUNet2DConditionModel):
        raise AsdmError("a student that was loaded by the code in its folder; load it by asdm.load_pipeline")
    return parse_edits(unet.config.get("edits") or [])
