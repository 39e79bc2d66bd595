"""What survives kills, full and read-only disks, and long runs. `docs/reliability.md` has the results.

    python benchmarks/reliability.py kills --kills 20
    python benchmarks/reliability.py disks              # needs the right to mount; see `unshare -rm`
    python benchmarks/reliability.py generate --minutes 60
    python benchmarks/reliability.py distill --steps 2000
    python benchmarks/reliability.py together --processes 4

Each run of a command is a process of its own. It is forked from this one, which has the libraries loaded. The pipeline
is a tiny one, and in the long runs the embedded one with a small UNet.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from common import earlier_rows, finish, machine, run, write_rows
from PIL import Image
from reliability_inputs import (
    REMOVED,
    Killed,
    command,
    completed,
    killed_commands,
    require_completed,
    small_unet,
    start,
    wait,
    workplace,
    writing_commands,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

import asdm
from asdm import checks
from asdm.data.sources import open_data
from asdm.distillation.stages import Stage
from asdm.errors import AsdmError
from asdm.families import denoiser_of
from asdm.generation.image import read_about
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])
FLAT_MEGABYTES = 20  # that the last quarter of a long run may hold more than the second


def digest(folder: Path, patterns: Sequence[str] = ("**/*",)) -> dict[str, str]:
    """Return a digest of each file, by its path."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def add_rows(name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
    """Print and write rows of this run, behind an earlier run's of other commands; each keeps its own date, machine and
    settings."""
    mine = {row["command"] for row in rows}
    others = [row for row in earlier_rows(name) if row["command"] not in mine]
    write_rows(name, [*others, *({**row, **machine(), **settings} for row in rows)])


def chosen(commands: dict[str, Any], only: str | None) -> dict[str, Any]:
    """Return the commands, or the one that is named alone."""
    if only is None:
        return commands
    checks.one_of(*commands)("only", only)
    return {only: commands[only]}


# -- kills ------------------------------------------------------------------------------------------------


@app.command()
def kills(
    kills: Annotated[int, typer.Option(help="Kills of each command.", min=1)] = 20,
    only: Annotated[str | None, typer.Option(help="Only this command.")] = None,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill each command at random moments. No half-written output may load, and the last call's output is that of an
    uninterrupted one, bit for bit."""
    with workplace() as inputs:
        for each in chosen({each.name: each for each in killed_commands(inputs)}, only).values():
            row = _kill(each, inputs, kills, random.Random(seed))
            add_rows("reliability_kills", [row], seed=seed)


def _kill(job: Killed, inputs: Path, count: int, draw: random.Random) -> dict[str, Any]:
    errors, whole, out = inputs / "errors.txt", inputs / "whole" / "out", inputs / "killed" / "out"
    for folder in (whole, out):  # of the same name, which stands in some files
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
    begun = time.monotonic()
    require_completed(job.call(whole), errors)
    seconds = time.monotonic() - begun
    expected = digest(whole, job.same)
    killed = finished = refused = 0
    while killed < count:
        pid = start(job.call(out), errors)
        time.sleep(draw.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) != -signal.SIGKILL:  # it ended before: begin again
            finished += 1
            _require_same(digest(out, job.same), expected, job.name)
            shutil.rmtree(out)
            continue
        killed += 1
        refused += not _loads(job, out, errors, expected)
    require_completed(job.call(out), errors)
    _require_same(digest(out, job.same), expected, job.name)
    left = [str(path) for path in inputs.rglob(".*.partial")] + [str(path) for path in inputs.rglob(".*.previous")]
    return {
        "command": job.name,
        "seconds": round(seconds, 1),
        "kills": killed,
        "refused_after_a_kill": refused,
        "whole_after_a_kill": killed - refused,
        "finished_before_a_kill": finished,
        "same_bytes_at_the_end": len(expected),
        "compared_without": ", ".join(job.timed),
        "left_over": len(left),
    }


def _loads(job: Killed, out: Path, errors: Path, expected: dict[str, str]) -> bool:
    """Return whether what a killed command left is loaded; then it has to be the whole."""

    def load() -> None:
        try:
            job.load(out)
        except AsdmError as error:
            sys.stderr.write(str(error))
            raise SystemExit(2) from None

    status = completed(load, errors)
    if status not in (0, 2):
        raise AsdmError(f"{job.name}: what a kill left raises: {errors.read_text('utf-8')[-2000:]}")
    if status == 0:
        _require_same(digest(out, job.same), expected, f"{job.name}: half-written, and loads")
    return status == 0


def _require_same(found: dict[str, str], expected: dict[str, str], what: str) -> None:
    if found != expected:
        changed = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
        raise AsdmError(f"{what}: other files than an uninterrupted run's: {', '.join(changed[:5])}")


# -- disks ------------------------------------------------------------------------------------------------


@app.command()
def disks(
    only: Annotated[str | None, typer.Option(help="Only this command.")] = None,
    part: Annotated[
        list[float], typer.Option(help="Of the space that a command needs, which is free.", min=0, max=1)
    ] = [0, 0.5, 0.95],  # noqa: B006
) -> None:
    """Run every writing command on a full disk and in a read-only folder. It has to say so in one line with exit status
    2, and what was there stays."""
    faults = False
    with workplace() as inputs:
        errors = inputs / "errors.txt"
        for name in chosen(writing_commands(inputs, inputs), only):
            needed = _needed(name, inputs, errors)
            free = {f"{each:g} of its space": int(needed * each) for each in part}
            rows = []
            for case, space in {**free, "read-only": None}.items():
                about = {"command": name, "disk": case, "needed_kb": needed // 1024}
                rows.append({**about, **_on_disk(name, inputs, errors, space)})
            faults = faults or any(row["fault"] for row in rows)
            add_rows("reliability_disks", rows)
    if faults:
        raise SystemExit(1)


def _needed(name: str, inputs: Path, errors: Path) -> int:
    """Return the bytes that a command's output takes."""
    out = inputs / "needed"
    out.mkdir()
    require_completed(writing_commands(inputs, out)[name], errors)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)
    return size


def _on_disk(name: str, inputs: Path, errors: Path, space: int | None) -> dict[str, Any]:
    """Run a command where so many bytes are free; None: where nothing can be written."""
    with mounted(inputs / "disk") as disk:
        (disk / "mine.txt").write_text("before", "utf-8")
        if space is None:
            _mount("-o", "remount,ro", str(disk))
        else:
            fill(disk, space)
        status = completed(writing_commands(inputs, disk)[name], errors)
        said = errors.read_text("utf-8").replace(f"{inputs}/", "")
        lines = [line for line in said.splitlines() if line.startswith("error:")]
        faults = []
        if status != 2:
            faults.append(f"exit status {status}")
        if len(lines) != 1 or "Traceback" in said:
            faults.append(f"{len(lines)} lines of error")
        if (disk / "mine.txt").read_text("utf-8") != "before":
            faults.append("a file was lost")
        faults += [f"half-written {each}" for each in _half_written(disk)]
        return {"exit_status": status, "said": (lines or [said[-200:]])[0][:160], "fault": "; ".join(faults)}


def _half_written(disk: Path) -> list[str]:
    """Return what a failed command left and that loads, though it is not whole, or that it should have removed."""
    found = [path.name for path in disk.rglob(".*") if path.name.endswith((".partial", ".previous"))]
    for pattern, read in _READ.items():
        for path in disk.rglob(pattern):
            try:
                read(path)
            except (OSError, ValueError, SafetensorError):
                found.append(path.name)
    return found


def _read_image(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


_READ: dict[str, Callable[[Path], Any]] = {
    "*.safetensors": load_file,
    "*.json": lambda path: json.loads(path.read_text("utf-8")),
    "*.png": _read_image,
    "*.jpg": _read_image,
}


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """Mount an empty disk in memory."""
    disk.mkdir()
    _mount("-t", "tmpfs", "-o", "size=512m", "tmpfs", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise AsdmError(f"mount: {done.stderr.strip()}; run it as root, or by unshare -rm")


def fill(disk: Path, free: int) -> None:
    """Fill a disk until so many bytes are free, in whole pages."""
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, shutil.disk_usage(disk).free - free // 4096 * 4096))


# -- long runs --------------------------------------------------------------------------------------------


def memory() -> float:
    """Return the megabytes that this process holds, without what the allocator keeps of freed memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


def quarters(samples: Sequence[float]) -> list[float]:
    """Return the medians of the four quarters of a run."""
    bounds = [len(samples) * part // 4 for part in range(5)]
    return [statistics.median(samples[bounds[part] : bounds[part + 1]]) for part in range(4)]


def require_flat(samples: Sequence[float], what: str) -> dict[str, Any]:
    """Return the memory of a run by its quarters.

    Raises:
        AsdmError: it grows after the first quarter.
    """
    if len(samples) < 8:
        raise AsdmError(f"{what}: {len(samples)} samples are too few; let it run longer")
    first, second, third, last = quarters(samples)
    row = {"first_quarter_mb": first, "second_mb": second, "third_mb": third, "last_mb": last, "peak_mb": max(samples)}
    if last > second + FLAT_MEGABYTES:
        raise AsdmError(f"{what}: memory grows: {second:.0f} MB in the second quarter, {last:.0f} MB in the last")
    return row


@app.command()
def generate(
    minutes: Annotated[float, typer.Option(help="How long.", min=0.05)] = 60,
    steps: Annotated[int, typer.Option(help="Sampling steps of an image.", min=1)] = 8,
    model: Annotated[str, typer.Option(help="As MODEL of `asdm generate`.")] = "demo",
) -> None:
    """Generate in one process, with plain calls, cached features and a new size in turns; memory has to stay flat."""
    pipeline = asdm.load_pipeline(model)
    captions = [example.caption for example in open_data("demo").examples]
    samples, images, end = [], 0, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        request: dict[str, Any] = {"prompts": [captions[images % len(captions)]], "steps": steps, "seed": images}
        if images % 3 == 1:
            request["cache_speedup"] = 1.5
        if images % 3 == 2:
            request |= {"width": 128, "height": 64}
        images += len(list(asdm.generate_images(pipeline, asdm.GenerationRequest(**request))))
        samples.append(memory())
    row = {"minutes": minutes, "images": images, "steps": steps, **require_flat(samples, "generate")}
    finish("reliability_generate", [row], model=model)


@app.command()
def distill(
    steps: Annotated[int, typer.Option(help="Training steps.", min=40)] = 2000,
    model: Annotated[str | None, typer.Option(help="MODEL; the embedded one with a small UNet by default.")] = None,
) -> None:
    """Distil in one process; memory has to stay flat."""
    samples: list[float] = []
    with workplace() as inputs:
        pipeline = small_unet(asdm.load_pipeline("demo")) if model is None else asdm.load_pipeline(model)
        plan = PruningPlan.for_unet(pipeline.unet, [asdm.Remove(unit=unit) for unit in REMOVED])
        student = build_student(denoiser_of(pipeline), plan)
        stage = Stage(name="joint", steps=steps, batch_size=4, checkpoint_every=max(10, steps // 20))
        data, out, every = inputs / "data", inputs / "training", max(1, steps // 100)

        def note(row: dict[str, float]) -> None:
            if row["step"] % every == 0:
                samples.append(memory())

        asdm.distill(pipeline, student, data, out, stages=[stage], progress=note)
    row = {"steps": steps, **require_flat(samples, "distill")}
    finish("reliability_distill", [row], model=model or "demo, small UNet")


@app.command()
def together(
    processes: Annotated[int, typer.Option(help="At once.", min=2)] = 4,
    images: Annotated[int, typer.Option(help="Of each process.", min=1)] = 8,
) -> None:
    """Generate by several processes into one folder at once; each image has to be there, and whole."""
    with workplace() as inputs:
        out, errors = inputs / "images", [inputs / f"errors-{number}.txt" for number in range(processes)]
        begun = time.monotonic()
        calls = [
            command("generate", inputs / "student", "a house", "--steps", 1, "--out", out,
                    "--seeds", f"{number * images}-{(number + 1) * images - 1}")
            for number in range(processes)
        ]  # fmt: skip
        statuses = [wait(pid) for pid in [start(call, file) for call, file in zip(calls, errors, strict=True)]]
        if any(statuses):
            raise AsdmError(f"exit statuses {statuses}: {errors[0].read_text('utf-8')[-500:]}")
        found = sorted(read_about(path)["seed"] for path in out.glob("*.png"))
        if found != list(range(processes * images)):
            raise AsdmError(f"{len(found)} images of {processes * images}; seeds {found[:20]}")
        for path in out.glob("*.png"):
            with Image.open(path) as image:
                image.load()
        row = {"processes": processes, "images": len(found), "lost": 0, "seconds": round(time.monotonic() - begun, 1)}
    finish("reliability_together", [row])


if __name__ == "__main__":
    run(app)
