"""One model in the benchmark: which methods it is measured with, its rows, and the machine's load meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from asdm.benchmark.method import Method
from asdm.benchmark.methods import methods
from asdm.benchmark.plot import benchmark_plot
from asdm.benchmark.results import Benchmark, BenchmarkRow, BenchmarkRun
from asdm.benchmark.run import benchmark_rows
from asdm.benchmark.techniques import preset_students, with_denoiser, with_dpm_solver
from asdm.benchmark.timing import Progress
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES, IMAGE_TO_IMAGE_STRENGTH
from asdm.diffusion.generation import is_few_step
from asdm.diffusion.kinds import is_random
from asdm.evaluation.image_folders import folder_name
from asdm.evaluation.report import save_figure
from asdm.families import denoiser_of
from asdm.measure.load import LoadMeter, busy_line
from asdm.pipelines.decoders import RANDOM_DECODER
from asdm.pipelines.derived import without_safety_checker

RESULTS = "benchmark.json"  # in the benchmark's folder


@dataclass(frozen=True)
class MeasuredModel:
    """A model's rows, when and where they were measured, and a sentence if the machine was busy."""

    model: str
    run: BenchmarkRun
    rows: list[BenchmarkRow]
    busy_line: str | None


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
    decoder: str | None = None,
    seed: int = 0,
    images_folder: Path | None = None,
    progress: Progress | None = None,
) -> MeasuredModel:
    """Measure a model with each method.

    Args:
        students: the model's students by name; few-step ones sample as they were made to. A model with random weights
            is measured with the presets' students too.
        data: prompts and real images; None for speed only, as for random weights.
        image_to_image, strength: as for `evaluate`.
        limits: the machine's best throughput (`machine_limits`).
        only: parts of the methods' names; none of them for all methods. The original is always measured.
        decoder: a tiny decoder, with which the original and the stacks are measured too; for random weights one of
            TAESD's size by default.
    """
    pipeline = without_safety_checker(with_dpm_solver(pipeline))
    chosen = chosen_methods(pipeline, students, data, steps, only, decoder)
    meter = LoadMeter()
    rows = benchmark_rows(
        pipeline,
        chosen,
        place=model,
        data=data,
        samples=samples,
        image_to_image=image_to_image,
        strength=strength,
        rounds=rounds,
        seed=seed,
        limits=limits,
        images_folder=images_folder,
        progress=progress,
    )
    meter.mark()
    others = meter.other_cores()
    run = BenchmarkRun.now(
        device=pipeline.device,
        rounds=rounds,
        seed=seed,
        limits=limits,
        other_cores=others,
        strength=strength if any(row.image_to_image for row in rows) else None,
    )
    return MeasuredModel(model, run, rows, busy_line(others, meter.contention()))


def chosen_methods(
    pipeline: DiffusionPipeline,
    students: Mapping[str, DiffusionPipeline],
    data: str | Path | None,
    steps: int,
    only: Collection[str],
    decoder: str | None = None,
) -> list[Method]:
    """Return the methods that `benchmark_model` measures a model with, given the same arguments."""
    trained: dict[str, Any] = preset_students(pipeline) if is_random(pipeline) else {}
    few_step: dict[str, Any] = {}
    for name, student in students.items():
        (few_step if is_few_step(student) else trained)[name] = with_denoiser(denoiser_of(student))
    on_cpu = pipeline.device.type == "cpu"
    if decoder is None and is_random(pipeline):
        decoder = RANDOM_DECODER
    found = methods(steps, trained, few_step=few_step, data=data, graphs=on_cpu, decoder=decoder)
    if not only:
        return found
    return [method for method in found if method.group == "original" or any(part in method.name for part in only)]
