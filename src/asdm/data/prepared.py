"""Latents and prompt embeddings of a data source, computed once and kept in WebDataset shards.

A shard is written for each piece of the source (`asdm.data.sources`), by whichever process of a launch has that
piece, and is whole or absent; beside it lies where each sample begins, so that a batch can be read from anywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm import checks
from asdm.data.sources import PIECE, PREPARED, Example, Source, Unread, Unusable, load_pixels, open_source, unusable
from asdm.devices import LONGEST_WAIT
from asdm.diffusion.conditioning import (
    Conditioning,
    decode_latents,
    embed_prompts,
    encode_images,
    image_size,
    masked_latents,
)
from asdm.diffusion.generation import default_guidance, nothing_to_keep, require_steps
from asdm.diffusion.kinds import is_inpainting, is_random
from asdm.errors import AsdmError
from asdm.files import MARKER, read_marker, replacing_file, require_ours, write_text

Progress = Callable[[int, int], None]
VALUES = 256  # of each parameter, that tell pipelines apart


class PreparedData:
    """Samples that were prepared: their captions, and their tensors on demand.

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
            piece = json.loads(_beside(folder, number).read_text("utf-8"))
            self.captions += piece["captions"]
            self.skipped |= piece["skipped"]
            places.append(np.array([(number, *place) for place in piece["places"]], np.int64).reshape(-1, 3))
        # (samples, 3): the number of its shard, where it begins there, its size
        self.places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Conditioning]:
        """Latents (batch, 4, h, w) and the captions' embeddings of these samples, in float32."""
        rows = [self._read(*self.places[int(index)]) for index in indices]
        tensors = {name: torch.from_numpy(np.stack([row[name] for row in rows])).float() for name in rows[0]}
        return tensors.pop("latents"), Conditioning(**tensors)

    def _read(self, number: int, start: int, size: int) -> dict[str, np.ndarray]:
        with _shard(self.folder, number).open("rb") as file:
            file.seek(start)
            with np.load(io.BytesIO(file.read(size))) as arrays:
                return dict(arrays)


def is_prepared(data: str | Path) -> bool:
    """Whether `data` names a folder that `prepare_data` wrote."""
    return os.path.isfile(Path(data) / PREPARED)


def open_prepared(pipeline: DiffusionPipeline, data: str | Path) -> PreparedData:
    """What `prepare_data` made of a source with this pipeline.

    Raises:
        AsdmError: it was not prepared to its end, or with another model.
    """
    prepared = PreparedData(data)
    if prepared.made_by != fingerprint(pipeline):
        raise AsdmError(f"{data}: prepared by another model, or at another image size; prepare it with this one")
    return prepared


def require_usable(data: str | Path) -> None:
    """Raise an AsdmError unless `data` names a source with at least one example that looks usable."""
    _require_usable(open_source(data), data)


@checks.arguments(
    pipeline=checks.PIPELINE,
    data=checks.path,
    folder=checks.path,
    batch_size=checks.whole(1, 10**6),
    steps=checks.STEPS,
    seed=checks.SEED,
    ignore_missing_shards=checks.flag,
    progress=checks.function,
)
@torch.no_grad()
def prepare_data(
    pipeline: DiffusionPipeline,
    data: str | Path,
    folder: str | Path,
    *,
    batch_size: int = 16,
    steps: int = 25,
    seed: int = 0,
    ignore_missing_shards: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Write latents and caption embeddings of a source's training examples, in float16, as shards into `folder`.

    Called again, goes on with the pieces that are not there yet; the processes of a launch share them.

    Args:
        data: as for `open_source`; of captions alone the pipeline draws the images itself, in `steps` steps.
        ignore_missing_shards: go without shards that cannot be loaded from afar, or with what came of them.
        progress: called with pieces done and in all.

    Raises:
        AsdmError: the source cannot be used, or some of it did not come, when all else is prepared; or `folder` is not
            ours or holds another source's or another model's.
    """
    require_steps(pipeline, steps)
    folder = Path(folder)
    made_by = fingerprint(pipeline)
    if is_prepared(data):
        raise AsdmError(f"{data}: prepared already; give it to distill as it is")
    source = open_source(data)
    if is_prepared(folder):
        _require_same(folder, data, source, made_by)
        return PreparedData(folder)
    require_ours(folder, "prepared")
    state = PartialState(cpu=pipeline.device.type == "cpu", timeout=LONGEST_WAIT)
    if state.is_main_process:
        _require_usable(source, data)
        if (folder / MARKER).is_file():
            _require_same(folder, data, source, made_by)
        about = {"kind": "prepared", "source": _identity(source), "made_by": made_by}
        write_text(folder / MARKER, json.dumps(about, indent=1) + "\n")
    state.wait_for_everyone()
    mine = range(state.process_index, len(source), state.num_processes)
    for number in mine:
        if not _beside(folder, number).is_file():
            try:
                _write_piece(pipeline, source, number, folder, batch_size, steps, seed, ignore_missing_shards)
            except _UnreadError as error:
                write_text(_unread(folder, number), f"{error}\n")
        if progress is not None:
            progress(mine.index(number) + 1, len(mine))
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, data, len(source), made_by)
    state.wait_for_everyone()
    return PreparedData(folder)


def fingerprint(pipeline: DiffusionPipeline) -> str:
    """What tells the latents and embeddings of one pipeline from another's: its VAE, text encoders and image size."""
    parts = [getattr(pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")]
    about = [image_size(pipeline), is_inpainting(pipeline), *(digest_of(part) for part in parts if part is not None)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def digest_of(module: nn.Module) -> str:
    """Of the signs of values from all over each parameter: they are the same in half precision, and what is trained
    turns some."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // VALUES)][:VALUES]
        digest.update(torch.signbit(some).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _finish(folder: Path, data: str | Path, pieces: int, made_by: str) -> None:
    """Write the index of a folder whose pieces are all there.

    Raises:
        AsdmError: one is not, or nothing in them can be used.
    """
    absent = [number for number in range(pieces) if not _beside(folder, number).is_file()]
    if absent:
        reason = _unread(folder, absent[0]).read_text("utf-8").strip()
        raise AsdmError(
            f"{data}: {len(absent)} of {pieces} shards did not come ({reason}); run again to go on with those, or "
            "leave them out: asdm prepare-data --ignore-missing-shards"
        )

    def about() -> Iterator[dict[str, Any]]:
        return (json.loads(_beside(folder, number).read_text("utf-8")) for number in range(pieces))

    if not any(piece["places"] for piece in about()):
        raise unusable(data, {name: reason for piece in about() for name, reason in piece["skipped"].items()})
    write_text(folder / PREPARED, json.dumps({"pieces": pieces, "made_by": made_by}) + "\n")


class _UnreadError(Exception):
    """A piece did not come."""


def _write_piece(
    pipeline: DiffusionPipeline,
    source: Source,
    number: int,
    folder: Path,
    batch_size: int,
    steps: int,
    seed: int,
    ignore_missing_shards: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    captions: list[str] = []
    places: list[tuple[int, int]] = []
    skipped: dict[str, str] = {}
    batch: list[Example] = []
    with replacing_file(_shard(folder, number)) as partial, tarfile.open(partial, "w") as shard:

        def flush() -> None:
            for example, tensors in _tensors(pipeline, batch, skipped, steps, generator):
                key = f"{number:05d}-{len(captions):05d}"
                content = io.BytesIO()
                np.savez(content, **tensors)
                places.append(_add(shard, f"{key}.npz", content.getvalue()))
                _add(shard, f"{key}.txt", example.caption.encode())
                captions.append(example.caption)
            batch.clear()

        for row in source.read(number):
            if isinstance(row, Unread) and not ignore_missing_shards:
                raise _UnreadError(f"{row.name}: {row.reason}")
            if isinstance(row, Unusable):
                skipped[row.name] = row.reason
                continue
            batch.append(row)
            if len(batch) == batch_size:
                flush()
        if batch:
            flush()
    about = {"captions": captions, "places": places, "skipped": skipped}
    write_text(_beside(folder, number), json.dumps(about) + "\n")
    _unread(folder, number).unlink(missing_ok=True)


def _tensors(
    pipeline: DiffusionPipeline,
    batch: list[Example],
    skipped: dict[str, str],
    steps: int,
    generator: torch.Generator,
) -> list[tuple[Example, dict[str, Any]]]:
    """What is kept of each example of a batch that can be decoded, as arrays."""
    if batch[0].file is None:
        captions = [example.caption for example in batch]
        options = {"num_inference_steps": steps, "guidance_scale": default_guidance(pipeline), "generator": generator}
        latents = pipeline(captions, output_type="latent", **options, **nothing_to_keep(pipeline)).images
        images = None
    else:
        batch, pixels = load_pixels(batch, image_size(pipeline), skipped)
        if not pixels:
            return []
        images = torch.stack(pixels)
        latents = encode_images(pipeline.vae, images)
    if not (torch.isfinite(latents).all() or is_random(pipeline)):
        raise AsdmError(
            f"{batch[0].name}: its latents are no numbers (NaN): the pipeline's weights are damaged, or its precision "
            "overflows; load it in float32"
        )
    conditioning = embed_prompts(pipeline, [example.caption for example in batch])
    if is_inpainting(pipeline):
        given = decode_latents(pipeline, latents) if images is None else images
        conditioning = replace(conditioning, masked=masked_latents(pipeline, given, generator))
    named = {"latents": latents} | {name: value for name, value in vars(conditioning).items() if value is not None}
    arrays = {name: value.to("cpu", torch.float16).numpy() for name, value in named.items()}
    return [(example, {name: rows[i] for name, rows in arrays.items()}) for i, example in enumerate(batch)]


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    """Where the content begins in the shard, and its size."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    shard.addfile(header, io.BytesIO(content))
    padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return shard.offset - padded, len(content)  # type: ignore[attr-defined]


def _require_usable(source: Source, data: str | Path) -> None:
    skipped: dict[str, str] = {}
    for row in (row for piece in range(len(source)) for row in source.read(piece)):
        if isinstance(row, Example):
            return
        skipped[row.name] = row.reason
    raise unusable(data, skipped)


def _require_same(folder: Path, data: str | Path, source: Source, made_by: str) -> None:
    about = read_marker(folder)
    if about.get("source") != _identity(source):
        raise AsdmError(f"{folder}: prepared from other data than {data}; use another output folder")
    if about.get("made_by") != made_by:
        raise AsdmError(f"{folder}: prepared by another model, or at another image size; use another output folder")


def _identity(source: Source) -> str:
    return hashlib.sha256(f"{PIECE} {source.identity}".encode()).hexdigest()[:16]


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def _unread(folder: Path, number: int) -> Path:
    """Why a piece is not there."""
    return folder / f"{number:05d}.unread.txt"


def _beside(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"
