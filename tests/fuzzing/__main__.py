"""`make fuzz`: all readers, each with its share of the inputs, in processes of at most `PART` inputs.

PYTHONPATH=tests:. python -m fuzzing --inputs 100000 --out fuzz.json

The counts are written after each part. A run that was stopped goes on where it was: a part that stands in the file
without a fault is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fuzzing.readers import READERS
from fuzzing.run import COUNTS, ERRORS, run_part

PART = 2000  # inputs of one process, which has a seed of its own
MAX_PROCESS_SECONDS = 4 * 3600
FORKS = multiprocessing.get_context("forkserver")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all")
    parser.add_argument("--reader", help="only this one, by name, with all the inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once")
    parser.add_argument("--out", type=Path, help="a file of JSON for the counts; its parts are not run again")
    given = parser.parse_args()
    FORKS.set_forkserver_preload(["fuzzing.readers", "fuzzing.run"])
    parts = list(parts_of(given.inputs, given.seed, given.reader))
    done = earlier(given.out)
    if all(part in done for part in parts):  # that run is over; begin another
        done = {}
    left = [part for part in parts if part not in done]
    with ThreadPoolExecutor(given.processes) as pool:
        for part, row in zip(left, pool.map(lambda part: in_a_process(*part), left), strict=True):
            done[part] = row
            print(said(row), flush=True)
            if given.out is not None:
                rows = [done[part] for part in parts if part in done]
                written = given.out.with_suffix(".partial")
                written.write_text(json.dumps({"seed": given.seed, "rows": rows}, indent=1) + "\n", "utf-8")
                os.replace(written, given.out)
    rows = [done[part] for part in parts]
    for row in by_reader(rows):
        print(said(row))
    faults = [row for row in rows if row["fault"]]
    print(f"{sum(row['inputs'] for row in rows)} inputs, {len(by_reader(rows))} readers, {len(faults)} faults")
    raise SystemExit(bool(faults))


def parts_of(inputs: int, seed: int, only: str | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (reader, inputs, seed) of each process: a share of the inputs for each reader, in parts."""
    readers = [reader for reader in READERS if only in (None, reader.name)]
    total = sum(reader.share for reader in readers)
    for reader in readers:
        left = max(1, round(inputs * reader.share / total))
        for number in range(-(-left // PART)):
            yield reader.name, min(PART, left - number * PART), seed + number


def earlier(path: Path | None) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Return the parts of an earlier run, which was stopped, that had no fault."""
    if path is None or not path.is_file():
        return {}
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {(row["reader"], row["of"], row["seed"]): row for row in rows if not row["fault"]}


def by_reader(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a reader: the sums of its parts."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        whole = found.setdefault(row["reader"], {"reader": row["reader"], "fault": ""})
        for key in ("inputs", "accepted", "seconds"):
            whole[key] = whole.get(key, 0) + row[key]
        whole["fault"] = whole["fault"] or row["fault"]
    return list(found.values())


def said(row: dict[str, Any]) -> str:
    counts = f"{row['inputs']:7} inputs, {row['accepted']:6} accepted, {row['seconds']:6.0f} s"
    return f"{row['reader']:24} {counts}  {row['fault']}"


def in_a_process(name: str, count: int, seed: int) -> dict[str, Any]:
    """Return the counts of one part. A reader that crashes its process, or that never ends, is found too.

    The process is forked from one that has the libraries loaded.
    """
    begun = time.monotonic()
    row: dict[str, Any] = {"reader": name, "of": count, "seed": seed, "inputs": 0, "accepted": 0, "fault": ""}
    with tempfile.TemporaryDirectory(prefix="asdm-fuzz-") as folder:
        process = FORKS.Process(target=run_part, args=(name, count, seed, Path(folder)))
        process.start()
        process.join(MAX_PROCESS_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode:
            row["fault"] = f"exit status {process.exitcode}"
        else:
            row |= json.loads((Path(folder) / COUNTS).read_text("utf-8"))
        if row["fault"]:
            sys.stderr.write((Path(folder) / ERRORS).read_text("utf-8", "replace")[-6000:])
    return row | {"seconds": round(time.monotonic() - begun, 1)}


if __name__ == "__main__":
    main()
