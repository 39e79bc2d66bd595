"""What is added to a pipeline for a request and removed afterwards: LoRA files, and a ControlNet."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DiffusionPipeline
from diffusers.utils import set_weights_and_activate_adapters
from huggingface_hub import hf_hub_download
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from asdm.errors import AsdmError, AsdmWarning, needs_extra, one_line
from asdm.families import denoiser_of, family_of
from asdm.pipelines.damaged import refuse_damaged
from asdm.pipelines.lora_names import holds_lora
from asdm.pipelines.names import looks_like_path
from asdm.pipelines.quiet import quiet
from asdm.pipelines.tensor_faults import require_loaded
from asdm.pipelines.untrusted import (
    bounded_modules,
    require_no_more_than_its_files,
    require_plain_files,
    require_safe_config,
)
from asdm.reading import read_json
from asdm.records import Record

LARGEST_SCALE = 10  # of a LoRA, without its sign
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
    if not path.is_file():
        raise AsdmError(f"{path}: no such LoRA file; name a .safetensors file")
    if path.suffix != ".safetensors":
        raise AsdmError(f"{path}: a LoRA must be a .safetensors file; other formats may run code")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise AsdmError(f"{path}: not a safetensors file ({one_line(error)}); download it again") from None
    if not holds_lora(names):
        raise AsdmError(f"{path}: holds no LoRA; its first tensor is {names[0] if names else 'missing'}")


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
            pipeline.load_lora_weights(load_file(lora.path), adapter_name=name)
    except (MemoryError, AsdmError):
        raise
    except Exception as error:  # of diffusers and peft, any kind
        layer = _SIZE_MISMATCH.search(str(error))
        reason = f"{layer[1]} has another size" if layer else one_line(error, 120)
        raise AsdmError(f"{lora.path}: a LoRA for another model ({reason})") from None
    parts = [part for part, adapters in pipeline.get_list_adapters().items() if name in adapters]
    if not parts:
        raise AsdmError(f"{lora.path}: a LoRA for another model; none of its layers is in this one")
    given, loaded = _layers_in_file(lora.path, pipeline), _layers_loaded(denoiser_of(pipeline), name)
    if loaded < given:
        warnings.warn(
            f"{lora.path}: {given - loaded} of its {given} layers are not in this model, which was pruned; the others "
            "take effect",
            AsdmWarning,
            stacklevel=2,
        )
    return name


def _layers_in_file(path: Path, pipeline: Any) -> int:
    """Return the number of the denoiser's layers that a file is for, by diffusers' names."""
    component = f"{family_of(pipeline).component}."
    translated = pipeline.lora_state_dict(load_file(path), unet_config=denoiser_of(pipeline).config)
    names = translated[0] if isinstance(translated, tuple) else translated
    return len({name.rpartition(".lora")[0] for name in names if name.startswith(component) and ".lora" in name})


def _layers_loaded(denoiser: torch.nn.Module, adapter: str) -> int:
    """Return the number of layers that carry an adapter."""
    return sum(adapter in (getattr(layer, "lora_A", None) or ()) for layer in denoiser.modules())


def require_controlnet_folder(folder: Path) -> None:
    """
    Raises:
        AsdmError: a path that is no folder with a ControlNet in diffusers' format. A Hub id passes.
    """
    if not folder.is_dir():
        if folder.exists() or looks_like_path(os.fspath(folder)):
            raise AsdmError(f"{folder}: no such folder of a ControlNet; name one in diffusers' format, or a Hub id")
        return
    require_plain_files(folder)
    try:
        config = read_json(folder / "config.json")
        found = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AsdmError(f"{folder}: not a ControlNet in diffusers' format ({one_line(error)})") from None
    if found != ControlNetModel.__name__:
        raise AsdmError(f"{folder}: a {found}; must be a {ControlNetModel.__name__}")


def load_controlnet(folder: Path, pipeline: DiffusionPipeline) -> ControlNetModel:
    """Load a ControlNet in a pipeline's precision, on its device.

    Raises:
        AsdmError: it is damaged, a pickle, or for another kind of denoiser.
    """
    require_controlnet_folder(folder)
    denoiser = denoiser_of(pipeline)
    with refuse_damaged(folder), quiet(), bounded_modules(str(folder)):
        is_here = folder.is_dir()
        require_safe_config(folder / "config.json" if is_here else Path(hf_hub_download(str(folder), "config.json")))
        if is_here:
            require_no_more_than_its_files(ControlNetModel, folder)
        controlnet = ControlNetModel.from_pretrained(
            os.fspath(folder), torch_dtype=denoiser.dtype, use_safetensors=True
        )
    require_loaded(controlnet, str(folder), "ControlNet", sorted(folder.glob("*.safetensors")))
    family_of(pipeline).require_controlnet(denoiser, controlnet, str(folder))
    factor = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if factor != pipeline.vae_scale_factor:
        raise AsdmError(
            f"{folder}: a ControlNet that makes images smaller by {factor}, and this model's VAE does by "
            f"{pipeline.vae_scale_factor}; use one with {int(math.log2(pipeline.vae_scale_factor)) + 1} "
            "conditioning_embedding_out_channels"
        )
    return controlnet.eval().to(pipeline.device)
