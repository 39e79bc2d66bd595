"""Files of metadata in a folder of images: where in the file each row is, the row, and why there is none."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asdm.errors import needs_extra, one_line

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first of these that a folder has


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
                yield f":{number}", json.loads(line), ""
            except json.JSONDecodeError:
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
        from pyarrow import ArrowException, parquet
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        yield "", None, f"cannot be read: {one_line(error)}"
        return
    yield from ((f":{number}", row, "") for number, row in enumerate(rows, start=1))


def text_of(path: Path) -> str:
    """Return a file's text, with a mark where it is not UTF-8."""
    return path.read_text("utf-8-sig", errors="replace")
