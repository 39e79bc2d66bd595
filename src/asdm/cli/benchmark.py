"""`asdm benchmark`: all ways to make a pipeline faster, measured in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES, IMAGE_TO_IMAGE_STRENGTH
from asdm.cli import loading
from asdm.cli.estimates import YesOption, announce
from asdm.cli.options import (
    DATA,
    MODEL,
    NAME,
    ConfigOption,
    DecoderOption,
    DeviceOption,
    DtypeOption,
    ImageToImageOption,
    PredictionTypeOption,
    SeedOption,
    StrengthOption,
    require_effect,
    require_folder,
)
from asdm.cli.output import say, say_path, show, warn_if_busy, warn_of_skipped
from asdm.cli.progress import reporting
from asdm.cli.tables import benchmark_table
from asdm.errors import AsdmError


def benchmark(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(help=f"One or more models, demo by default: {MODEL}.", callback=NAME, show_default=False),
    ] = None,
    students: Annotated[
        list[Path] | None,
        typer.Option(
            "--student", help="A student of the first model, alone and combined with other methods.", show_default=False
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help=f"{DATA} Without it, speed only.", callback=NAME, show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(help="Images per split.", min=2, max=10**6)] = 64,
    image_to_image: ImageToImageOption = IMAGE_TO_IMAGE_SAMPLES,
    strength: StrengthOption = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=4, max=10_000)] = 25,
    rounds: Annotated[int, typer.Option(help="Timed images of each method.", min=1, max=10_000)] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only methods, of all that --full measures, whose names contain this; may be repeated.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Every setting and combination: where images are judged, three times as many methods."
        ),
    ] = False,
    decoder: DecoderOption = None,
    out: Annotated[Path, typer.Option(help="The folder to write results and plots to.")] = Path("benchmark"),
    images: Annotated[
        Path | None,
        typer.Option(
            help="The folder to save images to; of several models, a folder for each in it.", show_default=False
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    yes: YesOption = False,
) -> None:
    """Compare methods that make a pipeline faster, ours and baselines, in one run: speed and loss of quality.

    Results of other models that are already in the folder stay there. The same command goes on where it was stopped,
    once the methods are timed.
    """
    from asdm.benchmark.models import RESULTS, benchmark_model, open_results, save_results, unfinished
    from asdm.evaluation.image_folders import distinct_names, folder_names
    from asdm.measure.limits import machine_limits
    from asdm.pipelines.names import require_model_named

    models = models or ["demo"]
    _require_distinct(models)
    for model in models:
        require_model_named(model)
    loading.require_decoder_named(decoder)
    _require_effects(context, models, data, image_to_image)
    require_folder(out)
    require_folder(images)
    warn_of_skipped(data)
    names = distinct_names([str(folder) for folder in students or ()], shortest=True)
    results, limits = open_results(out), None
    for number, model in enumerate(models):
        first = number == 0
        claims: dict[str, Any] = {"prediction_type": prediction_type, "config": config} if first else {}
        pipeline = loading.load_model(model, device, dtype, **claims)
        if decoder is not None and first:
            asdm.with_decoder(pipeline, decoder)  # refused before anything is measured
        folders = zip(names, students or (), strict=True) if first else ()
        loaded = {name: loading.load_model(str(folder), device, dtype) for name, folder in folders}
        _announce(
            pipeline,
            loaded,
            yes or not first,
            steps=steps,
            only=only or (),
            full=full,
            decoder=decoder if first else None,
            data=_data_of(model, data),
            samples=samples,
            image_to_image=image_to_image,
            strength=strength or IMAGE_TO_IMAGE_STRENGTH,
            rounds=rounds,
            seed=seed,
        )
        warn_if_busy()
        limits = limits or machine_limits(pipeline.device)
        kept = unfinished(out, model)
        with reporting(otherwise=partial(_left, out / RESULTS, kept)) as report:
            measured = benchmark_model(
                pipeline,
                model,
                students=loaded,
                data=_data_of(model, data),
                limits=limits,
                samples=samples,
                image_to_image=image_to_image,
                strength=strength or IMAGE_TO_IMAGE_STRENGTH,
                steps=steps,
                rounds=rounds,
                only=only or (),
                full=full,
                decoder=decoder if first else None,
                seed=seed,
                images_folder=images / folder_names(models)[model] if images and len(models) > 1 else images,
                kept=kept,
                progress=lambda title, done, total, model=model: report(f"{title}, {model}", done, total),  # type: ignore[misc]
            )
        results = save_results(results, measured, out)
        show(benchmark_table(measured.rows))
        if measured.busy_line is not None:
            say(f"during the measurement, {measured.busy_line}")
    _print_limits(limits or {})
    say_path(f"written to {out}")


def _left(results: Path, kept: Path) -> str:
    """Say what an interrupted benchmark leaves."""
    finished = [f"finished models are in {results}"] if results.exists() else []
    timed = [f"this one's rows are in {kept}: run the same command again to go on"] if kept.exists() else []
    return "; ".join(finished + timed) or "nothing was written"


def _announce(
    pipeline: Any,
    students: Mapping[str, Any],
    yes: bool,
    *,
    steps: int,
    only: Sequence[str],
    full: bool,
    decoder: str | None,
    data: str | None,
    **settings: Any,
) -> None:
    """Print how long the benchmark of a model will take."""
    from asdm.benchmark.models import chosen_methods
    from asdm.benchmark.techniques import with_dpm_solver
    from asdm.estimates.forecast import Forecast, benchmarking

    pipeline = with_dpm_solver(pipeline)
    methods, forecast = chosen_methods(pipeline, students, data, steps, only, full, decoder), Forecast(pipeline)
    works = benchmarking(pipeline, methods, data=data, call_ms=forecast.call_ms, **settings)
    announce(forecast.times(works), yes=yes)


def _require_distinct(models: list[str]) -> None:
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise AsdmError(f"{twice}: named twice; name each model once")


def _require_effects(context: typer.Context, models: list[str], data: str | None, image_to_image: int) -> None:
    """Refuse options about images where there are none."""
    if not any(_data_of(model, data) for model in models):
        judged = ("images", "samples", "image_to_image", "strength")
        require_effect(context, judged, "without --data, as no images are judged")
    require_effect(context, ("strength",) if image_to_image == 0 else (), "with --image-to-image 0")


def _data_of(model: str, data: str | None) -> str | None:
    """Return a model's data: the embedded model's own by default, and none for random weights."""
    if model.startswith("random:"):
        return None
    return "demo" if data is None and model == "demo" else data


def _print_limits(limits: Mapping[str, Mapping[str, float]]) -> None:
    for precision, best in limits.items():
        throughput = ", ".join(f"{what} {value:.0f}" for what, value in best.items())
        say(f"this machine's best in {precision}, GFLOP/s: {throughput}")
