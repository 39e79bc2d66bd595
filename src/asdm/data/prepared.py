"""Latents and prompt embeddings of a data source, as `prepare_data` wrote them: WebDataset shards.

Beside each shard lies where each sample begins, so that a batch can be read from anywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm.diffusion.conditioning import Conditioning, image_size
from asdm.diffusion.kinds import is_inpainting
from asdm.errors import AsdmError

PREPARED = "prepared.json"  # the index of a folder that prepare-data wrote
VALUES = 256  # of each parameter, that tell pipelines apart


class PreparedData:
    """Prepared samples: their captions, and their tensors on demand.

    Raises:
        AsdmError: the folder is not one that was prepared to its end.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        try:
            index = json.loads((folder / PREPARED).read_text("utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise AsdmError(f"{folder}: not prepared to its end; run prepare-data again ({error})") from None
        self.made_by: str = index["made_by"]
        self.captions: list[str] = []
        self.skipped: dict[str, str] = {}
        self.folder, places = folder, [np.empty((0, 3), np.int64)]
        for number in range(index["pieces"]):
            piece = json.loads(piece_path(folder, number).read_text("utf-8"))
            self.captions += piece["captions"]
            self.skipped |= piece["skipped"]
            places.append(np.array([(number, *place) for place in piece["places"]], np.int64).reshape(-1, 3))
        # (samples, 3): the number of its shard, where it begins there, its size
        self.places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Conditioning]:
        """Return latents (batch, 4, h, w) and the captions' embeddings of these samples, in float32."""
        rows = [self._read(*self.places[int(index)]) for index in indices]
        tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])).float() for name in rows[0]}
        return tensors.pop("latents"), Conditioning(**tensors)

    def _read(self, number: int, start: int, size: int) -> dict[str, np.ndarray]:
        with shard_path(self.folder, number).open("rb") as file:
            file.seek(start)
            with np.load(io.BytesIO(file.read(size))) as arrays:
                return dict(arrays)


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


def fingerprint(pipeline: DiffusionPipeline) -> str:
    """Return what tells the latents and embeddings of one pipeline from another's: its VAE, text encoders and image
    size."""
    parts = [getattr(pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")]
    about = [image_size(pipeline), is_inpainting(pipeline), *(digest_of(part) for part in parts if part is not None)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def digest_of(module: nn.Module) -> str:
    """Return a digest of the signs of some values of each parameter. Half precision keeps them, and training turns
    some."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // VALUES)][:VALUES]
        digest.update(torch.signbit(some).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def prepared_captions(folder: Path) -> list[str]:
    """Return the captions of a folder that was prepared."""
    pieces = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("[0-9]*.json"))]
    return [caption for piece in pieces for caption in piece["captions"]]


def shard_path(folder: Path, number: int) -> Path:
    """Return a piece's tensors and captions."""
    return folder / f"{number:05d}.tar"


def piece_path(folder: Path, number: int) -> Path:
    """Return the index of a piece's shard; it is there once the shard is whole."""
    return folder / f"{number:05d}.json"


def missing_path(folder: Path, number: int) -> Path:
    """Why a piece could not be read."""
    return folder / f"{number:05d}.unread.txt"
