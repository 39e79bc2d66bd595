"""Open a source of captioned images by its name."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from asdm import checks
from asdm.data.captions import CaptionSource
from asdm.data.examples import PIECE, Example, Source, Split, Unusable, in_split
from asdm.data.folder import FolderSource, has_captioned_images
from asdm.data.hf_datasets import DatasetSource
from asdm.data.metadata import metadata_of, text_of
from asdm.data.names import data_help, unusable
from asdm.data.prepared import is_prepared, prepared_captions
from asdm.data.shards import SUFFIX, ShardSource
from asdm.errors import AsdmError
from asdm.files import read_marker
from asdm.registry import DATASETS, registered_folder

AT_HAND = 2048  # examples of a stream that calibration and evaluation choose from


@dataclass(frozen=True)
class Data:
    """Examples of a source; and by name why others cannot be used."""

    examples: list[Example]
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def sample(self, count: int, seed: int) -> list[Example]:
        """`count` examples drawn without replacement (with, where there are fewer)."""
        draw = random.Random(seed)
        if count <= len(self.examples):
            return draw.sample(self.examples, count)
        return draw.choices(self.examples, k=count)


def open_data(source: str | Path, split: Split = "train") -> Data:
    """Read a source's examples: all of a folder, `AT_HAND` at most of any other source.

    Headers of images in folders are checked; pixels are read later. Of a remote source, the first `AT_HAND` rows are
    read.

    Rows of `metadata.jsonl` (or of a shard's `.json`, or columns of a dataset) may have `"held_out": true`. They are
    for evaluation, never in "train"; those of a `"held_out_kind"`, a word, are evaluated apart. Rows may also have
    `"concept"` and `"style"`, by which generated images are judged, and `"design"`, equal for the variants of one
    design: each variant can be asked for from another one.

    Raises:
        AsdmError: there is no such source, or none of it can be used.
    """
    found = open_source(source, split)
    if found.remote:
        found.split = "all"  # so that the rows read are bounded, not the examples found
    examples, skipped = [], {}
    rows = (row for piece in range(len(found)) for row in found.read(piece))
    for row in rows if isinstance(found, FolderSource) else islice(rows, AT_HAND):
        if isinstance(row, Unusable):
            skipped[row.name] = row.reason
        elif in_split(row, split):
            examples.append(row)
    if not examples and split != "held_out":
        raise _no_example(source, skipped)
    return Data(examples, skipped)


def open_source(source: str | Path, split: Split = "train") -> Source:
    """Open the source of a name.

    Raises:
        AsdmError: there is none.
    """
    checks.path("data", source)
    name = str(source)
    registered = registered_folder(name, DATASETS)
    if registered is not None:
        return FolderSource(registered, split)
    if name.startswith("hf:"):
        return DatasetSource(name.removeprefix("hf:"), split)
    path = Path(name)
    if "://" in name or (name.lower().endswith(SUFFIX) and not os.path.isdir(path)):
        return ShardSource(name, split)
    if path.suffix.lower() == ".txt" and os.path.isfile(path):
        text = text_of(path)
        if "\0" in text:
            raise AsdmError(f"{path}: not text in UTF-8; save it as that")
        return CaptionSource(path.name, text.splitlines(), split)
    if not os.path.isdir(path):  # also of a name that is too long for one
        what = "a file that is no DATA" if os.path.isfile(path) else "no such data folder"
        raise AsdmError(f"{path}: {what}; DATA is {data_help()}")
    if is_prepared(path):
        return CaptionSource(path.name, prepared_captions(path), split)
    if read_marker(path).get("kind") == "prepared":
        raise AsdmError(f"{path}: not prepared to its end; run prepare-data again")
    shards = sorted(str(file) for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if shards and metadata_of(path) is None and not has_captioned_images(path):
        return ShardSource(shards, split)
    return FolderSource(path, split)


def count_of_examples(data: str | Path) -> tuple[int, bool]:
    """Return about how many training examples a source has, and whether they have images: the examples of a folder,
    else as many as its pieces can have. A remote source is not read."""
    source = open_source(data)
    if isinstance(source, FolderSource):
        examples = open_data(data).examples
        return len(examples), examples[0].file is not None
    return len(source) * PIECE, not isinstance(source, CaptionSource)


def require_usable(data: str | Path) -> None:
    """Raise an AsdmError unless `data` names a source with at least one example that looks usable."""
    require_usable_examples(open_source(data), data)


def require_usable_examples(source: Source, data: str | Path) -> None:
    """Raise an AsdmError unless the source, named `data`, has at least one example that looks usable."""
    skipped: dict[str, str] = {}
    for row in (row for piece in range(len(source)) for row in source.read(piece)):
        if isinstance(row, Example):
            return
        skipped[row.name] = row.reason
    raise _no_example(data, skipped)


def _no_example(data: str | Path, skipped: dict[str, str]) -> AsdmError:
    """Return the error for a source without an example to train on."""
    source = open_source(data, "held_out")
    rows = () if source.remote else (row for piece in range(len(source)) for row in source.read(piece))
    if any(isinstance(row, Example) for row in rows):
        return AsdmError(f"{data}: all of its usable rows are held_out; leave some for training, without held_out")
    return unusable(data, skipped)
