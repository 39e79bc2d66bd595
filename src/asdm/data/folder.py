"""Examples of a folder: images with captions in files beside them, or in a file of metadata."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from asdm.data.examples import (
    CAPTION_FIELDS,
    Example,
    Split,
    Unusable,
    caption_of,
    count_of_pieces,
    digest,
    example_of,
    in_split,
    rows_of_piece,
)
from asdm.data.metadata import METADATA, metadata_of, rows_of_metadata, text_of
from asdm.errors import one_line
from asdm.images import UNREAD_SUFFIXES, image_fault, readable_suffixes, verify_pixels


class FolderSource:
    """Images with captions in files beside them, or in a file of metadata.

    Files that look like samples and are none are named behind all rows. They are no part of the identity.
    """

    remote = False

    def __init__(self, folder: Path, split: Split):
        rows = list(_rows_of(folder))
        self.rows = [row for row in rows if isinstance(row, Unusable) or in_split(row, split)]
        self.others = list(_others_of(folder, rows))
        self.split = split
        self.identity = digest([row.name, _size_of(row), getattr(row, "caption", None)] for row in self.rows)

    def __len__(self) -> int:
        return count_of_pieces(len(self.rows) + len(self.others))

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        rows = [*self.rows, *self.others]
        for row in (rows[index] for index in rows_of_piece(piece, len(rows))):
            fault = None if isinstance(row, Unusable) else _fault(Path(str(row.file)))
            yield row if fault is None else Unusable(row.name, fault)


def _rows_of(folder: Path) -> Iterator[Example | Unusable]:
    """Yield the samples of a folder. Without metadata: those with text files beside them, then those of the metadata
    in folders inside it."""
    metadata = metadata_of(folder)
    if metadata is not None:
        yield from _from_metadata(metadata, folder)
        return
    suffixes = readable_suffixes()
    for path in sorted(path for path in _files_of(folder) if path.suffix.lower() in suffixes):
        name, text = str(path.relative_to(folder)), _text_beside(path)
        if text is not None:
            yield example_of(name, text_of(text), path, {})
        else:
            expected = path.with_suffix(".txt").name
            yield Unusable(name, f"it has no caption: neither {expected} nor {METADATA[0]}, .csv or .parquet is there")
    for inside in sorted(_folders_with_metadata(folder)):
        yield from _from_metadata(inside, folder)


def has_captioned_images(folder: Path) -> bool:
    """Return whether an image in the folder itself has a text file beside it."""
    suffixes = readable_suffixes()
    return any(path.suffix.lower() in suffixes and _text_beside(path) is not None for path in folder.iterdir())


def _text_beside(image: Path) -> Path | None:
    """Return the file of an image's caption."""
    return next((text for suffix in (".txt", ".TXT") if (text := image.with_suffix(suffix)).is_file()), None)


def _others_of(folder: Path, rows: Iterable[Example | Unusable]) -> Iterator[Unusable]:
    """Files of a folder that belong to no sample: images that no row of the metadata names, images in formats that
    cannot be read, shards, and captions without an image."""
    named = {os.path.normpath(folder / row.name) for row in rows}
    tables = [path for path in (metadata_of(folder),) if path is not None]
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
        elif suffix == ".tar":
            yield Unusable(name, "a shard among images is not read; name it by its own path")
        elif suffix == ".txt" and not tables:
            others = [each for each in beside[os.path.splitext(path)[0]] if each != path.name]
            if not any(Path(each).suffix.lower() in suffixes | UNREAD_SUFFIXES for each in others):
                yield Unusable(
                    name, f"no image of its name is beside it{'' if not others else ', only ' + ', '.join(others)}"
                )


def _from_metadata(path: Path, folder: Path) -> Iterator[Example | Unusable]:
    """Yield the rows of a file of metadata. Its names of files are relative to it; those of the examples to
    `folder`."""
    for place, row, fault in rows_of_metadata(path):
        about = row if isinstance(row, dict) else {}
        name = about.get("file_name")
        if fault:
            yield Unusable(f"{path.relative_to(folder)}{place}", fault)
        elif not isinstance(name, str) or not name or about.keys().isdisjoint(CAPTION_FIELDS):
            fields = ", ".join(map(str, about)) or "none"
            told = f'not a row with "file_name" and "text", "caption" or "prompt"; its fields are {fields}'
            yield Unusable(f"{path.relative_to(folder)}{place}", one_line(told))
        else:
            file = path.parent / name
            inside = name if path.parent == folder else str(path.parent.relative_to(folder) / name)
            yield example_of(inside, caption_of(about, ("text", *CAPTION_FIELDS)), file, about)


def _folders_with_metadata(folder: Path) -> Iterator[Path]:
    for path in _files_of(folder, all_folders=True):
        if path.name in METADATA and path == metadata_of(path.parent):
            yield path


def _files_of(folder: Path, all_folders: bool = False) -> Iterator[Path]:
    """Yield all files below a folder, through links too, each folder once. Unless `all_folders`, without the folders
    inside it that have metadata."""
    known: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in known:
            folders.clear()
            continue
        known.add(real)
        if not all_folders and metadata_of(Path(place)) is not None:
            folders.clear()
            continue
        yield from (Path(place) / name for name in names)


def _size_of(row: Example | Unusable) -> int | None:
    try:
        return row.file.stat().st_size  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return None  # reading it says why


def _fault(path: Path) -> str | None:
    """Why an image cannot be used; None where it can, as far as its header tells."""
    try:
        verify_pixels(path)
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # PIL's readers raise many kinds
        return f"not a readable image: {image_fault(error, path.name)}"
    return None
