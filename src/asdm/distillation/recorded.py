"""What a teacher answered on fixed draws, read from disk instead of computed at each step.

A draw is an image with its caption, time step and noise, as a training step reads it. `asdm.distillation.recording`
writes what is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.utils._pytree import tree_unflatten, treespec_loads

from asdm.choices import FeatureDtype
from asdm.data.draws import Draws
from asdm.data.prepared import PreparedData
from asdm.diffusion.conditioning import Conditioning
from asdm.digests import short_digest
from asdm.distillation.stages import Stage
from asdm.errors import AsdmError
from asdm.records import Record, read_record

FOLDER = "teacher-features"  # in a folder of prepared data
INDEX, KEY = "index.json", "key.json"
SAMPLING = ("caption_dropout", "caption_mixing", "timestep_sampling", "min_timestep_fraction")
CAPTIONS, PREDICTION = "captions.", "prediction"


class FeatureKey(Record):
    """What recorded features depend on: they are read by no other teacher, data or sampling."""

    teacher: str = Field(description="Digest of the teacher's weights.")
    predicts: str = Field(description="What the teacher predicts.")
    data: str = Field(description="Digest of the prepared data.")
    dtype: FeatureDtype = Field(description="What the features are stored in.")
    inputs: bool = Field(description="Whether the blocks' inputs are recorded too, for incubation.")
    sampling: dict[str, Any] = Field(description="The stage's fields that draws depend on.")
    batch_size: int = Field(description="Draws that are made together, as in a training step.")
    seed: int = Field(description="Seed of the draws.")


class BlockRecord(Record):
    """A block's answer: the name of the tensor with its image states and, if recorded, its whole call."""

    features: str = Field(description="Name of the tensor.")
    structure: str | None = Field(None, description="Structure of (args, kwargs, output), as torch's pytree writes it.")
    leaves: list[Any] = Field([], description='Its leaves: {"tensor": name}, or a value.')


class FeatureIndex(Record):
    """What is recorded: the key, how many draws, the names and shapes of their tensors, and the blocks' answers."""

    key: FeatureKey
    draws: int = Field(description="Number of draws.")
    shapes: dict[str, tuple[list[int], str]] = Field(description="Shape and dtype of each tensor of a draw.")
    reduced: list[str] = Field(description="Names of the tensors that are stored in the key's dtype.")
    blocks: dict[str, BlockRecord] = Field(description="The teacher's blocks by name.")


class DrawSource(Protocol):
    """Gives the tensors of draws by name."""

    def read(self, numbers: Tensor, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Recorded:
    """Recorded answers of a teacher: the index, and where its tensors are."""

    index: FeatureIndex
    source: DrawSource

    def __len__(self) -> int:
        return self.index.draws

    @property
    def identity(self) -> str:
        """What tells these draws from others."""
        return short_digest(f"{self.index.draws} {self.index.key.model_dump_json()}")

    def batch(self, numbers: Tensor, device: torch.device) -> RecordedBatch:
        """Return draws (batch,) by number; their tensors are read when they are asked for."""
        return RecordedBatch(self, numbers, device)

    def require_drawn_for(self, stage: Stage) -> None:
        """
        Raises:
            AsdmError: the stage samples otherwise, or needs what is not recorded.
        """
        for name, value in self.index.key.sampling.items():
            if getattr(stage, name) != value:
                raise AsdmError(
                    f"stage {stage.name}: {name}={getattr(stage, name)}, and the teacher's features were recorded with "
                    f"{value}; change the stage, or record them with its recipe: asdm prepare-data --recipe"
                )
        if stage.scope == "incubate" and not self.index.key.inputs:
            raise AsdmError(
                f"stage {stage.name}: the inputs of the teacher's blocks are not recorded; record them with this "
                "recipe: asdm prepare-data --recipe"
            )


class RecordedBatch:
    """Draws of one batch, on a device; a tensor is read once."""

    def __init__(self, recorded: Recorded, numbers: Tensor, device: torch.device):
        self.index, self.source = recorded.index, recorded.source
        self.numbers, self.device = numbers, device
        self._read: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor (batch, ...); numbers with a fraction in float32."""
        if name not in self._read:
            tensor = self.source.read(self.numbers, name).to(self.device)
            self._read[name] = tensor.float() if tensor.is_floating_point() else tensor
        return self._read[name]

    @property
    def captions(self) -> Conditioning:
        """The captions as both networks read them."""
        names = [name for name in self.index.shapes if name.startswith(CAPTIONS)]
        return Conditioning(**{name.removeprefix(CAPTIONS): self.tensor(name) for name in names})

    @property
    def prediction(self) -> Tensor:
        """The teacher's prediction (batch, channels, h, w)."""
        return self.tensor(PREDICTION)

    def features(self, block: str) -> Tensor:
        """Return the image states that one of the teacher's blocks put out."""
        return self.tensor(self.index.blocks[block].features)

    def call(self, block: str) -> tuple[Any, Any, Any]:
        """Return the arguments of one of the teacher's blocks, by place and by name, and its output."""
        record = self.index.blocks[block]
        assert record.structure is not None
        leaves = [self.tensor(leaf["tensor"]) if isinstance(leaf, dict) else leaf for leaf in record.leaves]
        return tree_unflatten(leaves, treespec_loads(record.structure))


def data_digest(prepared: PreparedData) -> str:
    """Return what tells prepared data from other data: the model, the captions, and some latents of each shard."""
    about = f"{prepared.made_by} {len(prepared)}\n"
    return short_digest(about, "\n".join(prepared.captions), prepared.first_latents())


def has_features(data: str | Path) -> bool:
    """Return whether features were recorded to their end in a folder of prepared data."""
    return (Path(data) / FOLDER / INDEX).is_file()


def open_recorded(prepared: PreparedData, teacher: str, predicts: str) -> Recorded:
    """Open the features that were recorded in a folder of prepared data.

    Args:
        teacher: digest of the teacher.
        predicts: what it predicts.

    Raises:
        AsdmError: there are none, they are not whole, or they are of another teacher or other data.
    """
    folder = prepared.folder / FOLDER
    if not has_features(prepared.folder):
        raise AsdmError(
            f"{prepared.folder}: no teacher features, or not all; run asdm prepare-data MODEL DATA --out "
            f"{prepared.folder} --teacher-features float16"
        )
    index = read_index(folder)
    now = {"teacher": teacher, "predicts": predicts, "data": data_digest(prepared)}
    changed = [name for name, value in now.items() if getattr(index.key, name) != value]
    if changed:
        raise AsdmError(
            f"{folder}: recorded of another {' and of other '.join(changed).replace('predicts', 'prediction type')}; "
            "remove this folder and record again, or prepare another"
        )
    return Recorded(index, Draws(folder, index.key.dtype, index.reduced))


def read_index(folder: Path) -> FeatureIndex:
    """Read the index of recorded features.

    Raises:
        AsdmError: it is damaged.
    """
    remedy = "remove it and run prepare-data again"
    return read_record(FeatureIndex, folder / INDEX, "an index of teacher features", remedy)
