"""The prompts of a protocol: COCO's own file of captions, a table, or a list."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asdm.data.examples import CAPTION_FIELDS, caption_fault, caption_of
from asdm.data.metadata import rows_of_metadata, text_of
from asdm.errors import AsdmError, one_line
from asdm.generation.files import read_prompts
from asdm.reading import parse_json

_SHUFFLE_SEED = 0


def read_captions(path: Path, count: int) -> list[str]:
    """Return at most `count` prompts of a file.

    Args:
        path: `.json` as COCO's captions_val2014.json: one caption each of images that are drawn at random with a fixed
            seed, the caption with the lowest id. `.csv`, `.jsonl` or `.parquet` with a caption, text or prompt in each
            row, or a `.csv` with the caption in its second column, as BK-SDM's metadata.csv; in the file's order. Any
            other file has one prompt a line.

    Raises:
        AsdmError: there is no such file, or it has no captions.
    """
    if not path.is_file():
        raise AsdmError(f"{path}: no such file of captions")
    if path.suffix == ".json":
        found = _of_coco(path, count)
    elif path.suffix in (".csv", ".jsonl", ".parquet"):
        found = list(_of_table(path))[:count]
    else:
        found = read_prompts(str(path))[:count]
    for caption in found:
        fault = caption_fault(caption)
        if fault is not None:
            raise AsdmError(f"{path}: a caption {fault} ({one_line(caption[:80], 40)})")
    return found


def _of_coco(path: Path, count: int) -> list[str]:
    try:
        rows = parse_json(text_of(path))["annotations"]
        chosen: dict[int, tuple[int, str]] = {}
        for row in rows:
            image, caption = int(row["image_id"]), (int(row["id"]), _plain(row["caption"]))
            chosen[image] = min(chosen.get(image, caption), caption)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        told = "not COCO's captions, with image_id, id and caption in each of its annotations"
        raise AsdmError(f"{path}: {told} ({one_line(repr(error), 60)})") from None
    if not chosen:
        raise AsdmError(f"{path}: has no captions")
    images = sorted(chosen)
    random.Random(_SHUFFLE_SEED).shuffle(images)
    return [chosen[image][1] for image in images[:count]]


def _of_table(path: Path) -> Iterator[str]:
    captions = 0
    for place, row, fault in rows_of_metadata(path):
        caption = None if fault or not isinstance(row, dict) else _caption_of(row, path.suffix == ".csv")
        if caption is None:
            raise AsdmError(f"{path}{place}: {fault or 'has no caption, text or prompt'}")
        captions += 1
        yield caption
    if not captions:
        raise AsdmError(f"{path}: has no captions")


def _caption_of(row: dict[str, Any], second_column: bool) -> str | None:
    caption = caption_of(row)
    if second_column and row.keys().isdisjoint(CAPTION_FIELDS):
        caption = next(iter(list(row.values())[1:2]), None)
    return _plain(caption) or None if isinstance(caption, str) else None


def _plain(text: str) -> str:
    """Return a text in one line; half an emoji is no character. What cannot be a caption stays as it is."""
    return text if caption_fault(text) else " ".join(text.encode("utf-8", "replace").decode().split())
