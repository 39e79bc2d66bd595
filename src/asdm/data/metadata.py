"""Files of metadata in a folder of images: where in the file each row is, the row, and why there is none."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asdm.errors import needs_extra, one_line
from asdm.reading import parse_json

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of these that a folder has

ROWS_AT_ONCE = 1024  # of a table of Parquet, whose pages may hold far more than their size


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
    with needs_extra("data", path.name):
        from pyarrow import parquet
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f":{number}", row, ""
    except Exception as error:  # of pyarrow, many kinds
        yield f":{number + 1}" if number else "", None, f"cannot be read: {one_line(error)}"


def text_of(path: Path) -> str:
    """Return a file's text, with a mark where it is not UTF-8."""
    return path.read_text("utf-8-sig", errors="replace")
