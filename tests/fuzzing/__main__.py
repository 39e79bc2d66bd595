"""`make fuzz`: all readers, each with its share of the inputs, each in a process of its own.

PYTHONPATH=tests python -m fuzzing --inputs 100000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MAX_PROCESS_SECONDS = 4 * 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="in all")
    parser.add_argument("--reader", help="only this one, by name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once; 0: all readers in this one")
    parser.add_argument("--out", type=Path, help="a file of JSON for the counts")
    given = parser.parse_args()
    if given.reader is not None:
        print(json.dumps(one(given.reader, given.inputs, given.seed)))
        return
    from fuzzing.readers import READERS

    total = sum(reader.share for reader in READERS)
    shares = {reader.name: max(1, -(-round(given.inputs * reader.share) // round(total))) for reader in READERS}
    if given.processes:
        with ThreadPoolExecutor(given.processes) as pool:
            rows = list(pool.map(lambda name: in_a_process(name, shares[name], given.seed), shares))
    else:
        rows = [in_this_process(name, shares[name], given.seed) for name in shares]
    for row in rows:
        counts = f"{row.get('inputs', 0):7} inputs, {row.get('accepted', 0):6} accepted, {row['seconds']:6.0f} s"
        print(f"{row['reader']:24} {counts}  {row['fault']}")
    read = sum(row.get("inputs", 0) for row in rows)
    faults = [row for row in rows if row["fault"]]
    print(f"{read} inputs, {len(rows)} readers, {len(faults)} with a fault")
    if given.out is not None:
        given.out.write_text(json.dumps({"inputs": read, "seed": given.seed, "rows": rows}, indent=1) + "\n", "utf-8")
    raise SystemExit(bool(faults))


def one(name: str, count: int, seed: int) -> dict[str, Any]:
    from fuzzing.readers import READERS
    from fuzzing.run import run

    reader = next(reader for reader in READERS if reader.name == name)
    with tempfile.TemporaryDirectory(prefix="asdm-fuzz-") as folder:
        return dict(run(reader, count, Path(folder), seed))


def in_this_process(name: str, count: int, seed: int) -> dict[str, Any]:
    begun, row = time.monotonic(), {"reader": name, "fault": ""}
    try:
        row |= one(name, count, seed)
    except Exception as error:
        traceback.print_exc()
        row["fault"] = f"{type(error).__name__}: {error}"[:300]
    print(row, flush=True)
    return row | {"seconds": time.monotonic() - begun}


def in_a_process(name: str, count: int, seed: int) -> dict[str, Any]:
    """A reader that crashes its process is found too."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "fuzzing", "--reader", name, "--inputs", str(count), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_PROCESS_SECONDS)
    row: dict[str, Any] = {"reader": name, "seconds": time.monotonic() - begun, "fault": ""}
    if done.returncode:
        sys.stderr.write(done.stderr[-6000:])
        lines = done.stderr.strip().splitlines()
        return row | {"fault": f"exit status {done.returncode}: {lines[-1] if lines else ''}"[:300]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
