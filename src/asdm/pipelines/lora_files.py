"""LoRA files for an original model, rewritten for a student whose layers have other numbers.

Two layouts are read. kohya's names are flat: `lora_unet_down_blocks_0_..` or, for SDXL, those of the original code,
`lora_unet_input_blocks_4_..`. diffusers' are paths: `unet.down_blocks.0..`. A file keeps its layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from asdm import checks
from asdm.errors import AsdmError, one_line
from asdm.families import Denoiser, family_of
from asdm.files import replacing_file
from asdm.pipelines.names import PICKLE_SUFFIXES
from asdm.pipelines.tensor_faults import require_safetensors
from asdm.reading import parse_json

_FLAT = ("lora_unet_", "lycoris_unet_", "lycoris_")
_TEXT = ("lora_te", "text_encoder")
_DOTTED = ("unet.", "base_model.model.", "")
# Matrices (rank, the input of the layer that they adapt), and those (its output, rank), LoHa's included.
_READING = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "hada_w1_b", "hada_w2_b")
_WRITING = ("lora_up.weight", "lora_B.weight", "lora.up.weight", "hada_w1_a", "hada_w2_a")
_PROCESSOR = ".processor."  # of an attention, behind which older versions of diffusers have its layers' names
_ADAPTER_CONFIG = "lora_adapter_metadata"  # of diffusers: ranks and scales by the layers' names


@dataclass(frozen=True)
class ConvertedLora:
    """The file of a converted LoRA: how many layers it adapts, and the names of those that the student lacks."""

    file: Path
    kept: int
    dropped: list[str]


@checks.arguments(lora=checks.path, unet=checks.UNET, file=checks.path)
def convert_lora(lora: str | Path, unet: Denoiser, file: str | Path) -> ConvertedLora:
    """Rewrite a LoRA file for the original model with a student's numbers, without layers that the student lacks.

    What is for the text encoders stays as it is.

    Args:
        lora: a `.safetensors` file in kohya's or diffusers' layout.
        unet: the student; its weights are not read.
        file: the `.safetensors` file to write.

    Raises:
        AsdmError: not such a file, made for another model, or nothing of it remains.
    """
    lora, file = Path(lora), Path(file)
    _require_files(lora, file)
    with safe_open(lora, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        metadata = content.metadata() or {}
    names = _Names(unet)
    places = {key: names.place_of(key) for key in tensors}
    _require_known([place.path for place in places.values() if place is not None], names, list(tensors), lora)
    converted: dict[str, Tensor] = {}
    kept, dropped = set(), set()
    for key, tensor in tensors.items():
        place = places[key]
        if place is None:
            converted[key] = tensor
            continue
        if place.in_student is None:
            dropped.add(place.path)
            continue
        kept.add(place.path)
        _require_fit(key, tensor, unet.get_submodule(place.in_student), lora)
        converted[place.new_key] = tensor
    if not kept:
        raise AsdmError(f"{lora}: the student lacks all {len(dropped)} layers that it adapts; nothing would remain")
    if _ADAPTER_CONFIG in metadata:
        metadata[_ADAPTER_CONFIG] = json.dumps(names.renamed(_adapter_config(metadata, lora)))
    with replacing_file(file) as partial:
        save_file(converted, partial, {"format": "pt", **metadata})
    return ConvertedLora(file, len(kept), sorted(dropped))


def _adapter_config(metadata: dict[str, str], lora: Path) -> Any:
    try:
        return parse_json(metadata[_ADAPTER_CONFIG])
    except ValueError as error:
        raise AsdmError(f"{lora}: its metadata {_ADAPTER_CONFIG} is damaged ({one_line(error)})") from None


def _require_files(lora: Path, file: Path) -> None:
    if lora.suffix in PICKLE_SUFFIXES:
        raise AsdmError(f"{lora}: a pickle, which can run code when loaded; convert it to .safetensors first")
    if not lora.is_file():
        raise AsdmError(f"{lora}: no such file; name a LoRA's .safetensors file")
    require_safetensors(lora)
    if file.suffix != ".safetensors" or file.is_dir():
        raise AsdmError(f"{file}: name a .safetensors file to write")
    if file.exists() and file.samefile(lora):
        raise AsdmError(f"{file}: is the LoRA itself, for the original model; name another file")


def _require_known(paths: list[str], names: _Names, keys: list[str], lora: Path) -> None:
    """Raise an AsdmError where a LoRA is for none of the layers of a student's original, or for others, too."""
    if keys and all(key.startswith(_TEXT) for key in keys):
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


@dataclass(frozen=True)
class _Place:
    """A layer of the original: its path there, its path in the student (None: the student lacks it), the new key."""

    path: str
    in_student: str | None
    new_key: str = ""


class _Names:
    """Resolves the keys of LoRA files for a student's original.

    `known`: paths of the original's modules. `in_student`: from these to the student's paths.
    """

    def __init__(self, student: Any):
        family, model = family_of(student), student
        paths = {name: name for name, _ in student.named_modules() if name}
        while (made_from := family.made_from(model)) is not None:
            paths = {family.teacher_key(path, model, made_from): own for path, own in paths.items()}
            model = made_from
        self.student = student
        self.knows_original = model is not student
        self.in_student = paths
        self.known = {name for name, _ in model.named_modules() if name}
        self._layers = {name for name, module in model.named_modules() if not list(module.children())}
        self._flat = {path.replace(".", "_"): path for path in self.known}
        self._flat_in_original_code = {name.replace(".", "_"): path for path, name in _originally(model).items()}

    def place_of(self, key: str) -> _Place | None:
        """Return the layer that a key is for; None where it is for none of the denoiser's."""
        start = next((each for each in _FLAT if key.startswith(each)), None)
        return self._dotted_place(key) if start is None else self._flat_place(key, start)

    def _flat_place(self, key: str, start: str) -> _Place | None:
        name, _, rest = key.removeprefix(start).partition(".")
        path = self._flat.get(name) or self._flat_in_original_code.get(name)
        if path is None:
            return _Place(name, None) if start.endswith("unet_") else None
        own = self.in_student.get(path)
        if own is None:
            return _Place(path, None)
        new = own if name in self._flat else self._originally_in_student[own]
        return _Place(path, own, f"{start}{new.replace('.', '_')}.{rest}")

    def _dotted_place(self, key: str) -> _Place | None:
        for start in _DOTTED:
            inside = key.removeprefix(start)
            path = next((each for each in _parents(inside) if each in self.known), None)
            if key.startswith(start) and path is not None:
                own, rest = self.in_student.get(path), inside.removeprefix(path)
                if path not in self._layers and not rest.startswith(_PROCESSOR):
                    return _Place(inside.rpartition(".lora")[0] or inside, None)
                return _Place(path, own, f"{start}{own}{rest}")
        return _Place(key.removeprefix(_DOTTED[0]), None) if key.startswith(_DOTTED[0]) else None

    @cached_property
    def _originally_in_student(self) -> dict[str, str]:
        found = _originally(self.student)
        if not found:
            raise AsdmError(
                "the LoRA has the original code's names, which has no place for this student's edits; take a LoRA with "
                "diffusers' names, or a student of `asdm plan --portable`"
            )
        return found

    def renamed(self, content: Any) -> Any:
        """Return a config with the paths of layers, as list items and keys, renamed; those of dropped ones go."""
        if isinstance(content, Mapping):
            return {new: self.renamed(value) for key, value in content.items() if (new := self._new(key)) is not None}
        if isinstance(content, list):
            return [new for each in content if (new := self._new(each)) is not None]
        return content

    def _new(self, name: Any) -> Any:
        place = self.place_of(f"{name}.") if isinstance(name, str) and "." in name else None
        if place is None or place.path not in self.known:
            return name
        return None if place.in_student is None else place.new_key.removesuffix(".")


def _originally(model: Any) -> dict[str, str]:
    """Return the layers' names in the original code; empty where it has no place for the model."""
    start = "model.diffusion_model."
    try:
        names = family_of(model).original_layout(model, None).names
    except AsdmError:
        return {}
    found = {}
    for tensor, name in names.items():
        found[tensor.rpartition(".")[0]] = name.removeprefix(start).rpartition(".")[0]
    return found


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
