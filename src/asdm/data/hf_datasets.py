"""Examples of datasets of Hugging Face's `datasets`, from the Hub or from disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from asdm.data.examples import (
    CAPTION_FIELDS,
    Example,
    Split,
    Unread,
    Unusable,
    caption_of,
    count_of_pieces,
    digest,
    example_of,
    in_split,
    rows_of_piece,
    state_of,
)
from asdm.data.names import data_help
from asdm.data.shards import MAX_SAMPLE
from asdm.errors import AsdmError, needs_extra, one_line

_ARROW_FILE = b"ARROW1"  # what files of Arrow begin with that are no streams


class DatasetSource:
    """A dataset of the `datasets` library: a Hub id, streamed, or a local folder; `NAME@SPLIT`, or its train split.

    The image column is the one of that type, the caption's is `caption`, `text` or `prompt`.
    """

    def __init__(self, name: str, split: Split):
        with needs_extra("data", "Hugging Face datasets"):
            import datasets
        self.split = split
        path, _, part = name.rpartition("@")
        if os.path.exists(name) or not path or "/" in part:
            path, part = name, ""
        self.identity = _identity(path, part or "train")
        for file in sorted(Path(path).rglob("*.arrow")):
            _require_valid(file)
        is_saved = any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        try:
            found: Any = (
                datasets.load_from_disk(path)
                if is_saved
                else datasets.load_dataset(path, split=part or "train", streaming=not Path(path).exists())
            )
        except Exception as error:
            raise AsdmError(f"hf:{name}: no such dataset or split ({one_line(error)}); DATA is {data_help()}") from None
        if is_saved:
            found = _split_of(found, part, path)
        features = found.features or {}
        images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        captions = [column for column in CAPTION_FIELDS if column in features]
        if not captions or not images:
            raise AsdmError(
                f"hf:{name}: its columns are {', '.join(features) or 'not known'}; it needs one of images and one of "
                f"captions named {', '.join(CAPTION_FIELDS)}: rename_column and save_to_disk make one"
            )
        self.column = images[0]
        self.dataset = found.cast_column(self.column, datasets.Image(decode=False))
        self.remote = isinstance(found, datasets.IterableDataset)

    def __len__(self) -> int:
        return self.dataset.num_shards if self.remote else count_of_pieces(len(self.dataset))

    def read(self, piece: int) -> Iterator[Example | Unusable]:
        if self.remote:
            rows = self.dataset.shard(num_shards=self.dataset.num_shards, index=piece)
        else:
            rows = self.dataset.select(rows_of_piece(piece, len(self.dataset)))
        for number, row in enumerate(self._until_broken(rows, piece)):
            found = row if isinstance(row, Unusable) else self._from_row(f"{piece}/{number}", row)
            if isinstance(found, Unusable) or in_split(found, self.split):
                yield found

    def _until_broken(self, rows: Iterable[Any], piece: int) -> Iterator[Any]:
        """Yield a piece's rows and, where reading them fails, what says so."""
        try:
            yield from rows
        except Exception as error:  # of whatever the dataset is read by
            kind = Unread if self.remote else Unusable
            yield kind(f"shard {piece}", f"not read to its end: {one_line(error)}")

    def _from_row(self, name: str, row: dict[str, Any]) -> Example | Unusable:
        try:
            file = _file_of(row[self.column] or {})
        except Exception as error:  # of whatever holds the file
            return Unusable(name, f"its image cannot be read: {one_line(error)}")
        return example_of(name, caption_of(row), file, row)


def _identity(path: str, part: str) -> str:
    """Return what tells a dataset from others: of a folder, what tells whether its files are still the same."""
    if not os.path.isdir(path):
        return f"hf:{path}@{part}"
    files = sorted(file for file in Path(path).rglob("*") if file.is_file() and not file.name.startswith("cache-"))
    return digest([part, *map(state_of, files)])


def _split_of(saved: Any, part: str, path: str) -> Any:
    """Return a split of a dataset that was saved to disk; by default its train split, or the only one.

    Raises:
        AsdmError: it has no such split.
    """
    if isinstance(saved, dict):
        wanted = part or "train"
        if wanted in saved:
            return saved[wanted]
        names = ", ".join(f"hf:{path}@{name}" for name in saved)
        raise AsdmError(f"hf:{path}: has no split {wanted}; name one of its own: {names}")
    own = None if saved.split is None else str(saved.split)
    if part in ("", own or "train"):
        return saved
    raise AsdmError(f"hf:{path}@{part}: holds a single split, {own or 'without a name'}; leave @{part} out")


def _require_valid(path: Path) -> None:
    """Raise an AsdmError where a file of Arrow refers to places outside itself: reading those ends the process."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            is_stream = file.read(len(_ARROW_FILE)) != _ARROW_FILE
            file.seek(0)
            (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(file).read_all().validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise AsdmError(f"{path}: damaged ({one_line(error)}); save the dataset again") from None


def _file_of(content: dict[str, Any]) -> Path | bytes | None:
    """Return a dataset's image: its bytes, a file, or the content of a remote file, as folders on the Hub have."""
    path = content.get("path")
    if content.get("bytes") or not path:
        return content.get("bytes")
    if "://" not in path or path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    import fsspec  # by which datasets itself opens them

    with fsspec.open(path, "rb") as file:
        found: bytes = file.read(MAX_SAMPLE + 1)
    if len(found) > MAX_SAMPLE:
        raise ValueError(f"more than {MAX_SAMPLE >> 20} MB")
    return found
