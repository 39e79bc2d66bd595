"""One model in the benchmark: which methods it is measured with, its rows, and the machine's load meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from pydantic import Field

from asdm.benchmark.method import Method
from asdm.benchmark.methods import methods
from asdm.benchmark.plot import benchmark_plot
from asdm.benchmark.results import Benchmark, BenchmarkRow, BenchmarkRun
from asdm.benchmark.run import judge_methods, time_methods
from asdm.benchmark.techniques import preset_students, with_denoiser, with_dpm_solver, with_few_step
from asdm.benchmark.timing import Progress
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES, IMAGE_TO_IMAGE_STRENGTH
from asdm.diffusion.generation import is_few_step
from asdm.diffusion.kinds import is_random
from asdm.errors import AsdmError
from asdm.evaluation.image_folders import folder_name
from asdm.evaluation.protocol.image_job import identity_of
from asdm.evaluation.report import save_figure
from asdm.families import denoiser_of
from asdm.files import write_text
from asdm.measure.load import LoadMeter, busy_line
from asdm.pipelines.decoders import RANDOM_DECODER
from asdm.pipelines.derived import without_safety_checker
from asdm.records import Record, read_record

RESULTS = "benchmark.json"  # in the benchmark's folder


class MeasuredModel(Record):
    """A model's rows, and when and where they were timed.

    While images are being judged it is kept beside the results, so that a stopped benchmark goes on with them.
    """

    model: str
    settings: dict[str, Any] = Field(description="what decides the rows; with others they are measured anew")
    run: BenchmarkRun
    rows: list[BenchmarkRow]
    busy_line: str | None = Field(default=None, description="a sentence if the machine was busy")


def unfinished(folder: Path, model: str) -> Path:
    """Return the file in a benchmark's folder that keeps a model's rows until all images are judged."""
    return folder / f"unfinished_{folder_name(model)}.json"


def open_results(folder: Path) -> Benchmark:
    """Return the results that are in a benchmark's folder already; empty ones for a new folder."""
    path = folder / RESULTS
    return Benchmark.load(path) if path.exists() else Benchmark()


def save_results(results: Benchmark, measured: MeasuredModel, folder: Path) -> Benchmark:
    """Replace a model's earlier results, save all of them, and plot the model's where images were judged."""
    results = results.with_place(measured.model, measured.run, measured.rows)
    results.save(folder / RESULTS)
    if any(row.teacher_distance for row in measured.rows):
        title = f"{measured.model}, {measured.run.machine}, {measured.run.threads} threads"
        save_figure(benchmark_plot(measured.rows, title), folder / f"benchmark_{folder_name(measured.model)}.png")
    unfinished(folder, measured.model).unlink(missing_ok=True)
    return results


def benchmark_model(
    pipeline: DiffusionPipeline,
    model: str,
    *,
    students: Mapping[str, DiffusionPipeline],
    data: str | Path | None,
    limits: dict[str, dict[str, float]],
    samples: int = 64,
    image_to_image: int = IMAGE_TO_IMAGE_SAMPLES,
    strength: float = IMAGE_TO_IMAGE_STRENGTH,
    steps: int = 25,
    rounds: int = 5,
    only: Collection[str] = (),
    full: bool = False,
    decoder: str | None = None,
    seed: int = 0,
    images_folder: Path | None = None,
    kept: Path | None = None,
    progress: Progress | None = None,
) -> MeasuredModel:
    """Measure a model with each method.

    Args:
        students: the model's students by name; few-step ones sample as they were made to. A model with random weights
            is measured with the presets' students too.
        data: prompts and real images; None for speed only, as for random weights.
        image_to_image, strength: as for `evaluate`.
        limits: the machine's best throughput (`machine_limits`).
        only: parts of the methods' names, of all that `full` adds, too. The original is always measured.
        full: every setting and combination (`methods`).
        decoder: a tiny decoder, with which the original and the stacks are measured too; for random weights one of
            TAESD's size by default.
        kept: a file that keeps the rows while images are judged. Rows of a stopped benchmark in it, with the same
            settings, are neither timed nor judged again.
    """
    pipeline = without_safety_checker(with_dpm_solver(pipeline))
    chosen = chosen_methods(pipeline, students, data, steps, only, full, decoder)
    judged: dict[str, Any] = {
        "samples": samples,
        "image_to_image": image_to_image,
        "strength": strength,
        "seed": seed,
    }
    run = BenchmarkRun.now(device=pipeline.device, rounds=rounds, seed=seed, limits=limits)
    settings = {
        "models": {name: identity_of(each) for name, each in {model: pipeline, **students}.items()},
        "methods": [f"{method.name} in {method.steps} steps" for method in chosen],
        "data": None if data is None else str(data),
        "decoder": decoder,
        "rounds": rounds,
        **judged,
        **run.model_dump(include={"machine", "versions", "threads"}),
    }
    measured = None if kept is None else _kept(kept, settings)
    if measured is None:
        meter = LoadMeter()
        rows = time_methods(pipeline, chosen, place=model, rounds=rounds, limits=limits, progress=progress)
        meter.mark()
        others = meter.other_cores()
        measured = MeasuredModel(
            model=model,
            settings=settings,
            run=run.model_copy(update={"other_cores": others}),
            rows=rows,
            busy_line=busy_line(others, meter.contention()),
        )
    if data is None:
        return measured
    _keep(measured, kept)
    judging = judge_methods(
        pipeline, chosen, measured.rows, data=data, **judged, images_folder=images_folder, progress=progress
    )
    for rows in judging:
        measured = measured.model_copy(update={"rows": rows})
        _keep(measured, kept)
    if any(row.image_to_image for row in measured.rows):
        measured = measured.model_copy(update={"run": measured.run.model_copy(update={"strength": strength})})
    return measured


def _keep(measured: MeasuredModel, path: Path | None) -> None:
    if path is not None:
        write_text(path, measured.model_dump_json(indent=1) + "\n")


def _kept(path: Path, settings: dict[str, Any]) -> MeasuredModel | None:
    """Return what a stopped benchmark of the same settings kept; None where there is none."""
    try:
        found = read_record(MeasuredModel, path, "a benchmark that was stopped", "remove it")
    except AsdmError:
        return None
    return found if found.settings == settings else None


def chosen_methods(
    pipeline: DiffusionPipeline,
    students: Mapping[str, DiffusionPipeline],
    data: str | Path | None,
    steps: int,
    only: Collection[str],
    full: bool = False,
    decoder: str | None = None,
) -> list[Method]:
    """Return the methods that `benchmark_model` measures a model with, given the same arguments.

    Raises:
        AsdmError: no method's name contains any of `only`.
    """
    trained: dict[str, Any] = preset_students(pipeline) if is_random(pipeline) else {}
    few_step: dict[str, Any] = {}
    for name, student in students.items():
        if is_few_step(student):
            few_step[name] = with_few_step(student)
        else:
            trained[name] = with_denoiser(denoiser_of(student))
    on_cpu = pipeline.device.type == "cpu"
    if decoder is None and is_random(pipeline):
        decoder = RANDOM_DECODER
    found = methods(
        steps, trained, few_step=few_step, data=data, graphs=on_cpu, decoder=decoder, full=full or bool(only)
    )
    if not only:
        return found
    chosen = [method for method in found if any(part in method.name for part in only)]
    if not chosen:
        names = ", ".join(method.name for method in found[:12])
        raise AsdmError(f"--only {' --only '.join(only)}: no method's name contains this; names are {names}, ...")
    return [method for method in found if method.group == "original" or method in chosen]
