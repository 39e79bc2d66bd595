"""LoRA files for an original model, rewritten for a student whose layers have other numbers.

Two layouts are read. kohya's names are flat: `lora_unet_down_blocks_0_..` or, for SDXL, those of the original code,
`lora_unet_input_blocks_4_..`. diffusers' are paths: `unet.down_blocks.0..`. A LoRA for a student's folder keeps its
layout. One for a student's file is written in kohya's, with the original code's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asdm import checks
from asdm.errors import AsdmError
from asdm.families import Denoiser
from asdm.files import replacing_file
from asdm.pipelines.lora_names import TEXT, FileNames, Names, holds_lora
from asdm.pipelines.lora_scales import ADAPTER_CONFIG, adapter_config, alpha_of
from asdm.pipelines.tensor_faults import require_safetensors
from asdm.tensor_files import tensors_and_metadata

# Matrices (rank, the input of the layer that they adapt), and those (its output, rank), LoHa's included.
_READING = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "hada_w1_b", "hada_w2_b")
_WRITING = ("lora_up.weight", "lora_B.weight", "lora.up.weight", "hada_w1_a", "hada_w2_a")
_DOWN = ".lora_down.weight"


@dataclass(frozen=True)
class ConvertedLora:
    """The file of a converted LoRA: how many layers it adapts, and the names of those that the student lacks."""

    file: Path
    kept: int
    dropped: list[str]


def require_lora_file(lora: Path) -> None:
    """Raise an AsdmError unless `lora` is a whole safetensors file."""
    if not lora.is_file():
        raise AsdmError(f"{lora}: no such LoRA file; name a .safetensors file")
    if lora.suffix != ".safetensors":
        raise AsdmError(f"{lora}: a LoRA must be a .safetensors file; other formats may run code when loaded")
    require_safetensors(lora)


@checks.arguments(lora=checks.path, unet=checks.UNET, file=checks.path, checkpoint=checks.path)
def convert_lora(
    lora: str | Path, unet: Denoiser, file: str | Path, checkpoint: str | Path | None = None
) -> ConvertedLora:
    """Rewrite a LoRA file for the original model with a student's names, without layers that the student lacks.

    Args:
        lora: a `.safetensors` file in kohya's or diffusers' layout.
        unet: the student; its weights are not read.
        file: the `.safetensors` file to write. An existing one is replaced if it holds a LoRA.
        checkpoint: the student's one file, as `export_checkpoint` wrote it. The LoRA is then written for the programs
            that read that file, in kohya's layout with the names of the original code. By default it is written for the
            student's folder, for diffusers: the layout stays, and what is for the text encoders stays as it is.

    Raises:
        AsdmError: not such a file, made for another model, or nothing of it remains; or `file` is not for LoRAs.
    """
    lora, file = Path(lora), Path(file)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    require_lora_file(lora)
    _require_writable(file, lora, checkpoint)
    tensors, metadata = tensors_and_metadata(lora)
    names = Names(unet) if checkpoint is None else FileNames(unet, checkpoint)
    places = {key: place for key in tensors if (place := names.place_of(key)) is not None}
    _require_known([place.path for place in places.values()], names, list(tensors), lora)
    dropped = {place.path for place in places.values() if place.in_student is None}
    kept = {key: place for key, place in places.items() if place.in_student is not None}
    if not kept:
        raise AsdmError(f"{lora}: the student lacks all {len(dropped)} layers that it adapts; nothing would remain")
    for key, place in kept.items():
        _require_fit(key, tensors[key], unet.get_submodule(place.in_student or ""), lora)
    new_keys = {key: names.text_key(key) for key in tensors if key not in places}
    new_keys |= {key: place.new_key for key, place in kept.items()}
    converted = {new: tensors[key] for key, new in new_keys.items()}
    config = adapter_config(metadata, lora)
    metadata.pop(ADAPTER_CONFIG, None)
    if checkpoint is not None:
        converted |= _in_kohyas_form(tensors, new_keys, config, lora)
    elif config:
        metadata[ADAPTER_CONFIG] = json.dumps(names.renamed(config))
    with replacing_file(file) as partial:
        save_file(converted, partial, {"format": "pt", **metadata})
    return ConvertedLora(file, len({place.path for place in kept.values()}), sorted(dropped))


def _in_kohyas_form(
    tensors: Mapping[str, Tensor], new_keys: Mapping[str, str], config: Mapping[str, Any], lora: Path
) -> dict[str, Tensor]:
    """Return what kohya's layout has in another form than diffusers': magnitudes of DoRA, and scales as tensors."""
    found = {}
    for key, new in new_keys.items():
        if "lora_magnitude_vector" in key:
            magnitudes = tensors[key]
            found[new] = magnitudes.reshape(-1, *(1 for _ in range(max(magnitudes.ndim, 2) - 1)))
        if new.endswith(_DOWN):
            rank = tensors[key].shape[0] if tensors[key].ndim else 1
            alpha = alpha_of(config, key, rank, lora)
            if alpha is not None:
                found[f"{new.removesuffix(_DOWN)}.alpha"] = torch.tensor(alpha)
    return found


def _require_writable(file: Path, lora: Path, checkpoint: Path | None) -> None:
    """Raise an AsdmError unless `file` can be written without the loss of anything but another LoRA."""
    if file.suffix != ".safetensors" or file.is_dir():
        raise AsdmError(f"{file}: name a .safetensors file to write")
    if not file.exists():
        return
    if file.samefile(lora):
        raise AsdmError(f"{file}: is the LoRA itself, for the original model; name another file")
    if checkpoint is not None and checkpoint.exists() and file.samefile(checkpoint):
        raise AsdmError(f"{file}: is the student's own file; name another file")
    try:
        with safe_open(file, "pt") as content:
            is_lora = holds_lora(list(content.keys()))
    except (SafetensorError, OSError):
        is_lora = False
    if not is_lora:
        raise AsdmError(f"{file}: exists and holds no LoRA; name another file or remove it")


def _require_known(paths: list[str], names: Names, keys: list[str], lora: Path) -> None:
    """Raise an AsdmError where a LoRA is for none of the layers of a student's original, or for others, too."""
    if keys and all(key.startswith(TEXT) for key in keys):
        raise AsdmError(f"{lora}: adapts the text encoders alone, which a student leaves as they are; use it as it is")
    unknown = [path for path in paths if path not in names.known]
    if unknown and not names.knows_original:
        raise AsdmError(
            f"{lora}: adapts {unknown[0]}, which this model lacks, and its config does not say which model it was made "
            "of, so layers cannot be matched; prune the original again with this version"
        )
    if len(unknown) == len(paths):
        raise AsdmError(f"{lora}: no tensor is for a layer of this model or of its original; take a LoRA made for it")
    if unknown:
        raise AsdmError(
            f"{lora}: adapts {unknown[0]}, which the student's original lacks, too; take a LoRA made for that model"
        )


def _require_fit(key: str, tensor: Tensor, module: Any, lora: Path) -> None:
    """Raise an AsdmError where a LoRA's matrices do not read what the layer reads, or put out what it puts out."""
    if not isinstance(module, nn.Linear | nn.Conv2d) or tensor.ndim < 2:
        return
    outputs, inputs = module.weight.shape[0], module.weight.shape[1:]
    if key.endswith(_READING):
        expected, what, fits = inputs[0], "inputs", tensor.shape[1] in (inputs[0], inputs.numel())  # a kernel as a row
    elif key.endswith(_WRITING):
        expected, what, fits = outputs, "outputs", outputs in tensor.shape[:2]  # the second in Tucker's form of LoHa
    else:
        return
    if not fits:
        found = tensor.shape[1 if what == "inputs" else 0]
        raise AsdmError(
            f"{lora}: {key} is for a layer with {found} {what}, and the student's has {expected}; take a LoRA for the "
            "student's original"
        )
