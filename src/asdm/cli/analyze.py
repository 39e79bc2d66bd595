"""`asdm analyze`: the cost and sensitivity of each unit, a schedule of feature caching, or how experts are used."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import asdm
from asdm.choices import Label
from asdm.cli import loading
from asdm.cli.estimates import YesOption, announce
from asdm.cli.options import (
    SPEEDUP,
    CompensateOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    ModelArgument,
    PredictionTypeOption,
    ProfileFile,
    SeedOption,
    SensitivityOption,
    not_a_folder,
)
from asdm.cli.output import say, say_path, show, warn_if_busy, warn_of_skipped
from asdm.cli.progress import reporting
from asdm.cli.tables import profile_table, usage_table
from asdm.errors import AsdmError

if TYPE_CHECKING:
    from asdm.caching.schedule import CacheSchedule
    from asdm.sensitivity.profile import RedundancyMap


def analyze(
    model: ModelArgument,
    data: DataOption = None,
    out: ProfileFile = None,
    cache: Annotated[
        float | None,
        typer.Option(
            help="Calibrate feature caching instead: find the sampling steps that can reuse cached features, so that "
            "the denoiser is this many times faster.",
            min=1,
            callback=SPEEDUP,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Sampling steps, for --cache; 25 by default.", min=4, max=10_000, show_default=False),
    ] = None,
    experts: Annotated[
        Label | None,
        typer.Option(
            help="Look at a student's expert kernels instead: how far prompts of different styles (or concepts) of "
            "--data are mixed differently.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="The plot to write (PNG).", callback=not_a_folder, show_default=False)
    ] = None,
    sensitivity: SensitivityOption = None,
    compensate: CompensateOption = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            help="Number of time steps to measure at; by default 4, or 2 for large models.",
            min=1,
            max=1000,
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Images or prompts to calibrate on; for --experts in a group.",
            min=1,
            max=10**6,
            show_default=False,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    yes: YesOption = False,
) -> None:
    """Measure the cost and the sensitivity of every removable unit."""
    if steps is not None and cache is None:
        raise AsdmError(f"--steps {steps}: has no effect without --cache; give that too, or leave it out")
    if experts is not None:
        if cache is not None or plot or sensitivity or compensate or data is None:
            raise AsdmError(
                "--experts: looks at routers, on the prompts of --data; name the data, and leave out --cache, --plot, "
                "--sensitivity and --compensate"
            )
        groups = _prompt_groups(data, experts)
        pipeline = loading.load_model(model, device, prediction_type=prediction_type, config=config)
        _print_usage(pipeline, groups, samples, timesteps or 4, out, seed)
        return
    if cache is not None:
        if plot or sensitivity or compensate or timesteps:
            raise AsdmError(
                "--cache: looks at sampling steps, not at units; leave out --plot, --sensitivity, --compensate and "
                "--timesteps"
            )
        pipeline = loading.load_model(model, device, prediction_type=prediction_type, config=config)
        _calibrate_cache(pipeline, model, out, speedup=cache, data=data, steps=steps or 25, samples=samples, seed=seed)
        return
    warn_of_skipped(data)
    pipeline = loading.load_model(model, device, prediction_type=prediction_type, config=config)
    settings: dict[str, Any] = {
        "data": data,
        "sensitivity": sensitivity,
        "compensate": compensate,
        "timesteps": timesteps,
        "samples": samples,
    }
    _announce(pipeline, yes, **settings)
    warn_if_busy()
    with reporting() as report:
        redundancy = asdm.analyze(
            pipeline,
            **settings,
            seed=seed,
            progress=lambda done, total, name: report("analyse", done, total, name),
        )
    out = out or Path("redundancy.json")
    redundancy.save(out)
    _print_profile(redundancy)
    say_path(f"written to {out}")
    if plot is not None:
        _plot(redundancy, plot)


def _announce(pipeline: Any, yes: bool, **settings: Any) -> None:
    from asdm.estimates.forecast import Forecast
    from asdm.estimates.steps import analysis

    forecast = Forecast(pipeline)
    announce(forecast.times([analysis(pipeline, forecast.architecture, **settings)]), yes=yes)


def _prompt_groups(data: str, label: Label) -> dict[str, list[str]]:
    from asdm.sensitivity.expert_usage import prompts_by_label

    warn_of_skipped(data)
    return prompts_by_label(data, label)


def _print_usage(
    pipeline: Any, groups: dict[str, list[str]], samples: int | None, timesteps: int, out: Path | None, seed: int
) -> None:
    """Observe the routers on some prompts of each group, print the table, and save it where a file is named."""
    from asdm.sensitivity.expert_usage import default_samples

    draw, count = random.Random(seed), samples or default_samples(pipeline)
    chosen = {name: draw.sample(texts, min(count, len(texts))) for name, texts in groups.items()}
    usage = asdm.expert_usage(pipeline, chosen, timesteps=timesteps, seed=seed)
    if out is not None:
        usage.save(out)
    show(usage_table(usage))
    if out is not None:
        say_path(f"written to {out}")


def _print_profile(redundancy: RedundancyMap) -> None:
    show(profile_table(redundancy))
    denoiser = redundancy.family.label
    say(
        f"{denoiser}: {redundancy.parameters / 1e6:.1f}M parameters, "
        f"{redundancy.gmacs:.2f} GMACs with attention products ({redundancy.gmacs_without_attention:.2f} without), "
        f"{redundancy.latency_ms:.0f} ms at batch 2 ({redundancy.dtype}, {redundancy.threads} threads). "
        f"Sensitivity by {redundancy.estimator} took the time of {redundancy.unet_forwards:.0f} {denoiser} calls "
        f"(an exact ablation needs {redundancy.necessary_forwards:.0f}), "
        f"{redundancy.seconds:.0f} s in all."
    )


def _plot(redundancy: RedundancyMap, path: Path) -> None:
    from asdm.evaluation.plots import redundancy_plot
    from asdm.evaluation.report import save_figure

    save_figure(redundancy_plot(redundancy), path)
    say_path(f"plotted in {path}")


def _calibrate_cache(pipeline: Any, model: str, out: Path | None, **settings: Any) -> None:
    """Find a schedule of feature caching, save it and describe it."""
    from asdm.caching.schedule import FILE_NAME

    with reporting() as report:
        schedule = asdm.calibrate_cache(
            pipeline, **settings, progress=lambda done, total, name: report("calibrate", done, total, name)
        )
    out = out or (Path(model) if Path(model).is_dir() else Path()) / FILE_NAME
    schedule.save(out)
    say(_description(schedule))
    say_path(f"written to {out}")


def _description(schedule: CacheSchedule) -> str:
    reuse = "extrapolated" if schedule.order else "copied"
    return (
        f"{len(schedule.full_steps)} of {schedule.steps} steps are computed in full: "
        f"{', '.join(map(str, schedule.full_steps))}. The others compute the last {schedule.depth} of the layers; the "
        f"features that these read are {reuse}. The denoiser's speed-up is {schedule.ratio} "
        f"({schedule.full_ms:.0f} ms a full call, {schedule.cached_ms:.0f} ms a cached one); distance of the final "
        f"latents {schedule.distance:.2g}, of copies at as many even steps {schedule.uniform_distance:.2g}"
    )
