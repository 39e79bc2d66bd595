"""Compute latents and prompt embeddings of a data source once, and write them as WebDataset shards.

One shard is written for each piece of the source (`asdm.data.examples`), by the process of a launch that has the piece.
A shard is whole or absent.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm import checks
from asdm.data.captions import CaptionSource
from asdm.data.examples import PIECE, Example, Source, Unread, Unusable, load_pixels
from asdm.data.names import unusable
from asdm.data.prepared import (
    PREPARED,
    PreparedData,
    digest_of,
    fingerprint,
    is_prepared,
    missing_path,
    piece_path,
    read_piece,
    shard_path,
)
from asdm.data.sources import open_source, require_usable_examples
from asdm.devices import LONGEST_WAIT
from asdm.diffusion.conditioning import decode_latents, embed_prompts, encode_images, image_size, masked_latents
from asdm.diffusion.generation import default_guidance, pipeline_arguments, require_steps
from asdm.diffusion.kinds import is_inpainting, is_random, require_text_to_image
from asdm.digests import short_digest
from asdm.errors import AsdmError
from asdm.families import denoiser_of
from asdm.files import MARKER, read_marker, replacing_file, require_ours, write_text

Progress = Callable[[int, int], None]
BATCH_SIZE = 16  # examples that are encoded together
STEPS = 25  # in which images are generated from captions alone


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
    batch_size: int = BATCH_SIZE,
    steps: int = STEPS,
    seed: int = 0,
    ignore_missing_shards: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Write latents and caption embeddings of a source's training examples, in float16, as shards into `folder`.

    A second call resumes with the missing pieces. The processes of a launch share the pieces.

    Args:
        data: any source that `--data` takes. From captions alone the pipeline generates the images, in `steps` steps.
        batch_size: images encoded at a time.
        ignore_missing_shards: use what was read of remote shards that cannot be read to their end.
        progress: called with pieces done and in all.

    Raises:
        AsdmError: the source cannot be used; or its latents or embeddings are not finite; or a shard could not be
            read, when all else is prepared; or `folder` is not this tool's, or holds data of another source or model,
            or that was generated in other steps, by another scheduler or with another seed.
    """
    require_text_to_image(pipeline)
    require_steps(pipeline, steps)
    folder = Path(folder)
    if is_prepared(data):
        raise AsdmError(f"{data}: prepared already; give it to distill as it is")
    source = open_source(data)
    about: dict[str, Any] = {"kind": "prepared", "source": _identity(source), "made_by": fingerprint(pipeline)}
    about |= _random_part(pipeline, source, steps, seed)
    if is_prepared(folder):
        _require_same(folder, data, about)
        return PreparedData(folder)
    require_ours(folder, "prepared")
    state = PartialState(cpu=pipeline.device.type == "cpu", timeout=LONGEST_WAIT)
    if state.is_main_process:
        require_usable_examples(source, data)
        if (folder / MARKER).is_file():
            _require_same(folder, data, about)
        write_text(folder / MARKER, json.dumps(about, indent=1) + "\n")
    state.wait_for_everyone()
    preparation = _Preparation(pipeline, source, folder, batch_size, steps, seed, ignore_missing_shards)
    numbers = range(state.process_index, len(source), state.num_processes)
    for done, number in enumerate(numbers, start=1):
        if not piece_path(folder, number).is_file():
            try:
                preparation.write_piece(number)
            except _UnreadError as error:
                write_text(missing_path(folder, number), f"{error}\n")
        if progress is not None:
            progress(done, len(numbers))
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(folder, data, len(source), about)
    state.wait_for_everyone()
    return PreparedData(folder)


class _UnreadError(Exception):
    """A piece could not be read to its end."""


@dataclass(frozen=True)
class _Preparation:
    """What is computed of a source, with what, and where to."""

    pipeline: DiffusionPipeline
    source: Source
    folder: Path
    batch_size: int
    steps: int
    seed: int
    ignore_missing_shards: bool

    def write_piece(self, number: int) -> None:
        """Write a piece's shard, and the index of the shard.

        Raises:
            _UnreadError: the piece could not be read to its end.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        captions: list[str] = []
        places: list[tuple[int, int]] = []
        skipped: dict[str, str] = {}
        with replacing_file(shard_path(self.folder, number)) as partial, tarfile.open(partial, "w") as shard:
            for batch in self._batches(number, skipped):
                for example, arrays in self._encoded(batch, skipped, generator):
                    key = f"{number:05d}-{len(captions):05d}"
                    content = io.BytesIO()
                    np.savez(content, **arrays)
                    places.append(_add(shard, f"{key}.npz", content.getvalue()))
                    _add(shard, f"{key}.txt", example.caption.encode())
                    captions.append(example.caption)
        about = {"captions": captions, "places": places, "skipped": skipped}
        write_text(piece_path(self.folder, number), json.dumps(about) + "\n")
        missing_path(self.folder, number).unlink(missing_ok=True)

    def _batches(self, number: int, skipped: dict[str, str]) -> Iterator[list[Example]]:
        """Yield a piece's examples in batches; what cannot be used goes to `skipped`."""
        batch: list[Example] = []
        for row in self.source.read(number):
            if isinstance(row, Unread) and not self.ignore_missing_shards:
                raise _UnreadError(f"{row.name}: {row.reason}")
            if isinstance(row, Unusable):
                skipped[row.name] = row.reason
                continue
            batch.append(row)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _encoded(
        self, batch: list[Example], skipped: dict[str, str], generator: torch.Generator
    ) -> list[tuple[Example, dict[str, Any]]]:
        """Return the examples of a batch that can be decoded, each with its latents and its caption's embeddings."""
        pipeline = self.pipeline
        images = None
        if batch[0].file is None:
            latents = self._generated([example.caption for example in batch], generator)
        else:
            batch, pixels = load_pixels(batch, image_size(pipeline), skipped)
            if not pixels:
                return []
            images = torch.stack(pixels)
            latents = encode_images(pipeline.vae, images)
        conditioning = embed_prompts(pipeline, [example.caption for example in batch])
        if is_inpainting(pipeline):
            images = decode_latents(pipeline, latents) if images is None else images
            conditioning = replace(conditioning, masked=masked_latents(pipeline, images, generator))
        named = {"latents": latents} | {name: value for name, value in vars(conditioning).items() if value is not None}
        halves = {name: value.to("cpu", torch.float16) for name, value in named.items()}
        if not is_random(pipeline):
            _require_finite(halves, batch)
        arrays = {name: half.numpy() for name, half in halves.items()}
        return [(example, {name: rows[i] for name, rows in arrays.items()}) for i, example in enumerate(batch)]

    def _generated(self, captions: list[str], generator: torch.Generator) -> Tensor:
        """Return latents that the pipeline generates from captions."""
        call: Any = self.pipeline
        return call(
            captions,
            num_inference_steps=self.steps,
            guidance_scale=default_guidance(self.pipeline),
            generator=generator,
            output_type="latent",
            **pipeline_arguments(self.pipeline),
        ).images


def _require_finite(tensors: Mapping[str, Tensor], examples: list[Example]) -> None:
    """Raise an AsdmError for values of these examples that are no numbers, or too large for float16."""
    for name, rows in tensors.items():
        for example, row in zip(examples, rows, strict=True):
            if row.isfinite().all():
                continue
            part = "text encoder"
            if name in ("latents", "masked"):
                part = "denoiser" if example.file is None else "VAE"
            raise AsdmError(
                f"{example.name}: its {name} are not finite in float16: the weights of the {part} are damaged, or its "
                "precision overflows; use undamaged weights, and load the pipeline in float32"
            )


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> tuple[int, int]:
    """Add a file to the shard; return where its content begins, and its size."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    shard.addfile(header, io.BytesIO(content))
    padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return shard.offset - padded, len(content)  # type: ignore[attr-defined]


def _finish(folder: Path, data: str | Path, pieces: int, about: Mapping[str, Any]) -> None:
    """Write the index of a folder whose pieces are all there.

    Raises:
        AsdmError: a piece is missing, or nothing in them can be used.
    """
    absent = [number for number in range(pieces) if not piece_path(folder, number).is_file()]
    if absent:
        reason = missing_path(folder, absent[0]).read_text("utf-8").strip()
        raise AsdmError(
            f"{data}: {len(absent)} of {pieces} shards could not be read ({reason}); run again to resume with "
            "those, or leave them out: asdm prepare-data --ignore-missing-shards"
        )

    found = [read_piece(piece_path(folder, number)) for number in range(pieces)]
    if not any(piece.places for piece in found):
        raise unusable(data, {name: reason for piece in found for name, reason in piece.skipped.items()})
    index = {"pieces": pieces, "made_by": about["made_by"], "denoiser": about.get("denoiser")}
    write_text(folder / PREPARED, json.dumps(index) + "\n")


def _random_part(pipeline: DiffusionPipeline, source: Source, steps: int, seed: int) -> dict[str, Any]:
    """Return the settings by which images are generated from captions, or the seed of masks."""
    if not isinstance(source, CaptionSource):
        return {"seed": seed} if is_inpainting(pipeline) else {}
    scheduler = pipeline.scheduler
    return {
        "steps": steps,
        "seed": seed,
        "scheduler": f"{type(scheduler).__name__} ({scheduler.config.get('prediction_type', 'flow')})",
        "denoiser": digest_of(denoiser_of(pipeline)),
    }


def _require_same(folder: Path, data: str | Path, about: Mapping[str, Any]) -> None:
    """Raise an AsdmError where a folder was prepared from another source, by another model, or with other settings,
    which folders of earlier versions do not name."""
    found = {**about, "source": None, "made_by": None, **read_marker(folder)}
    if found["source"] != about["source"]:
        raise AsdmError(f"{folder}: prepared from other data than {data}; use another output folder")
    if any(found[name] != about[name] for name in ("made_by", "denoiser") if name in about):
        raise AsdmError(f"{folder}: prepared by another model, or at another image size; use another output folder")
    for name in ("steps", "seed", "scheduler"):
        if name in about and found[name] != about[name]:
            raise AsdmError(
                f"{folder}: prepared with {name}={found[name]}, not {about[name]}; use another output folder"
            )


def _identity(source: Source) -> str:
    return short_digest(f"{PIECE} {source.identity}")
