"""What each part of the method is worth: distillations of equal cost from one plan, with and without it.

    python benchmarks/ablation.py run                       # all that is not in docs/results/ablation.json yet
    python benchmarks/ablation.py run --only bk-sdm,full --seeds 0
    python benchmarks/ablation.py run --device cuda --jobs 12
    python benchmarks/ablation.py time                      # the UNets' speed-ups, when nothing else runs
    python benchmarks/ablation.py show                      # mean and spread over the seeds: tables, plot, images

The embedded pipeline; one plan of removals for each speed-up; each run trains for the time of so many steps of BK-SDM's
recipe, by the steps' cost as measured in turns, so that other load affects all recipes alike. At 1.5x the components
one by one, in short runs, and students of the faster plan that leave the last steps of an image to the original; at 2x
and 2.5x what is for harder plans: expert kernels by what their routers read, and whether they divide the styles among
them; at 2x semantic supervision on captions without their images, too, and the named recipes in long runs. A finished
run is not run again, one that was stopped goes on; two processes can share the work, each with its own --seeds or
--only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import common
import torch
import typer
from ablation_costs import costs_of_steps, steps_of_equal_cost
from ablation_judging import DRAWN, SHOWN, Judged, cut, expert_division, held_out, strip_path
from ablation_recipes import (
    EXPERTS,
    FAST_SPEEDUP,
    LENGTHS,
    SWITCHING,
    WORK,
    is_short,
    length_of,
    planned_speedup,
    speedup_of_all_steps,
    variants,
    without_length,
)
from ablation_rows import (
    ROWS,
    add_row,
    is_known,
    known_rows,
    known_teacher,
    plot,
    print_division,
    print_table,
    rows_by_name,
)
from ablation_students import drawing_pipeline, folded_student_of, plan_of, student_of, train
from common import RESULTS, machine
from PIL import Image

import asdm
from asdm.distillation.training_set import prepare
from asdm.errors import AsdmError
from asdm.evaluation.plots import image_sheet
from asdm.families import denoiser_call
from asdm.files import write_text
from asdm.measure.latency import measure_interleaved
from asdm.measure.machine import fast_training

N = TypeVar("N", int, float)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    only: str = typer.Option("", help="Names of recipes, separated by commas; all by default."),
    seeds: str = typer.Option("0,1,2", help="Seeds, separated by commas."),
    targets: str = typer.Option("1.5,2.0,2.5", help="UNet speed-ups of the plans, separated by commas."),
    samples: int = typer.Option(100, help="Held-out images, of which there are 200, and a quarter as many seen ones."),
    device: str = typer.Option("cpu", help="Where to train and draw; what a step costs is measured on the CPU."),
    jobs: int = typer.Option(1, help="Runs at a time, each in its own process."),
) -> None:
    """Train and judge what is not in the results yet; each run is kept as soon as it is done."""
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    speedups = _numbers("--targets", targets, float)
    _require(chosen, speedups, samples)
    missing = (  # looked up one by one, as another process may be adding rows, too
        (name, seed, target)
        for seed in _numbers("--seeds", seeds, int)
        for target in speedups
        for name in ("teacher", *variants(target))
        if (not chosen or name in chosen) and not is_known(name, seed, target)
    )
    bench = _Bench(device, samples)
    if jobs == 1:
        for run_of in missing:
            bench.run(*run_of)
    else:
        _run_side_by_side(bench, list(missing), jobs)


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Return the numbers that an option lists."""
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError:
        raise AsdmError(f"{option} {text}: must be numbers, separated by commas") from None


def _require(names: list[str], targets: list[float], samples: int) -> None:
    """Raise an AsdmError for a target or a recipe that there is not, or other images than those of the known rows."""
    for target in targets:
        if target not in LENGTHS:
            raise AsdmError(
                f"--targets {target:g}: no such plan; there are {', '.join(f'{each:g}' for each in LENGTHS)}"
            )
    recipes = ["teacher", *dict.fromkeys(name for target in targets for name in variants(target))]
    for name in names:
        if name not in recipes:
            raise AsdmError(f"--only {name}: no such recipe at these targets; there are {', '.join(recipes)}")
    judged = {row["images"] for row in known_rows()} - {samples}
    if judged:
        raise AsdmError(f"--samples {samples}: the rows in {ROWS} are of {judged.pop()} images; judge as many")


def _run_side_by_side(bench: _Bench, missing: list[tuple[str, int, float]], jobs: int) -> None:
    """The teacher's rows here, then all others in processes of their own; what these share is made before."""
    for run_of in missing:
        if run_of[0] == "teacher":
            bench.run(*run_of)
    others = [run_of for run_of in missing if run_of[0] != "teacher"]
    if not others:
        return
    for target in {target for _, _, target in others} | {FAST_SPEEDUP}:
        costs_of_steps(bench.examples, target)
    for seed in {seed for _, seed, _ in others}:
        bench.judged.see_teacher(seed)
    others.sort(key=lambda run_of: length_of(run_of[0], run_of[2]), reverse=True)  # the longest first
    threads = max(1, torch.get_num_threads() // jobs)
    given = (str(bench.pipeline.device), bench.judged.samples, threads)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, given) as pool:
        list(pool.map(_run_in_worker, *zip(*others, strict=True)))


class _Bench:
    """The teacher, what is trained on, and the judge."""

    def __init__(self, device: str, samples: int):
        self.pipeline = asdm.load_pipeline("demo", device=device)
        self.examples = prepare(self.pipeline, "demo", WORK / "prepared")
        self.judged = Judged(self.pipeline, samples)

    @fast_training()
    def run(self, name: str, seed: int, target: float) -> None:
        """Add one row."""
        key = {"name": name, "seed": seed, "target": target}
        pipeline = self.pipeline
        strip = strip_path(name, target) if seed == 0 and name in DRAWN else None
        about = machine(pipeline.device)
        if name == "teacher":
            add_row(key | (known_teacher(seed) or {"steps": 0} | self.judged(pipeline, seed, strip) | about) | key)
            return
        components = variants(target)[name]
        student = student_of(pipeline.unet, plan_of(pipeline, planned_speedup(name, target)), components)
        steps = steps_of_equal_cost(self.examples, student, name, components, target)
        folder = WORK / f"{target:g}-{seed}-{name.replace(' ', '')}"
        train(pipeline, student, components, steps, seed, folder)
        drawing = drawing_pipeline(pipeline, student, name)
        found = {"steps": steps} | self.judged(drawing, seed, strip)
        if not name.endswith(SWITCHING):  # whose last predictions are the original's
            found["prediction_error_heldout"] = self.judged.prediction_error(student)
        if any("prompt" in EXPERTS.get(component, "") for component in components):
            found |= expert_division(drawing)
        add_row(key | found | about)
        shutil.rmtree(folder, ignore_errors=True)  # none where nothing was trained


def _begin(device: str, samples: int, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench = _Bench(device, samples)


def _run_in_worker(name: str, seed: int, target: float) -> None:
    _bench.run(name, seed, target)


@app.command()
def time(rounds: int = 40) -> None:
    """The UNet's speed-up of each finished recipe, all students of a target in turns; when nothing else runs. Recipes
    that differ in the training alone have one student."""
    pipeline = asdm.load_pipeline("demo")
    rows = known_rows()
    for target in sorted({row["target"] for row in rows}):
        finished = {without_length(row["name"]) for row in rows if row["target"] == target}
        measured, calls = {"teacher": "teacher"}, {"teacher": denoiser_call(pipeline.unet)}
        for name, components in variants(target).items():
            if name in finished:
                plan = plan_of(pipeline, planned_speedup(name, target))
                student = folded_student_of(pipeline.unet, plan, components)
                measured[name] = json.dumps(student.config.edits)
                calls.setdefault(measured[name], denoiser_call(student))
        times = measure_interleaved(calls, rounds=rounds)
        for row in rows:
            if row["target"] == target:
                found = times.speedup("teacher", measured[without_length(row["name"])])
                value, low, high = (speedup_of_all_steps(row["name"], each) for each in (found.value, *found.interval))
                row |= {"speedup": value, "speedup_interval": [low, high]}
    write_text(ROWS, json.dumps(rows, indent=1) + "\n")


@app.command()
def show() -> None:
    """Mean and deviation over the seeds, the teacher first: tables in Markdown, the plot, the sheet of images."""
    rows = known_rows()
    for target in sorted({row["target"] for row in rows}):
        by_name = rows_by_name(rows, target)
        long = {name: mine for name, mine in by_name.items() if not is_short(name)}
        print_table(f"plan of {target:g}x", long)
        print_table(f"plan of {target:g}x, short runs", {n: mine for n, mine in by_name.items() if n not in long})
        print_division(f"plan of {target:g}x, expert kernels", by_name)
    plot(rows).savefig(RESULTS.parent / "ablation.png", dpi=120)
    captions = held_out(SHOWN).prompts
    strips = [strip_path(name, target) for target in LENGTHS for name in DRAWN]
    images = [cut(Image.open(path)) for path in dict.fromkeys(strips) if path.is_file()]
    image_sheet(captions, images, across=SHOWN).save(RESULTS.parent / "ablation_images.png")


if __name__ == "__main__":
    common.run(app)
