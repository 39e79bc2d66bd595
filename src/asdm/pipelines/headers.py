"""What the header of a checkpoint in one file shows: names, shapes and metadata, and what kind of model it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from torch import Tensor

SD_KINDS = ("v1", "v2", "inpainting", "inpainting_v2", "xl_base", "xl_inpaint", "playground-v2-5")
KIND_NAMES = {
    "v1": "SD 1.x", "inpainting": "SD 1.x for inpainting", "inpainting_v2": "SD 2.x for inpainting",
    "v2": "SD 2.x, whose 512-base predicts epsilon", "xl_base": "SDXL", "xl_inpaint": "SDXL for inpainting",
    "upscale": "the upscaler", "instruct-pix2pix": "InstructPix2Pix",
}  # fmt: skip
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Names, shapes and dtypes (as tensors without data) and the metadata of a safetensors file."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def of(cls, path: Path) -> Header:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: torch.empty(each.get_shape(), dtype=_DTYPES.get(each.get_dtype(), torch.uint8), device="meta")
                for name, each in slices.items()
            }
            return cls(path, tensors, file.metadata() or {})

    def marker(self, name: str) -> str | None:
        """Return the tensor of this name, wherever in the checkpoint it is."""
        return next((each for each in self.tensors if each == name or each.endswith(f".{name}")), None)

    def number(self, name: str) -> float | None:
        """Return the value of the tensor of this name, where it has one."""
        found = self.marker(name)
        if found is None or self.tensors[found].numel() != 1:
            return None
        with safe_open(self.path, "pt") as file:
            return float(file.get_tensor(found))


def kind_of(header: Header) -> str:
    """Find the kind of a checkpoint in one file, by diffusers' names (`SD_KINDS` and others).

    SDXL, SD 2.x and inpainting are also found where the tensor is missing by which diffusers knows them.
    """
    try:
        kind: str = infer_diffusers_model_type(header.tensors)
    except (RuntimeError, LookupError, UnboundLocalError):  # it looks into tensors of some, and knows not all
        return "another kind"
    if kind not in ("v1", "inpainting"):
        return kind
    names = header.tensors
    first = names.get("model.diffusion_model.input_blocks.0.0.weight")
    inpaints = first is not None and first.ndim == 4 and first.shape[1] == 9
    if any(name.startswith("conditioner.embedders.1.") for name in names):
        return "xl_inpaint" if inpaints else "xl_base"
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        return "xl_refiner"
    if any(name.endswith("attn2.to_k.weight") and tensor.shape[-1] == 1024 for name, tensor in names.items()):
        return "inpainting_v2" if inpaints else "v2"
    return kind
