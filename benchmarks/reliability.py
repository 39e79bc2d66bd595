"""What survives kills, full and read-only disks, and long runs. `docs/reliability.md` has the figures.

    python benchmarks/reliability.py kills --kills 20
    python benchmarks/reliability.py disks              # needs the right to mount; see `unshare -rm`
    python benchmarks/reliability.py generate --minutes 60
    python benchmarks/reliability.py distill --steps 2000
    python benchmarks/reliability.py together --processes 4

Each run of a command is a process of its own. It is forked from this one, which has the libraries loaded. The pipeline
is the embedded one with a small UNet.
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
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from common import RESULTS, finish, run
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tools/

import asdm
from asdm import cli
from asdm.data.prepared import PreparedData
from asdm.data.sources import open_data
from asdm.distillation.stages import Stage
from asdm.errors import AsdmError
from asdm.families import denoiser_of
from asdm.files import read_marker
from asdm.generation.image import read_about
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan
from tools.demo import recipe
from tools.demo.__main__ import main as demo_main

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])
REMOVED = ("down_blocks.1.attentions.1", "mid_block.attentions.0", "up_blocks.2.attentions.1")
IMAGES, SHARDS = 24, 4
DEMO_STEPS, DEMO_CHECKPOINT = 12, 2  # of the VAE, in a build that is killed
FLAT_MEGABYTES = 20  # that the last quarter of a long run may hold more than the second

# -- processes --------------------------------------------------------------------------------------------


def start(call: Callable[[], Any], errors: Path, files: int | None = None) -> int:
    """Call a function in a child; return its process. What it prints goes to `errors`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with errors.open("w", encoding="utf-8") as file:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(file.fileno(), 2)
            call()
            status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def wait(pid: int) -> int:
    """Return a child's exit status, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*arguments: object) -> Callable[[], None]:
    """Return a call of `asdm` with these arguments."""

    def call() -> None:
        sys.argv = ["asdm", *map(str, arguments)]
        cli.main()

    return call


def completed(call: Callable[[], Any], errors: Path) -> int:
    return wait(start(call, errors))


def require_completed(call: Callable[[], Any], errors: Path) -> None:
    """Raise an AsdmError unless a call in a child ends well."""
    status = completed(call, errors)
    if status:
        raise AsdmError(f"exit status {status}: {errors.read_text('utf-8')[-2000:]}")


# -- what the commands work on ----------------------------------------------------------------------------


def tiny_pipeline() -> Any:
    """Return the embedded pipeline with a UNet of 2 million parameters."""
    pipeline = asdm.load_pipeline("demo")
    torch.manual_seed(0)
    config = dict(pipeline.unet.config) | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 16}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    return pipeline


def prepare_inputs(folder: Path) -> None:
    """Write `teacher`, `student`, `plan.json`, `data` (images) and `shards` (the same in tars) into a folder."""
    torch.set_num_threads(1)
    pipeline = tiny_pipeline()
    asdm.save_pipeline(pipeline, folder / "teacher")
    plan = PruningPlan.for_unet(pipeline.unet, [asdm.Remove(unit=unit) for unit in REMOVED])
    plan.save(folder / "plan.json")
    asdm.save_pipeline(asdm.with_unet(pipeline, build_student(pipeline.unet, plan)), folder / "student")
    (folder / "data").mkdir()
    (folder / "shards").mkdir()
    examples = open_data("demo").examples[:IMAGES]
    for number, example in enumerate(examples):
        example.image().save(folder / "data" / f"{number:03d}.png")
        (folder / "data" / f"{number:03d}.txt").write_text(example.caption, "utf-8")
    files = sorted((folder / "data").iterdir())
    for shard in range(SHARDS):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as archive:
            for path in files[shard * len(files) // SHARDS : (shard + 1) * len(files) // SHARDS]:
                archive.add(path, path.name)
    recipe_of_a_stage = [Stage(name="joint", steps=4, batch_size=2, checkpoint_every=2).model_dump(exclude_none=True)]
    (folder / "recipe.json").write_text(json.dumps(recipe_of_a_stage), "utf-8")


@contextlib.contextmanager
def workplace(keep: bool = False) -> Iterator[Path]:
    """Yield a folder with the inputs."""
    folder = Path(tempfile.mkdtemp(prefix="asdm-reliability-"))
    try:
        require_completed(lambda: prepare_inputs(folder), folder / "errors.txt")
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def digest(folder: Path, patterns: Sequence[str] = ("**/*",)) -> dict[str, str]:
    """Return a digest of each file, by its path."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def with_earlier(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of this run, behind an earlier run's of other commands."""
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    mine = {row["command"] for row in rows}
    return [*(row for row in earlier if row["command"] not in mine), *rows]


# -- kills ------------------------------------------------------------------------------------------------


class Killed:
    """A command that is killed: the call with an output folder, what shows that its output is whole, and which of its
    files are the same in every run. Reports have times in them, and are not."""

    def __init__(
        self,
        name: str,
        call: Callable[[Path], Callable[[], None]],
        load: Callable[[Path], Any],
        same: Sequence[str] = ("**/*",),
    ):
        self.name, self.call, self.load, self.same = name, call, load, same


def killed_commands(inputs: Path) -> list[Killed]:
    teacher, student, data = inputs / "teacher", inputs / "student", inputs / "data"

    def compress(out: Path) -> Callable[[], None]:
        options = ["--params", "0.9", "--steps", "4", "--samples", "2", "--refine", "0", "--sampling-steps", "2"]
        return command("--threads", 1, "compress", teacher, "--data", data, "--out", out, *options)

    def prepare(out: Path) -> Callable[[], None]:
        shards = f"{inputs}/shards/{{0..{SHARDS - 1}}}.tar"
        return command("--threads", 1, "prepare-data", teacher, shards, "--out", out)

    def export(out: Path) -> Callable[[], None]:
        return command("--threads", 1, "export", student, "--to", "openvino", "--out", out)

    def checkpoint_is_whole(out: Path) -> None:
        for path in out.glob("vae/checkpoint-*[0-9]/*.safetensors"):
            load_file(path)
        if not (out / "vae" / f"checkpoint-{DEMO_STEPS:07d}").is_dir():
            raise AsdmError(f"{out}: not trained to its end")

    return [
        Killed("compress", compress, asdm.load_pipeline, ("unet/*", "vae/*", "text_encoder/*", "model_index.json")),
        Killed("prepare-data", prepare, PreparedData, ("*.tar", "*.json")),
        Killed("export", export, _require_exported),
        Killed("demo-build", _demo_build, checkpoint_is_whole, ("vae/checkpoint-*/*.safetensors",)),
    ]


def _require_exported(out: Path) -> None:
    if read_marker(out).get("format") != "openvino":
        raise AsdmError(f"{out}: holds no graphs")


def _demo_build(out: Path) -> Callable[[], None]:
    """Return a call of the step of the embedded pipeline's build that trains its VAE, with few steps."""

    def call() -> None:
        torch.set_num_threads(1)
        changes: dict[str, Any] = {"steps": DEMO_STEPS, "warmup_steps": 2, "checkpoint_every": DEMO_CHECKPOINT}
        recipe.LOOPS["vae"] = replace(recipe.LOOPS["vae"], **changes)
        recipe.BATCH_SIZES["vae"] = 4
        sys.argv = ["tools.demo", "vae", "--folder", str(out)]
        demo_main()

    return call


@app.command()
def kills(
    kills: Annotated[int, typer.Option(help="Kills of each command.", min=1)] = 20,
    only: Annotated[str | None, typer.Option(help="Only this command.")] = None,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Kill each command at random moments. No half-written output may load, and the last call's output is that of an
    uninterrupted one, bit for bit."""
    with workplace() as inputs:
        rows = [
            _kill(each, inputs, kills, random.Random(seed))
            for each in killed_commands(inputs)
            if only in (None, each.name)
        ]
    finish("reliability_kills", with_earlier("reliability_kills", rows), seed=seed)


def _kill(job: Killed, inputs: Path, count: int, draw: random.Random) -> dict[str, Any]:
    errors, whole, out = inputs / "errors.txt", inputs / f"{job.name}-whole", inputs / f"{job.name}-killed"
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
        "left_over": len(left),
    }


def _loads(job: Killed, out: Path, errors: Path, expected: dict[str, str]) -> bool:
    """Return whether what a killed command left is loaded; then it has to be the whole."""

    def load() -> None:
        torch.set_num_threads(1)
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


def writing_commands(inputs: Path, out: Path) -> dict[str, Callable[[], None]]:
    """Return every command that writes, with its output in `out`."""
    teacher, student, data = inputs / "teacher", inputs / "student", inputs / "data"
    few = ["--data", data, "--samples", 2, "--steps", 2, "--rounds", 1]
    one_file = ["--to", "checkpoint", "--for", "diffusers"]
    training = ["--data", data, "--recipe", inputs / "recipe.json"]
    short = ["--params", "0.9", "--steps", "2", "--samples", "2", "--refine", "0", "--sampling-steps", "2"]
    return {
        "analyze": command("analyze", teacher, "--samples", 1, "--timesteps", 1, "--out", out / "profile.json"),
        "plan": command("plan", inputs / "profile.json", "--params", 0.9, "--out", out / "plan.json"),
        "prune": command("prune", teacher, inputs / "plan.json", "--out", out / "student"),
        "prepare-data": command("prepare-data", teacher, data, "--out", out / "prepared"),
        "distill": command("distill", teacher, student, *training, "--out", out / "distilled"),
        "evaluate": command("evaluate", teacher, student, *few, "--out", out / "evaluation"),
        "generate": command("generate", student, "a house", "--steps", 2, "--out", out / "images"),
        "export openvino": command("export", student, "--to", "openvino", "--out", out / "openvino"),
        "export checkpoint": command("export", teacher, *one_file, "--out", out / "model.safetensors"),
        "compress": command("compress", teacher, "--data", data, "--out", out / "compressed", *short),
    }  # fmt: skip


@app.command()
def disks(
    only: Annotated[str | None, typer.Option(help="Only this command.")] = None,
    parts: Annotated[str, typer.Option(help="Parts of the space that a command needs which are free.")] = "0,0.5,0.95",
) -> None:
    """Run every writing command on a full disk and in a read-only folder. It has to say so in one line with exit status
    2, and what was there stays."""
    with workplace() as inputs:
        errors = inputs / "errors.txt"
        if only in (None, "plan"):
            require_completed(writing_commands(inputs, inputs)["analyze"], errors)
        rows = []
        for name in writing_commands(inputs, inputs):
            if only not in (None, name):
                continue
            needed = _needed(name, inputs, errors)
            cases = [f"{float(part):g} of its space" for part in parts.split(",")]
            free = [int(needed * float(part)) for part in parts.split(",")]
            for case, space in [*zip(cases, free, strict=True), ("read-only", None)]:
                rows.append(
                    {
                        "command": name,
                        "disk": case,
                        "needed_kb": needed // 1024,
                        **_on_disk(name, inputs, errors, space),
                    }
                )
        finish("reliability_disks", with_earlier("reliability_disks", rows))
    if any(row["fault"] for row in rows):
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
        said = errors.read_text("utf-8")
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
    for path in disk.rglob("*.safetensors"):
        with contextlib.suppress(OSError):
            try:
                load_file(path)
            except SafetensorError:
                found.append(path.name)
    for index in disk.rglob("model_index.json"):
        try:
            json.loads(index.read_text("utf-8"))
        except ValueError:
            found.append(index.name)
    return found


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
        pipeline = tiny_pipeline() if model is None else asdm.load_pipeline(model)
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
            command("--threads", 1, "generate", inputs / "student", "a house", "--steps", 1, "--out", out,
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
