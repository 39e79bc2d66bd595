"""LoRA files that are added to a pipeline for a request and removed afterwards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import set_weights_and_activate_adapters
from pydantic import Field, model_validator
from safetensors import safe_open
from torch import Tensor

from asdm.errors import AsdmError, AsdmWarning, needs_extra, one_line
from asdm.families import denoiser_of, family_of, require_torch
from asdm.pipelines.lora_files import require_lora_file
from asdm.pipelines.lora_names import holds_lora
from asdm.pipelines.lora_scales import adapter_config, alpha_of
from asdm.pipelines.quiet import quiet
from asdm.records import Record
from asdm.tensor_files import tensors_and_metadata

LARGEST_SCALE = 10  # of a LoRA, without its sign
_WRITING = re.compile(r"\.(lora_B|lora\.up|lora_linear_layer\.up)\.(weight|bias)$")  # the matrix that writes the output
_UNREAD = {  # by a part of their tensors' names; diffusers drops the first, and fails at the others
    "dora_scale": "a DoRA in kohya's layout",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
}
_SIZE_MISMATCH = re.compile(r"size mismatch for (\S+?)(?:\.lora_\S*)?:")  # torch's words


class LoraFile(Record):
    """A LoRA's file, `.safetensors`, and how strongly it counts.

    Raises:
        AsdmError: there is no such file, it is no LoRA in safetensors, or the scale is out of range.
    """

    path: Path = Field(description="the file")
    scale: float = Field(1.0, allow_inf_nan=True, description="1 as it was trained; from -10 to 10")

    @model_validator(mode="after")
    def _is_usable(self) -> LoraFile:
        require_lora(self.path)
        if not abs(self.scale) <= LARGEST_SCALE:
            raise AsdmError(f"{self.path}:{self.scale:g}: the scale must be from {-LARGEST_SCALE} to {LARGEST_SCALE}")
        return self

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """Read `FILE` or `FILE:scale`.

        Raises:
            AsdmError: as `LoraFile`.
        """
        path, scale = Path(text), 1.0
        name, _, number = text.rpartition(":")
        if name and not path.exists():
            with suppress(ValueError):  # a colon of the file's name
                scale, path = float(number), Path(name)
        return cls(path=path, scale=scale)


def require_lora(path: Path) -> None:
    """
    Raises:
        AsdmError: there is no such file, or it is no LoRA in safetensors.
    """
    require_lora_file(path)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    if not holds_lora(names):
        raise AsdmError(f"{path}: holds no LoRA; its first tensor is {names[0] if names else 'missing'}")
    for part, kind in _UNREAD.items():
        if any(part in name for name in names):
            raise AsdmError(f"{path}: {kind}, which diffusers does not read; use a LoRA, or a DoRA saved by diffusers")


@contextmanager
def with_loras(pipeline: DiffusionPipeline, loras: Sequence[LoraFile]) -> Iterator[None]:
    """Load LoRA files into a pipeline's denoiser and text encoders within the block.

    An `AsdmWarning` says how much of a file a student has no place for.

    Raises:
        AsdmError: the pipeline takes none, has one already, or a file is for another model.
    """
    if not loras:
        yield
        return
    with needs_extra("lora", "LoRA files"):
        import_module("peft")
    target: Any = pipeline
    require_torch(denoiser_of(pipeline))
    if not hasattr(target, "load_lora_weights") or not hasattr(denoiser_of(pipeline), "load_lora_adapter"):
        raise AsdmError(f"{loras[0].path}: a {type(pipeline).__name__} takes no LoRA; leave it out")
    if target.get_list_adapters():
        raise AsdmError("a LoRA is loaded in the pipeline already; unload_lora_weights() it first")
    try:
        names = [_load_lora(target, lora, f"lora_{index}") for index, lora in enumerate(loras)]
        # Not `target.set_adapters`: it fails for UNets whose levels have different numbers of layers.
        for part in target.get_list_adapters():
            set_weights_and_activate_adapters(getattr(target, part), names, [lora.scale for lora in loras])
        yield
    finally:
        target.unload_lora_weights()


def _load_lora(pipeline: Any, lora: LoraFile, name: str) -> str:
    """Load one file under an adapter's name; return the name."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft, about names that we report
            tensors = _tensors_as_trained(lora.path)
            pipeline.load_lora_weights(tensors, adapter_name=name)
    except (MemoryError, AsdmError):
        raise
    except Exception as error:  # of diffusers and peft, any kind
        layer = _SIZE_MISMATCH.search(str(error))
        reason = f"{layer[1]} has another size" if layer else one_line(error, 120)
        raise AsdmError(f"{lora.path}: a LoRA for another model ({reason})") from None
    parts = [part for part, adapters in pipeline.get_list_adapters().items() if name in adapters]
    if not parts:
        raise AsdmError(f"{lora.path}: a LoRA for another model; none of its layers is in this one")
    given, loaded = _layers_in_file(tensors, pipeline), _layers_loaded(denoiser_of(pipeline), name)
    if loaded < given:
        warnings.warn(
            f"{lora.path}: {given - loaded} of its {given} layers are not in this model, which was pruned; the others "
            "take effect",
            AsdmWarning,
            stacklevel=2,
        )
    return name


def _tensors_as_trained(path: Path) -> dict[str, Tensor]:
    """Read a LoRA's tensors, scaled as it was trained: diffusers saves that scale beside them, and takes none for
    tensors in memory.

    Raises:
        AsdmError: the scale is damaged.
    """
    tensors, metadata = tensors_and_metadata(path)
    config = adapter_config(metadata, path)
    for name in [each for each in tensors if _WRITING.search(each)]:
        rank = tensors[_WRITING.sub(r".\1.weight", name)].shape[1]
        alpha = alpha_of(config, name, rank, path)
        if alpha not in (None, rank):
            tensors[name] = tensors[name] * (alpha / rank)
    return tensors


def _layers_in_file(tensors: dict[str, Tensor], pipeline: Any) -> int:
    """Return the number of the denoiser's layers that a file's tensors are for, by diffusers' names."""
    component = f"{family_of(pipeline).component}."
    translated = pipeline.lora_state_dict(dict(tensors), unet_config=denoiser_of(pipeline).config)
    names = translated[0] if isinstance(translated, tuple) else translated
    return len({name.rpartition(".lora")[0] for name in names if name.startswith(component) and ".lora" in name})


def _layers_loaded(denoiser: torch.nn.Module, adapter: str) -> int:
    """Return the number of layers that carry an adapter."""
    return sum(adapter in (getattr(layer, "lora_A", None) or ()) for layer in denoiser.modules())
