"""Give a reader so many inputs, and say what must not have happened."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzzing.readers import READERS, Reader, fresh
from fuzzing.watch import Fault, attempt

COUNTS, ERRORS = "counts.json", "errors.txt"


def run(reader: Reader, count: int, folder: Path, number: int = 0, shrink: bool = True) -> dict[str, int]:
    """Read `count` inputs in a folder inside `folder`.

    Returns:
        How many inputs were read, and how many were accepted.

    Raises:
        Exception: of the smallest input that was found to go wrong.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work, counts = folder / "inputs", {"inputs": 0, "accepted": 0}
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(reader.inputs())
    def read(value: Any) -> None:
        fresh(work)
        counts["inputs"] += 1
        counts["accepted"] += attempt(lambda: reader.read(work, value), work)
        others = [path for path in os.listdir(folder) if path != "inputs"]
        if others:
            raise Fault(f"written beside the folder: {others}")

    read()
    return counts


def run_part(name: str, count: int, number: int, folder: Path) -> None:
    """Run a reader in a process of its own; write its counts to `COUNTS`, and what it prints to `ERRORS`."""
    for stream in (1, 2):
        os.dup2(os.open(folder / ERRORS, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    work = folder / "work"
    work.mkdir()
    counts: dict[str, Any]
    try:
        counts = dict(run(next(reader for reader in READERS if reader.name == name), count, work, number))
    except Exception as error:
        traceback.print_exc()
        counts = {"fault": " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])}
    (folder / COUNTS).write_text(json.dumps(counts), "utf-8")
