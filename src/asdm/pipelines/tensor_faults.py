"""What is wrong with the tensors of a checkpoint: missing ones, other shapes, and numbers that are no weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders import single_file_utils as layouts
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from asdm.errors import AsdmError, one_line
from asdm.families import Denoiser, UNetFamily
from asdm.pipelines.headers import Header
from asdm.pipelines.untrusted import classes_of_parts, empty_model
from asdm.reading import read_json
from asdm.student.classes import student_class

TEXT_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)
OF_TEXT = re.compile("^text_model[.]")  # which some versions of transformers put before a text encoder's names
_INDEX = "*.safetensors.index*.json"  # of shards, also in a variant
_NAMED = 3  # tensors that a message names
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Of a UNet's inputs beside noisy latents, time step and text.
_INPUTS = ("time_embedding.cond_proj.", "class_embedding.", "add_embedding.", "encoder_hid_proj.")


def require_loaded(module: nn.Module, name: str, part: str, files: Iterable[Path] = ()) -> None:
    """Raise an AsdmError where a tensor of a loaded part was not there.

    The libraries only warn, and go on with uninitialised memory or with random numbers.

    Args:
        name: of the checkpoint, for the message.
        part: "unet", "vae", ...
        files: those that the part was loaded from.
    """
    files = list(files)
    _require_named(absent_of(module, files), len(list(module.parameters())), name, part, files)


def absent_of(module: nn.Module, files: Iterable[Path]) -> list[str]:
    """Return names of a module's parameters that were not loaded.

    transformers draws them at random. Its versions put different prefixes before names, and of tensors that are tied a
    file has one.
    """
    absent = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if absent or not isinstance(module, PreTrainedModel):
        return absent
    known = [f".{name}" for path in files for name in _dtypes(path)]
    given = {
        parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if any(each.endswith(f".{name}") or f".{name}".endswith(each) for each in known)
    }
    return [name for name, parameter in module.named_parameters() if parameter not in given] if known else []


def require_weights(path: Path) -> None:
    """Raise an AsdmError where a file holds quantised weights: integers, or numbers with a scale beside them."""
    dtypes = _dtypes(path)
    wrong = [f"{name} ({kind})" for name, kind in dtypes.items() if kind not in _WEIGHT_TYPES and _is_weight(name)]
    scaled = [name for name in dtypes if name.endswith(("scaled_fp8", ".scale_weight", ".weight_scale"))]
    if wrong or scaled:
        raise AsdmError(
            f"{path}: holds {_some(wrong or scaled)}, quantised weights, which are not read; take the checkpoint in "
            "float32, float16 or bfloat16"
        )


def require_safetensors(path: Path) -> None:
    """Raise an AsdmError unless `path` is a whole safetensors file."""
    try:
        with safe_open(path, "pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        pickled = start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        why = "a pickle named .safetensors" if pickled else f"truncated or damaged ({one_line(error)})"
        raise AsdmError(f"{path}: not a safetensors file: {why}; download or convert it again") from None


def require_whole(pipeline: DiffusionPipeline, place: Path) -> None:
    """Raise an AsdmError where a folder or file lacked a tensor of the pipeline that was loaded from it."""
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            require_loaded(module, str(place), part, sorted((place / part).glob("*.safetensors")))
    component = UNetFamily.component
    denoiser = getattr(pipeline, component, None)
    if isinstance(denoiser, UNetFamily.model_class):
        files = [place] if place.is_file() else sorted((place / component).glob("*.safetensors"))
        require_all_read(denoiser, str(place), files)


def require_shards(folder: Path) -> None:
    """Raise an AsdmError where a part of a pipeline's folder lacks a shard, or the index of its shards."""
    for index in sorted(folder.glob(f"*/{_INDEX}")):
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
            absent = [name for name in names if not (index.parent / name).is_file()]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise AsdmError(f"{index}: damaged ({one_line(error)}); download it again") from None
        if outside:
            raise AsdmError(f"{index}: names a file in another folder ({_some(outside)}); download it again")
        if absent and len(absent) < len(names):  # without any of them, weights in a variant may be there
            raise AsdmError(
                f"{index.parent}: lacks {len(absent)} of the {len(names)} files of {index.name}: {_some(absent)}; "
                "download them again"
            )
    for first in sorted(folder.glob("*/*-00001-of-*.safetensors")):
        if not any(first.parent.glob(_INDEX)):
            raise AsdmError(f"{first.parent}: shards without their index (*.index.json); download that too")


def explain_single_file(header: Header, config: str, kind: str) -> None:
    """Raise an AsdmError where the tensors of a checkpoint in one file do not fit the model of a pipeline's `config` (a
    folder or Hub id); return where they do, or where the config is out of reach or damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one library about another's arguments
        try:
            _explain_single_file(header, config, kind)
        except Exception as error:  # of the libraries, any kind
            if isinstance(error, AsdmError | MemoryError):
                raise


def _explain_single_file(header: Header, config: str, kind: str) -> None:
    tensors = header.tensors
    for part, made in (("unet", UNetFamily.model_class), ("vae", AutoencoderKL)):
        settings = made.load_config(config, subfolder=part)
        layers = settings.get("layers_per_block")
        if isinstance(layers, list):
            raise AsdmError(
                f"{header.path}: its UNet's levels have {layers} layers, and diffusers reads one file only "
                "of levels with equally many; load the student's folder"
            )
        with init_empty_weights():
            module = (student_class(settings.get("_class_name")) or made).from_config(settings)
        try:
            found = _converted(part, tensors, settings)
        except KeyError as error:
            _require_named([str(error.args[0])], len(list(module.parameters())), str(header.path), part, [])
            raise
        absent = [name for name, _ in module.named_parameters() if name not in found]
        if absent and settings.get("edits"):
            raise AsdmError(
                f"{header.path}: diffusers does not find {_some(absent)} of the edited UNet of {config} in it; load "
                "the student's folder"
            )
        _require_fit(module, found, str(header.path), part)
    encoders: list[tuple[str, Any]] = [("text_encoder", CLIPTextModel)]
    if "xl" in kind or "playground" in kind:
        encoders.append(("text_encoder_2", CLIPTextModelWithProjection))
    for part, made in encoders:
        with init_empty_weights():
            module = made(CLIPTextConfig.from_pretrained(config, subfolder=part))
        _require_fit(module, _text_converted(part, tensors, module), str(header.path), part)


def explain_folder(folder: Path) -> None:
    """Raise an AsdmError where the tensors of a part of a pipeline's folder do not fit its config; return where all
    do."""
    for part, kind in classes_of_parts(folder).items():
        files = sorted((folder / part).glob("*.safetensors"))
        module = empty_model(kind, folder / part)
        if module is not None and files:
            found = {name: tensor for path in files for name, tensor in Header.of(path).tensors.items()}
            _require_fit(module, found, str(folder), part, files)


def require_all_read(unet: Denoiser, name: str, files: Iterable[Path]) -> None:
    """Raise an AsdmError where a UNet's files have tensors for an input that the loaded UNet lacks.

    diffusers drops such tensors in silence.
    """
    known = dict(unet.named_parameters())
    labels = unet.config.class_embed_type is None and unet.config.addition_embed_type is None
    for tensor in (tensor for path in files for tensor in _dtypes(path)):
        inside = tensor.removeprefix(layouts.LDM_UNET_KEY)
        in_one_file = inside.startswith("time_embed.cond_proj.") or (inside.startswith("label_emb.") and labels)
        if in_one_file or (inside.startswith(_INPUTS) and inside not in known):
            raise AsdmError(
                f"{name}: its unet has {tensor}, for an input (timestep_cond, class_labels, added_cond_kwargs) that "
                "its config does not name, and would be loaded without it; take the checkpoint with its own config"
            )


def _converted(part: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """Return a part's tensors by diffusers' names."""
    start = layouts.LDM_UNET_KEY if part == "unet" else tuple(layouts.LDM_VAE_KEYS)
    if not any(name.startswith(start) for name in tensors):
        return {}
    convert = layouts.convert_ldm_unet_checkpoint if part == "unet" else layouts.convert_ldm_vae_checkpoint
    return {name: tensor for name, tensor in convert(dict(tensors), settings).items() if tensor is not None}


def _text_converted(part: str, tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    open_clip = "conditioner.embedders.1.model." if part == "text_encoder_2" else "cond_stage_model.model."
    if any(name.startswith(open_clip) for name in tensors):
        return layouts.convert_open_clip_checkpoint(module, tensors, prefix=open_clip)
    return {} if part == "text_encoder_2" else layouts.convert_ldm_clip_checkpoint(tensors)


def _require_fit(
    module: nn.Module, found: Mapping[str, Tensor], name: str, part: str, files: Iterable[Path] = ()
) -> None:
    expected = {OF_TEXT.sub("", key): parameter.shape for key, parameter in module.named_parameters()}
    given = {_todays(key): tensor.shape for key, tensor in found.items()}
    _require_named([key for key in expected if key not in given], len(expected), name, part, files)
    wrong = [f"{key} {_size(given[key])} for {_size(shape)}" for key, shape in expected.items() if given[key] != shape]
    if wrong:
        raise AsdmError(
            f"{name}: its {part} has other shapes than its config says: {_some(wrong)}; take the config that belongs "
            "to it (config, --config), or the checkpoint that belongs to the config"
        )


def _todays(name: str) -> str:
    """Return a tensor's name without what older versions of the libraries had in it."""
    name = OF_TEXT.sub("", name)
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _require_named(absent: list[str], count: int, name: str, part: str, files: Iterable[Path]) -> None:
    if absent:
        where = f" ({_place(absent[0], list(files))})" if files else ""
        lacking = f"{len(absent)} of its {count} tensors{where}: {_some(absent)}"
        raise AsdmError(f"{name}: its {part} lacks {lacking}; download or convert it again")


def _place(tensor: str, files: list[Path]) -> str:
    """Return the file in which a tensor should be."""
    for index in files[0].parent.glob(_INDEX):
        known = read_json(index)["weight_map"]
        return f"{index.parent.name}/{known.get(tensor, index.name)}"
    return f"{files[0].parent.name}/{files[0].name}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _dtypes(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return {}
