"""Latents and prompt embeddings of a data source, as `prepare_data` wrote them: WebDataset shards.

Beside each shard lies where each sample begins, so that a batch can be read from anywhere.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from pydantic import ConfigDict, Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from asdm.diffusion.conditioning import Conditioning, image_size
from asdm.diffusion.kinds import is_inpainting
from asdm.digests import short_digest
from asdm.errors import AsdmError, one_line
from asdm.families import denoiser_of
from asdm.records import Record, read_record

PREPARED = "prepared.json"  # the index of a folder that prepare-data wrote
_REMEDY = "run prepare-data again"
VALUES = 256  # of each parameter, that tell pipelines apart


class _Index(Record):
    """What `PREPARED` says."""

    model_config = ConfigDict(extra="ignore")  # of other versions
    pieces: int = Field(ge=0, description="number of shards")
    made_by: str = Field(description="fingerprint of the pipeline")
    denoiser: str | None = Field(None, description="digest of the one that generated the images; None of real images")


class _Piece(Record):
    """The index of a shard."""

    model_config = ConfigDict(extra="ignore")
    captions: list[str]
    places: list[tuple[NonNegativeInt, NonNegativeInt]] = Field(description="where each sample begins, and its size")
    skipped: dict[str, str] = Field(description="by name, why it is not in the shard")

    @model_validator(mode="after")
    def _belong_together(self) -> _Piece:
        if len(self.captions) != len(self.places):
            raise ValueError(f"{len(self.captions)} captions for {len(self.places)} places")
        return self


class PreparedData:
    """Prepared samples: their captions, and their tensors on demand.

    Raises:
        AsdmError: the folder is not one that was prepared to its end.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = _read_index(folder)
        self.made_by = index.made_by
        self.captions: list[str] = []
        self.skipped: dict[str, str] = {}
        self.folder, places = folder, [np.empty((0, 3), np.int64)]
        for number in range(index.pieces):
            piece = read_piece(piece_path(folder, number))
            self.captions += piece.captions
            self.skipped |= piece.skipped
            places.append(np.array([(number, *place) for place in piece.places], np.int64).reshape(-1, 3))
        # (samples, 3): the number of its shard, where it begins there, its size
        self.places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def identity(self) -> list[str]:
        """What tells these samples from others: the fingerprint of the pipeline, and a digest of the captions."""
        return [self.made_by, short_digest("\n".join(self.captions))]

    def first_latents(self) -> bytes:
        """Return the latents of the first sample of each shard, which tell images from others of the same captions."""
        firsts = {int(place[0]): index for index, place in reversed(list(enumerate(self.places)))}
        latents, _ = self.batch(sorted(firsts.values()))
        return latents.numpy().tobytes()

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Conditioning]:
        """Return latents (batch, 4, h, w) and the captions' embeddings of these samples, in float32."""
        rows = [self._read(*self.places[int(index)]) for index in indices]
        try:
            tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])).float() for name in rows[0]}
            return tensors.pop("latents"), Conditioning(**tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise AsdmError(f"{self.folder}: samples that do not fit together ({one_line(error)}); {_REMEDY}") from None

    def _read(self, number: int, start: int, size: int) -> dict[str, np.ndarray]:
        path = shard_path(self.folder, number)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return _arrays(file.read(size))
        except Exception as error:  # of zipfile and numpy, many kinds
            raise AsdmError(f"{path}: damaged ({one_line(error)}); remove it, and {_REMEDY}") from None


def _read_index(folder: Path) -> _Index:
    return read_record(_Index, folder / PREPARED, "prepared to its end", _REMEDY)


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a sample. They are stored as they are: what is compressed could be of any size."""
    with zipfile.ZipFile(io.BytesIO(content)) as members:
        if any(member.file_size != member.compress_size for member in members.infolist()):
            raise ValueError("compressed arrays")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def read_piece(path: Path) -> _Piece:
    """Read the index of a shard.

    Raises:
        AsdmError: it is damaged.
    """
    return read_record(_Piece, path, "the index of a shard", f"remove it, and {_REMEDY}")


def is_prepared(data: str | Path) -> bool:
    """Return whether `data` names a folder that `prepare_data` wrote."""
    return os.path.isfile(Path(data) / PREPARED)


def open_prepared(pipeline: DiffusionPipeline, data: str | Path) -> PreparedData:
    """Open what `prepare_data` made of a source with this pipeline.

    Raises:
        AsdmError: it was not prepared to its end, or with another model.
    """
    prepared = PreparedData(data)
    if prepared.made_by != fingerprint(pipeline):
        raise AsdmError(f"{data}: prepared by another model, or at another image size; prepare it with this one")
    return prepared


def require_own_images(teacher: DiffusionPipeline, data: str | Path) -> None:
    """Raise an AsdmError where the images of prepared data were generated from captions by another denoiser than the
    teacher's. Decoders and calibration take those of any."""
    if _read_index(Path(data)).denoiser not in (None, digest_of(denoiser_of(teacher))):
        raise AsdmError(
            f"{data}: its images were generated by another model than this teacher; prepare the captions with this one"
        )


def fingerprint(pipeline: DiffusionPipeline) -> str:
    """Return what tells the latents and embeddings of one pipeline from another's: its VAE, text encoders and image
    size."""
    parts = [getattr(pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")]
    about = [image_size(pipeline), is_inpainting(pipeline), *(digest_of(part) for part in parts if part is not None)]
    return short_digest(json.dumps(about))


def digest_of(module: nn.Module) -> str:
    """Return a digest of the signs of some values of each parameter. Half precision keeps them, and training turns
    some."""
    signs = []
    for parameter in module.parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // VALUES)][:VALUES]
        signs.append(torch.signbit(some).cpu().numpy().tobytes())
    return short_digest(*signs)


def prepared_captions(folder: Path) -> list[str]:
    """Return the captions of a folder that was prepared."""
    pieces = [read_piece(path) for path in sorted(folder.glob("[0-9]*.json"))]
    return [caption for piece in pieces for caption in piece.captions]


def shard_path(folder: Path, number: int) -> Path:
    """Return a piece's tensors and captions."""
    return folder / f"{number:05d}.tar"


def piece_path(folder: Path, number: int) -> Path:
    """Return the index of a piece's shard; it is there once the shard is whole."""
    return folder / f"{number:05d}.json"


def missing_path(folder: Path, number: int) -> Path:
    """Why a piece could not be read."""
    return folder / f"{number:05d}.unread.txt"
