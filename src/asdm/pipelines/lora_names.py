"""The keys of LoRA files: which layer of a student's original a key is for, and its key for the student.

A student has its layers' names in two places, which differ: its folder has the modules' names, and the one file that
`export_checkpoint` wrote has the original code's, numbered without what was removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import LDM_UNET_KEY
from safetensors import safe_open

from asdm.choices import Program
from asdm.errors import AsdmError
from asdm.families import family_of
from asdm.families.records import OriginalLayout
from asdm.pipelines.tensor_faults import OF_TEXT, require_safetensors

TEXT = ("lora_te", "text_encoder")
_KOHYA = "lora_unet_"
_FLAT = (_KOHYA, "lycoris_unet_", "lycoris_")
_DOTTED = ("unet.", "base_model.model.", "")
_ORIGINAL_BLOCKS = ("input_blocks_", "middle_block_", "output_blocks_")
_PROCESSOR = ".processor."  # of an attention, behind which older versions of diffusers have its layers' names
_TO_KOHYA = (  # ends of keys, diffusers' and kohya's
    (r"[._]lora(?:_linear_layer)?\.(down|up)\.weight", r".lora_\1.weight"),
    (r"\.lora_A(?:\.default)?\.weight", ".lora_down.weight"),
    (r"\.lora_B(?:\.default)?\.weight", ".lora_up.weight"),
    (r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", ".dora_scale"),
)
_LAYER = re.compile(r"(.+?)([._]lora[_.].+|\.(?:alpha|dora_scale|diff|diff_b|(?:hada|lokr)_\w+))")


def holds_lora(keys: list[str]) -> bool:
    """Return whether a file with these keys is a LoRA's."""
    return any("lora" in key.lower() or ".hada_" in key or ".lokr_" in key for key in keys)


@dataclass(frozen=True)
class Place:
    """A layer of the original: its path there, its path in the student (None: the student lacks it), the new key."""

    path: str
    in_student: str | None
    new_key: str = ""


class Names:
    """Resolves the keys of LoRA files for the folder of a student. The names are those of its modules.

    `known`: paths of the original's modules. `in_student`: from these to the student's paths.
    """

    def __init__(self, student: Any):
        family, model = family_of(student), student
        paths = {name: name for name, _ in student.named_modules() if name}
        while (made_from := family.made_from(model)) is not None:
            paths = {family.teacher_key(path, model, made_from): own for path, own in paths.items()}
            model = made_from
        self.knows_original = model is not student
        self.in_student = paths
        self.known = {name for name, _ in model.named_modules() if name}
        self._layers = {name for name, module in model.named_modules() if not list(module.children())}
        self._flat = {path.replace(".", "_"): path for path in self.known}
        self._flat_in_original_code = {_flat(name): path for path, name in _layers(_layout(model, None)).items()}

    def place_of(self, key: str) -> Place | None:
        """Return the layer that a key is for; None where it is for none of the denoiser's."""
        start = next((each for each in _FLAT if key.startswith(each)), None)
        return self._dotted_place(key) if start is None else self._flat_place(key, start)

    def text_key(self, key: str) -> str:
        """Return the key of what is for none of the denoiser's layers."""
        return key

    def _flat_place(self, key: str, start: str) -> Place | None:
        name, dot, rest = key.removeprefix(start).partition(".")
        path = self._flat.get(name) or self._flat_in_original_code.get(name)
        if path is None:
            return Place(name, None) if start.endswith("unet_") else None
        own = self.in_student.get(path)
        return Place(path, None) if own is None else self._flat_in_student(path, own, start, name, dot + rest)

    def _dotted_place(self, key: str) -> Place | None:
        for start in _DOTTED:
            inside = key.removeprefix(start)
            path = next((each for each in _parents(inside) if each in self.known), None)
            if key.startswith(start) and path is not None:
                own, rest = self.in_student.get(path), inside.removeprefix(path)
                if path not in self._layers and not rest.startswith(_PROCESSOR):
                    return Place(inside.rpartition(".lora")[0] or inside, None)
                return Place(path, None) if own is None else self._dotted_in_student(path, own, start, rest)
        return Place(key.removeprefix(_DOTTED[0]), None) if key.startswith(_DOTTED[0]) else None

    def _flat_in_student(self, path: str, own: str, start: str, name: str, rest: str) -> Place:
        # diffusers reads the original code's names of layers outside the blocks, which have no numbers, and drops those
        # of layers in blocks where others have its own names.
        is_ours = name in self._flat or name.startswith(_ORIGINAL_BLOCKS)
        return Place(path, own, f"{start}{_flat(own) if is_ours else name}{rest}")

    def _dotted_in_student(self, path: str, own: str, start: str, rest: str) -> Place:
        return Place(path, own, f"{start}{own}{rest}")

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


class FileNames(Names):
    """Resolves the keys of LoRA files for the one file of a student, in kohya's layout with the names of that file.

    ComfyUI, Forge, A1111 and stable-diffusion.cpp take these names as they are. They compute the place of diffusers'
    names by the numbers of layers, for which each has its own rule, and none fits all students.
    """

    def __init__(self, student: Any, checkpoint: Path):
        super().__init__(student)
        layout = _layout_of_file(student, checkpoint)
        self._in_file = _layers(layout)
        self._text_starts = {
            "text_encoder.": "lora_te1_" if layout.kind == "sdxl" else "lora_te_",
            "text_encoder_2.": "lora_te2_",
        }

    def text_key(self, key: str) -> str:
        """Return the key of what is for none of the denoiser's layers, in kohya's layout."""
        start = next((each for each in self._text_starts if key.startswith(each)), None)
        found = _LAYER.fullmatch(key.removeprefix(start or ""))
        if start is None or found is None:
            return key
        layer = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", OF_TEXT.sub("", found[1]))  # as older versions had them
        model = "" if layer.startswith("text_projection") else "text_model_"
        return f"{self._text_starts[start]}{model}{_flat(layer)}{_kohya_end(key, found[2])}"

    def _flat_in_student(self, path: str, own: str, start: str, name: str, rest: str) -> Place:
        return self._dotted_in_student(path, own, start, rest)

    def _dotted_in_student(self, path: str, own: str, start: str, rest: str) -> Place:
        if rest.startswith(_PROCESSOR):
            layer, _, end = rest.removeprefix(_PROCESSOR).partition("_lora")
            own = f"{own}.{layer}.0" if layer == "to_out" else f"{own}.{layer}"
            rest = end if end == ".alpha" else f"_lora{end}"
        name = self._in_file.get(own)
        return Place(path, None) if name is None else Place(path, own, f"{_KOHYA}{_flat(name)}{_kohya_end(own, rest)}")


def _kohya_end(key: str, end: str) -> str:
    for theirs, kohya in _TO_KOHYA:
        if re.fullmatch(theirs, end):
            return re.sub(theirs, kohya, end)
    if ".lora_A" in end or ".lora_B" in end:
        raise AsdmError(
            f"{key}: the LoRA has its {end.removeprefix('.')}, for which kohya's layout has no place; convert it for "
            "the student's folder"
        )
    return end


def _layout(model: Any, program: Program | None) -> OriginalLayout | None:
    """Return a model's layout in the original code; None where it has no place for the model."""
    try:
        return family_of(model).original_layout(model, program)
    except AsdmError:
        return None


def _layout_of_file(student: Any, checkpoint: Path) -> OriginalLayout:
    """Return the layout that a student's file has: with stable-diffusion.cpp's numbers or those of all others."""
    require_safetensors(checkpoint)
    with safe_open(checkpoint, "pt") as content:
        keys = set(content.keys())
    layouts = (_layout(student, program) for program in (None, "sdcpp"))
    found = next((each for each in layouts if each is not None and keys.issuperset(each.names.values())), None)
    if found is None:
        raise AsdmError(
            f"{checkpoint}: its tensors are not those of the student in the original code's layout; name the file that "
            "`asdm export --to checkpoint` wrote of it, or the student's folder"
        )
    return found


def _layers(layout: OriginalLayout | None) -> dict[str, str]:
    """Return the names of layers in the original code by their paths."""
    names = {} if layout is None else layout.names
    return {
        tensor.rpartition(".")[0]: name.removeprefix(LDM_UNET_KEY).rpartition(".")[0] for tensor, name in names.items()
    }


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
