"""Image-caption sources: a folder, WebDataset shards, Hugging Face datasets, captions alone, the embedded default's.

A source is read in pieces (a thousand files of a folder, a shard), each by itself, so that several processes can share
them and an interrupted reading goes on at the next one. What cannot be used is counted and named, never fatal.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from asdm import checks
from asdm.errors import AsdmError, needs_extra, one_line
from asdm.files import read_marker
from asdm.images import UNREAD_SUFFIXES, image_fault, open_pixels, readable_suffixes, to_tensor, verify_pixels
from asdm.registry import DATASETS, registered_folder

DATA_HELP = (
    "a folder of images with captions (name.txt beside each, or metadata.jsonl, .csv or .parquet), WebDataset shards "
    "(a folder, path or URL pattern of .tar files), hf:DATASET, a .txt file of captions, what prepare-data wrote, or "
    "demo"
)
PREPARED = "prepared.json"  # the index of a folder that prepare-data wrote
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of these that a folder has
PIECE = 1024  # examples of a folder, a dataset or a file of captions that are read at a time
AT_HAND = 2048  # examples of a stream that calibration and evaluation choose from

Split = Literal["train", "held_out", "all"]
_CAPTION_FIELDS = ("caption", "text", "prompt")
_LABELS = ("concept", "style")
_FALSE = ("", "0", "false", "no")  # in a table of texts


@dataclass(frozen=True)
class Example:
    """A caption, and its image where the source has images: a file, or a file's content.

    `concept` and `style` say what it shows and how it is drawn, where the source says so.
    """

    name: str
    caption: str
    file: Path | bytes | None = field(default=None, repr=False)
    concept: str | None = None
    style: str | None = None
    held_out: bool = False

    def image(self) -> Image.Image:
        """The image, opened.

        Raises:
            OSError: not an image that can be read.
        """
        if self.file is None:
            raise OSError("captions alone have no images")
        return open_pixels(self.file)

    def pixels(self, size: int) -> Tensor:
        """The image (3, size, size) in [-1, 1], centre-cropped.

        Raises:
            OSError: the file is not an image that can be read.
        """
        with self.image() as image:
            return to_tensor(image, size)


@dataclass(frozen=True)
class Unusable:
    """What had to be passed over, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Unread(Unusable):
    """A piece that did not come, or not to its end, from afar: another time it may."""


class Source(Protocol):
    """Where examples come from, piece by piece."""

    identity: str  # what tells this source from another one
    remote: bool  # whether reading it means loading it
    split: Split  # which examples it gives

    def __len__(self) -> int:
        """How many pieces there are."""
        ...

    def read(self, piece: int) -> Iterator[Example | Unusable]: ...


@dataclass(frozen=True)
class Data:
    """Examples of a source, and what had to be passed over, by name, with the reason."""

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
    """A source's examples, up to `AT_HAND` unless it is a folder, whose headers are checked and pixels are read later;
    of what has to be loaded from afar, those among the first `AT_HAND`.

    Rows of `metadata.jsonl` (or of a shard's `.json`, or columns of a dataset) may be marked `"held_out": true`: they
    are for evaluation, never in "train". They may also say `"concept"` and `"style"`, by which generated images are
    judged.

    Raises:
        AsdmError: there is no such source, or none of it can be used.
    """
    found = open_source(source, split)
    if found.remote:
        found.split = "all"  # and what is read is bounded, not what is found in it
    examples, skipped = [], {}
    rows = (row for piece in range(len(found)) for row in found.read(piece))
    for row in rows if isinstance(found, FolderSource) else islice(rows, AT_HAND):
        if isinstance(row, Unusable):
            skipped[row.name] = row.reason
        elif _in_split(row, split):
            examples.append(row)
    if not examples and split != "held_out":
        raise unusable(source, skipped)
    return Data(examples, skipped)


def unusable(source: str | Path, skipped: dict[str, str]) -> AsdmError:
    """The error for a source of which nothing can be used."""
    reasons = f" ({len(skipped)} skipped, the first: {next(iter(skipped.items()))})" if skipped else ""
    return AsdmError(f"{source}: no images with captions{reasons}; DATA is {DATA_HELP}")


def open_source(source: str | Path, split: Split = "train") -> Source:
    """The source of that name.

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
    if name.endswith(".tar") or "://" in name:
        return ShardSource(name, split)
    path = Path(name)
    if path.suffix == ".txt" and os.path.isfile(path):
        text = _text_of(path)
        if "\0" in text:
            raise AsdmError(f"{path}: not text in UTF-8; save it as that")
        return CaptionSource(path.name, text.splitlines(), split)
    if not os.path.isdir(path):  # also of a name that is too long for one
        raise AsdmError(f"{path}: no such data folder; DATA is {DATA_HELP}")
    if (path / PREPARED).is_file():
        pieces = [json.loads(beside.read_text("utf-8")) for beside in sorted(path.glob("[0-9]*.json"))]
        return CaptionSource(path.name, [caption for piece in pieces for caption in piece["captions"]], split)
    if read_marker(path).get("kind") == "prepared":
        raise AsdmError(f"{path}: not prepared to its end; run prepare-data again")
    if _metadata_of(path) is None and any(path.glob("*.tar")):
        return ShardSource(sorted(str(shard) for shard in path.glob("*.tar")), split)
    return FolderSource(path, split)


class FolderSource:
    """Images with captions in files beside them, or in a file of metadata.

    What is no sample, and looks as if it should be one, is named behind all rows, and is no part of the identity.
    """

    remote = False

    def __init__(self, folder: Path, split: Split):
        rows = list(_rows_of(folder))
        self.rows = [row for row in rows if isinstance(row, Unusable) or _in_split(row, split)]
        self.others = list(_others_of(folder, rows))
        self.split = split
        self.identity = _digest([row.name, _size_of(row), getattr(row, "caption", None)] for row in self.rows)

    def __len__(self) -> int:
        return -(-(len(self.rows) + len(self.others)) // PIECE)

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        for row in [*self.rows, *self.others][piece * PIECE : (piece + 1) * PIECE]:
            fault = None if isinstance(row, Unusable) else _fault(Path(str(row.file)))
            yield row if fault is None else Unusable(row.name, fault)


class CaptionSource:
    """Captions without images: the teacher draws what it is taught by."""

    remote = False

    def __init__(self, name: str, captions: list[str], split: Split):
        self.split = split
        captions = [] if split == "held_out" else [" ".join(caption.split()) for caption in captions]
        self.rows = [Example(f"{name}:{n}", caption) for n, caption in enumerate(captions, 1) if caption]
        self.identity = _digest([row.caption] for row in self.rows)

    def __len__(self) -> int:
        return -(-len(self.rows) // PIECE)

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        yield from self.rows[piece * PIECE : (piece + 1) * PIECE]


class ShardSource:
    """WebDataset shards, as img2dataset writes them: an image, and its caption as `.txt` or in the `.json`.

    Args:
        urls: paths or URLs, or one pattern such as `https://host/{00000..00099}.tar`.
    """

    def __init__(self, urls: str | list[str], split: Split):
        with needs_extra("data", "WebDataset shards"):
            from webdataset import shardlists
        self.urls = shardlists.expand_urls(urls) if isinstance(urls, str) else urls
        self.split = split
        self.remote = any("://" in url for url in self.urls)
        absent = [url for url in self.urls if "://" not in url and not Path(url).is_file()]
        if absent:
            raise AsdmError(f"{absent[0]}: no such shard ({len(absent)} of {len(self.urls)}); DATA is {DATA_HELP}")
        self.identity = json.dumps([url if "://" in url else _state_of(Path(url)) for url in self.urls])

    def __len__(self) -> int:
        return len(self.urls)

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        from webdataset.tariterators import tarfile_samples

        url = self.urls[piece]
        faults: list[Unusable] = []

        def note(error: Exception) -> bool:
            kind = Unread if "://" in url else Unusable
            faults.append(kind(url, f"not read to its end: {one_line(error)}"))
            return False

        for sample in tarfile_samples([{"url": url}], handler=note):
            row = _from_sample(sample)
            if isinstance(row, Unusable) or _in_split(row, self.split):
                yield row
        yield from faults


class DatasetSource:
    """A dataset of the `datasets` library: a Hub id, streamed, or a local folder; `NAME@SPLIT`, or its train split.

    The image column is the one of that type, the caption's is `caption`, `text` or `prompt`.
    """

    def __init__(self, name: str, split: Split):
        with needs_extra("data", "Hugging Face datasets"):
            import datasets
        self.identity, self.split = f"hf:{name}", split
        path, _, part = name.rpartition("@")
        if os.path.exists(name) or not path or "/" in part:
            path, part = name, "train"
        try:
            if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
                found: Any = datasets.load_from_disk(path)
                found = found[part] if isinstance(found, dict) else found
            else:
                found = datasets.load_dataset(path, split=part, streaming=not Path(path).exists())
        except Exception as error:
            raise AsdmError(f"hf:{name}: no such dataset or split ({one_line(error)}); DATA is {DATA_HELP}") from None
        features = found.features or {}
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        captions = [column for column in _CAPTION_FIELDS if column in features]
        if not captions or not images:
            raise AsdmError(
                f"hf:{name}: its columns are {', '.join(features) or 'not known'}; it needs one of images and one of "
                f"captions named {', '.join(_CAPTION_FIELDS)}: rename_column and save_to_disk make one"
            )
        self.column, self.caption = images[0], captions[0]
        self.dataset = found.cast_column(self.column, datasets.Image(decode=False))
        self.remote = isinstance(found, datasets.IterableDataset)

    def __len__(self) -> int:
        return self.dataset.num_shards if self.remote else -(-len(self.dataset) // PIECE)

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        if self.remote:
            rows = self.dataset.shard(num_shards=self.dataset.num_shards, index=piece)
        else:
            rows = self.dataset.select(range(piece * PIECE, min((piece + 1) * PIECE, len(self.dataset))))
        for number, row in enumerate(rows):
            name = f"{piece}/{number}"
            try:
                file = _file_of(row[self.column] or {})
            except Exception as error:  # of whatever holds the file
                yield Unusable(name, f"its image cannot be read: {one_line(error)}")
                continue
            found = _example(name, row[self.caption], file, row)
            if isinstance(found, Unusable) or _in_split(found, self.split):
                yield found


def _file_of(content: dict[str, Any]) -> Path | bytes | None:
    """A dataset's image: its bytes, a file, or a file that lies elsewhere, as those of folders on the Hub do."""
    path = content.get("path")
    if content.get("bytes") or not path:
        return content.get("bytes")
    if "://" not in path:
        return Path(path)
    import fsspec  # by which datasets itself opens them

    with fsspec.open(path, "rb") as file:
        return file.read()


def _from_sample(sample: dict[str, Any]) -> Example | Unusable:
    """A sample of a shard."""
    name = sample["__key__"]
    members = sorted(key for key in sample if not key.startswith("__"))
    found = f"its members are {', '.join(f'.{member}' for member in members)}"
    try:
        about = json.loads(sample.get("json") or b"{}")
    except (json.JSONDecodeError, UnicodeDecodeError):
        return Unusable(name, "its .json is damaged")
    if not isinstance(about, dict):
        return Unusable(name, "its .json has no fields")
    suffixes = readable_suffixes()
    images = [member for member in members if f".{member}" in suffixes]
    if not images:
        unread = next((member for member in members if f".{member}" in UNREAD_SUFFIXES), None)
        why = "" if unread is None else f"; this Pillow does not read .{unread}, convert it to PNG or JPEG"
        # WebDataset takes all behind the first dot of a name for the ending
        why = why or ("; its name has a dot too many" if any("." in member for member in members) else "")
        return Unusable(name, f"it has no image: {found}{why}")
    caption = sample["txt"].decode("utf-8-sig", "replace") if "txt" in sample else None
    caption = caption or next((about[key] for key in _CAPTION_FIELDS if about.get(key)), None)
    if caption is None and "txt" not in sample:
        fields = f", its .json's fields {', '.join(map(str, about)) or 'none'}" if "json" in sample else ""
        return Unusable(name, f"it has no caption, as .txt or as caption, text or prompt in .json: {found}{fields}")
    return _example(name, caption, sample[next(key for key in sample if key in images)], about)


def _example(name: str, caption: Any, file: Path | bytes | None, about: dict[str, Any]) -> Example | Unusable:
    if isinstance(caption, list):  # several people's; COCO and Flickr have five
        caption = next((each for each in caption if isinstance(each, str) and each.strip()), "")
    if caption is not None and not isinstance(caption, str):
        return Unusable(name, f"its caption is no text: {one_line(caption)}")
    if "\0" in (caption or ""):
        return Unusable(name, "its caption is not text in UTF-8")
    caption = " ".join((caption or "").encode("utf-8", "replace").decode().split())  # half an emoji is no character
    if not caption:
        return Unusable(name, "its caption is empty")
    if file is None:
        return Unusable(name, "it has no image")
    labels = {key: found if isinstance(found := about.get(key), str) and found else None for key in _LABELS}
    held_out = about.get("held_out")
    is_held_out = held_out.lower() not in _FALSE if isinstance(held_out, str) else bool(held_out)
    return Example(name, caption, file, **labels, held_out=is_held_out)


def _state_of(path: Path) -> list[Any]:
    """A local shard, and what tells whether it is still the same."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]


def _size_of(row: Example | Unusable) -> int | None:
    try:
        return row.file.stat().st_size  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return None  # why, is told when it is read


def _digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def _in_split(example: Example, split: Split) -> bool:
    return split == "all" or example.held_out == (split == "held_out")


def _metadata_of(folder: Path) -> Path | None:
    """The file of metadata in a folder."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _rows_of(folder: Path) -> Iterator[Example | Unusable]:
    """The samples of a folder; where it has no metadata, those with text files beside them first, then those of the
    metadata in folders inside it."""
    metadata = _metadata_of(folder)
    if metadata is not None:
        yield from _from_metadata(metadata, folder)
        return
    suffixes = readable_suffixes()
    for path in sorted(path for path in _files_of(folder) if path.suffix.lower() in suffixes):
        name, text = str(path.relative_to(folder)), path.with_suffix(".txt")
        if text.is_file():
            yield _example(name, _text_of(text), path, {})
        else:
            yield Unusable(name, f"it has no caption: neither {text.name} nor {METADATA[0]}, .csv or .parquet is there")
    for inside in sorted(_folders_with_metadata(folder)):
        yield from _from_metadata(inside, folder)


def _others_of(folder: Path, rows: Iterable[Example | Unusable]) -> Iterator[Unusable]:
    """Files of a folder that its samples leave out: images that no row of the metadata names, images in formats that
    cannot be read, and captions without an image."""
    named = {os.path.normpath(folder / row.name) for row in rows}
    tables = [path for path in (_metadata_of(folder),) if path is not None]
    suffixes, files = readable_suffixes(), sorted(_files_of(folder, all_folders=True))
    beside: dict[str, list[str]] = {}
    for path in files:
        beside.setdefault(os.path.splitext(path)[0], []).append(path.name)
    for path in files:
        suffix, name = path.suffix.lower(), str(path.relative_to(folder))
        if os.path.normpath(path) in named:
            continue
        if suffix in suffixes:
            yield Unusable(name, "no row of the metadata names it")
        elif suffix in UNREAD_SUFFIXES:
            yield Unusable(name, f"this Pillow does not read {suffix}; convert it to PNG or JPEG")
        elif suffix == ".txt" and not tables:
            others = [each for each in beside[os.path.splitext(path)[0]] if each != path.name]
            if not any(Path(each).suffix.lower() in suffixes | UNREAD_SUFFIXES for each in others):
                yield Unusable(
                    name, f"no image of its name is beside it{'' if not others else ', only ' + ', '.join(others)}"
                )


def _from_metadata(path: Path, folder: Path) -> Iterator[Example | Unusable]:
    """The rows of a file of metadata, whose names of files are relative to it; ours to the whole `folder`."""
    reader = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    for place, row, fault in reader(path):
        about = row if isinstance(row, dict) else {}
        name, column = about.get("file_name"), next((key for key in ("text", *_CAPTION_FIELDS) if key in about), None)
        if fault:
            yield Unusable(f"{path.relative_to(folder)}{place}", fault)
        elif not isinstance(name, str) or not name or column is None:
            fields = ", ".join(map(str, about)) or "none"
            told = f'not a row with "file_name" and "text", "caption" or "prompt"; its fields are {fields}'
            yield Unusable(f"{path.relative_to(folder)}{place}", one_line(told))
        else:
            file = path.parent / name
            inside = name if path.parent == folder else str(path.parent.relative_to(folder) / name)
            yield _example(inside, about[column], file, about)


# Readers of metadata: where in the file each row is, the row, and why there is none.


def _json_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    for number, line in enumerate(_text_of(path).split("\n"), start=1):  # other breaks may stand within a string
        if line.strip():
            try:
                yield f":{number}", json.loads(line), ""
            except json.JSONDecodeError:
                yield f":{number}", None, 'not a row with "file_name" and "text": not JSON'


def _csv_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    reader = csv.DictReader(io.StringIO(_text_of(path), newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f":{reader.reader.line_num}", None, f"not a row: {one_line(error)}"
            continue
        if None in row:  # which the reader names what is too much
            fault = "has more values than columns; put texts with commas between quotes"
            yield f":{reader.line_num}", None, fault
        else:
            yield f":{reader.line_num}", {key.strip(): value for key, value in row.items()}, ""


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    with needs_extra("data", path.name):
        from pyarrow import ArrowException, parquet
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        yield "", None, f"cannot be read: {one_line(error)}"
        return
    yield from ((f":{number}", row, "") for number, row in enumerate(rows, start=1))


def _folders_with_metadata(folder: Path) -> Iterator[Path]:
    for path in _files_of(folder, all_folders=True):
        if path.name in METADATA and path == _metadata_of(path.parent):
            yield path


def _files_of(folder: Path, all_folders: bool = False) -> Iterator[Path]:
    """All files below a folder, through links too, but each folder once; and unless `all_folders`, none that metadata
    in a folder inside it is about."""
    known: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in known:
            folders.clear()
            continue
        known.add(real)
        if not all_folders and _metadata_of(Path(place)) is not None:
            folders.clear()
            continue
        yield from (Path(place) / name for name in names)


def _text_of(path: Path) -> str:
    return path.read_text("utf-8-sig", errors="replace")


def _fault(path: Path) -> str | None:
    """Why an image cannot be used; None where it can, as far as its header tells."""
    try:
        verify_pixels(path)
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # PIL's readers raise many kinds
        return f"not a readable image: {image_fault(error, path.name)}"
    return None


def can_be_decoded(example: Example) -> bool:
    """Whether the image can be read to its end; a header that is whole does not tell."""
    try:
        with example.image() as image:
            image.load()
    except Exception:  # PIL's readers raise many kinds
        return False
    return True


def load_pixels(examples: Sequence[Example], size: int, skipped: dict[str, str]) -> tuple[list[Example], list[Tensor]]:
    """Images (3, size, size) of the examples that can be decoded; the others go to `skipped`."""
    kept, pixels = [], []
    for example in examples:
        try:
            pixels.append(example.pixels(size))
        except Exception as error:  # PIL's readers raise many kinds
            name = example.file.name if isinstance(example.file, Path) else ""
            skipped[example.name] = f"cannot be decoded: {image_fault(error, name)}"
        else:
            kept.append(example)
    return kept, pixels


class ShuffledBatches:
    """Batches of indices: epochs of a shuffled set, a function of the step alone."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._orders: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.count
        orders = {int(epoch): self._order(int(epoch)) for epoch in epochs.unique()}
        return torch.stack([orders[int(e)][p % self.count] for e, p in zip(epochs, positions, strict=True)])

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
            kept = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            self._orders = kept | {epoch: torch.randperm(self.count, generator=generator)}
        return self._orders[epoch]
