"""What can be given as DATA, for messages."""

from __future__ import annotations

from pathlib import Path

from asdm.errors import AsdmError
from asdm.registry import DATASETS, registered_names


def data_help() -> str:
    """Return all that a data source's name can be."""
    return (
        "a folder of images with captions (name.txt beside each, or metadata.jsonl, .csv or .parquet), WebDataset "
        "shards (a folder, path or URL pattern of .tar files), hf:DATASET, a .txt file of captions, what prepare-data "
        f"wrote, or {', '.join(registered_names(DATASETS))}"
    )


def unusable(source: str | Path, skipped: dict[str, str]) -> AsdmError:
    """Return the error for a source without usable examples."""
    reasons = f" ({len(skipped)} skipped, the first: {next(iter(skipped.items()))})" if skipped else ""
    if Path(source).suffix.lower() == ".txt":
        return AsdmError(f"{source}: has no caption{reasons}; write one a line")
    return AsdmError(f"{source}: no images with captions{reasons}; DATA is {data_help()}")
