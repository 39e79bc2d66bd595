"""Modules and examples that have shapes and no memory, for estimates. All of it is used in a FakeTensorMode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from asdm.diffusion.conditioning import Conditioning
from asdm.distillation.recorded import FeatureIndex, Recorded
from asdm.distillation.training_set import TrainingSet
from asdm.families import Denoiser, family_of

Module = TypeVar("Module", bound=nn.Module)


def weightless(module: Module, device: str = "cpu") -> Module:
    """Return the module again, with shapes for its tensors; on the device "meta" outside a FakeTensorMode too."""
    shapes: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        shape = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        shapes[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(module, shapes)


def weightless_examples(denoiser: Denoiser, index: FeatureIndex | None = None) -> TrainingSet:
    """Return what stands in for prepared latents and embeddings and, with an index, for recorded answers."""
    examples = _Examples(denoiser)
    recorded = None if index is None else Recorded(index, _Draws(index))
    return TrainingSet(examples, examples.batch([0])[1], recorded)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Examples:
    """Stands in for prepared latents and embeddings."""

    denoiser: Denoiser
    captions: Sequence[str] = ("",)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Conditioning]:
        family = family_of(self.denoiser)
        inputs = family.random_inputs(self.denoiser, len(indices))
        inputs |= inputs.pop("added_cond_kwargs", {})
        sample, channels = inputs[family.sample_argument], family.predicted_channels(self.denoiser)
        latents, masked = sample[:, :channels], sample[:, channels:]
        given = {field.name: inputs[field.name] for field in fields(Conditioning) if field.name in inputs}
        captions = Conditioning(**given | {"timestep_cond": None})  # which the task makes
        return latents, replace(captions, masked=masked) if masked.numel() else captions


class WeightlessEncoder:
    """Stands in for a semantic encoder that would have to be loaded, and costs nothing."""

    def __call__(self, latents: Tensor, captions: Conditioning) -> Tensor:
        return latents.flatten(1)[:, :1]

    def text_features(self, prompts: list[str]) -> Tensor:
        return torch.empty(len(prompts), 1)


@dataclass(frozen=True)
class _Draws:
    """Stands in for the tensors of recorded draws."""

    index: FeatureIndex

    def read(self, numbers: Tensor, name: str) -> Tensor:
        shape, dtype = self.index.shapes[name]
        is_half = name in self.index.reduced and self.index.key.dtype == "float16"
        return torch.empty((len(numbers), *shape), dtype=torch.float16 if is_half else getattr(torch, dtype))
