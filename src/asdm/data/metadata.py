"""Files of metadata in a folder of images: where in the file each row is, the row, and why there is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asdm.data.examples import ROW_FIELDS
from asdm.errors import needs_extra, one_line
from asdm.reading import parse_json

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of these that a folder has

ROWS_AT_ONCE = 1024  # of a table of Parquet
_MOST_MEGABYTES = 512  # of a column in a group of its rows, which may take far less on the disk
_TEXTS_OF_LIST = 16  # of a column of lists


def metadata_of(folder: Path) -> Path | None:
    """Return the file of metadata in a folder."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def rows_of_metadata(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Return the rows of a file of metadata, each with its place in the file; why there is none where it cannot be
    read."""
    reader = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    return reader(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    for number, line in enumerate(text_of(path).split("\n"), start=1):  # other breaks may stand within a string
        if line.strip():
            try:
                yield f":{number}", parse_json(line), ""
            except ValueError:
                yield f":{number}", None, 'not a row with "file_name" and "text": not JSON'


def _csv_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True)
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
    """Yield rows whose other fields than `ROW_FIELDS` are None.

    A kilobyte can name one long text a million times: equal texts are one object.
    """
    with needs_extra("data", path.name):
        from pyarrow import parquet
    number = 0
    try:
        with parquet.ParquetFile(path, read_dictionary=_texts_in(path)) as table:
            names = table.schema_arrow.names
            wanted = [name for name in names if name in ROW_FIELDS]
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted or names[:1]):
                columns = [_reader(batch.column(name))(0, batch.num_rows) for name in wanted]
                for values in zip(*columns, strict=True) if wanted else [()] * batch.num_rows:
                    number += 1
                    yield f":{number}", dict.fromkeys(names) | dict(zip(wanted, values, strict=True)), ""
    except Exception as error:  # of pyarrow, many kinds
        yield f":{number + 1}" if number else "", None, f"cannot be read: {one_line(error)}"


def _texts_in(path: Path) -> list[str]:
    """Return the columns of a Parquet table that hold texts or bytes, and that are read.

    Raises:
        ValueError: they take too much memory.
    """
    from pyarrow import parquet

    found = []
    with parquet.ParquetFile(path) as table:
        for number, column in enumerate(table.schema):
            if column.path.split(".")[0] not in ROW_FIELDS:
                continue
            groups = (table.metadata.row_group(group) for group in range(table.metadata.num_row_groups))
            size = max((group.column(number).total_uncompressed_size for group in groups), default=0)
            if size > _MOST_MEGABYTES << 20:
                raise ValueError(f"{column.path} takes {size >> 20} MB in a group of rows, more than {_MOST_MEGABYTES}")
            if column.physical_type == "BYTE_ARRAY":
                found.append(column.path)
    return found


def _reader(column: Any) -> Callable[[int, int], list[Any]]:
    """Return a function of two places in a column that returns the values between them; of lists the first values."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        texts = column.dictionary.to_pylist()
        return lambda start, end: [None if at is None else texts[at] for at in column.indices[start:end].to_pylist()]
    if types.is_list(column.type) or types.is_large_list(column.type):
        begins, there, inside = column.offsets.to_pylist(), column.is_valid().to_pylist(), _reader(column.values)

        def first_of(at: int) -> list[Any] | None:
            end = min(begins[at + 1], begins[at] + _TEXTS_OF_LIST)
            return inside(begins[at], end) if there[at] else None

        return lambda start, end: [first_of(at) for at in range(start, end)]
    if types.is_nested(column.type):  # no caption
        return lambda start, end: [{}] * (end - start)
    return lambda start, end: column[start:end].to_pylist()  # type: ignore[no-any-return]


def text_of(path: Path) -> str:
    """Return a file's text; bytes that are no UTF-8 are surrogates, which no caption may have."""
    return text_in(path.read_bytes())


def text_in(content: bytes) -> str:
    """Return the text of a file with this content, as `text_of` does."""
    return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", errors="surrogateescape").read()
