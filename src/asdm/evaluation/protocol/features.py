"""Features of images and texts, computed in pieces that the processes of a launch share, and kept by content.

A piece's file is named by a digest of the extractor and of all its items' content, so the statistics of real images are
computed once, wherever the images lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asdm.errors import AsdmError
from asdm.evaluation.protocol.extractors import Extractor, TextExtractor
from asdm.files import replacing_file
from asdm.images import image_fault, open_pixels
from asdm.tensor_files import content_digest

PIECE = 512  # items of a piece
BATCH = 32  # items that a network reads at a time
READERS = 4  # threads that decode images
_DIGEST = "sha256"  # of a piece's tensors, in its metadata
Prepare = Callable[[Image.Image], Image.Image]
Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageFiles:
    """Files of images that are compared.

    `prepare` makes each what a network reads, `prepared_as` names that. Where `may_skip`, files that are no images are
    left out; otherwise they are an error.
    """

    paths: Sequence[Path]
    prepare: Prepare = lambda image: image
    prepared_as: str = ""
    may_skip: bool = False


class FeatureCache:
    """Computes features, each piece once.

    All processes of a launch must ask for the same features in the same order. Only rank 0 gets them; the others get
    nothing.
    """

    def __init__(self, folder: Path, state: PartialState, progress: Progress | None = None):
        self._folder, self._state, self._progress = folder, state, progress
        self._digests: dict[tuple[Path, int, int], str] = {}  # by path, size and time: networks read the same files

    @property
    def is_reader(self) -> bool:
        """Whether this process gets the features: rank 0."""
        return self._state.is_main_process

    def of_images(self, title: str, extractor: Extractor, files: ImageFiles) -> dict[str, Tensor]:
        """Return features (images, ..) by name; of files that `may_skip` those that are images."""

        def compute(paths: Sequence[Path]) -> dict[str, Tensor]:
            return _joined(extractor.images(batch) for batch in _pixel_batches(paths, files))

        def key(paths: Sequence[Path]) -> list[str]:
            return [extractor.identity, files.prepared_as, str(files.may_skip), *map(self._digest, paths)]

        return self._pieces(title, files.paths, key, compute)

    def of_texts(self, title: str, extractor: TextExtractor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return features (texts, ..) by name."""

        def compute(some: Sequence[str]) -> dict[str, Tensor]:
            return _joined(extractor.texts(some[start : start + BATCH]) for start in range(0, len(some), BATCH))

        def key(some: Sequence[str]) -> list[str]:  # another tokenizer makes other tokens of a text
            return [extractor.identity, "texts", *map(repr, extractor.tokens(some))]

        return self._pieces(title, texts, key, compute)

    def of_pairs(
        self, title: str, identity: str, measure: Callable[[Tensor, Tensor], Tensor], pairs: Sequence[tuple[Path, Path]]
    ) -> Tensor | None:
        """Return what `measure` returns (pairs,) for batches of pairs of images; None for other processes than rank
        0."""

        def compute(some: Sequence[tuple[Path, Path]]) -> dict[str, Tensor]:
            firsts, seconds = (_pixel_batches([pair[side] for pair in some], ImageFiles(())) for side in (0, 1))
            return _joined({"value": measure(*pair)} for pair in zip(firsts, seconds, strict=True))

        def key(some: Sequence[tuple[Path, Path]]) -> list[str]:
            return [identity, *(self._digest(path) for pair in some for path in pair)]

        return self._pieces(title, pairs, key, compute).get("value")

    def _pieces(
        self,
        title: str,
        items: Sequence[Item],
        key: Callable[[Sequence[Item]], list[str]],
        compute: Callable[[Sequence[Item]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        pieces = [items[start : start + PIECE] for start in range(0, len(items), PIECE)]
        for number in range(self._state.process_index, len(pieces), self._state.num_processes):
            path = self._path(key(pieces[number]))
            if _read(path) is None:
                with replacing_file(path) as partial:
                    computed = {name: value.contiguous() for name, value in compute(pieces[number]).items()}
                    save_file(computed, partial, {_DIGEST: content_digest(computed)})
            if self._progress is not None:
                self._progress(title, min((number + 1) * PIECE, len(items)), len(items))
        self._state.wait_for_everyone()
        if not self._state.is_main_process:
            return {}
        return _joined(self._of_others(self._path(key(piece))) for piece in pieces)

    @staticmethod
    def _of_others(path: Path) -> dict[str, Tensor]:
        found = _read(path)
        if found is None:
            raise AsdmError(f"{path}: was there a moment ago; run the same command again")
        return found

    def _digest(self, path: Path) -> str:
        """Return the SHA-256 of a file's content, which is read once as long as the file stays as it is.

        Raises:
            AsdmError: it cannot be read.
        """
        try:
            about = path.stat()
            key = (path, about.st_size, about.st_mtime_ns)
            if key not in self._digests:
                with path.open("rb") as file:
                    self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise AsdmError(f"{path}: {error.strerror}") from None
        return self._digests[key]

    def _path(self, key: Sequence[str]) -> Path:
        return self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file; None where there is none, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return found if metadata.get(_DIGEST) == content_digest(found) else None


def _pixel_batches(paths: Sequence[Path], files: ImageFiles) -> Iterator[Tensor]:
    """Yield batches (images, 3, height, width), uint8."""
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(paths), BATCH):
            read = readers.map(lambda path: _pixels(path, files), paths[start : start + BATCH])
            batch = [pixels for pixels in read if pixels is not None]
            if batch:
                yield torch.stack(batch)


def _pixels(path: Path, files: ImageFiles) -> Tensor | None:
    try:
        with open_pixels(path) as image:
            prepared = files.prepare(image).convert("RGB")
    except Exception as error:  # PIL's readers raise many kinds
        if files.may_skip:
            return None
        raise AsdmError(f"{path}: not an image ({image_fault(error, path.name)}); remove it, and run again") from None
    return torch.from_numpy(np.array(prepared)).permute(2, 0, 1)


def _joined(parts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}
