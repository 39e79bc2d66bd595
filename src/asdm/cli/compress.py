"""`asdm compress`: all steps in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES
from asdm.cli.options import (
    CaptionsOption,
    CompensateOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ImageToImageOption,
    MacsOption,
    ModelArgument,
    ParamsOption,
    PredictionTypeOption,
    PresetOption,
    RecipeOption,
    RefineOption,
    SeedOption,
    SensitivityOption,
    SpeedupOption,
    StrengthOption,
    training_steps,
)
from asdm.cli.output import print_evaluation, print_skipped, say, warn_if_busy
from asdm.cli.progress import reporting


def compress(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The folder to write everything to.")],
    speedup: SpeedupOption = None,
    params: ParamsOption = None,
    macs: MacsOption = None,
    preset: PresetOption = None,
    sensitivity: SensitivityOption = None,
    compensate: CompensateOption = None,
    refine: RefineOption = None,
    data: DataOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Distillation steps, 1000 by default; 0 prunes only.", min=0, max=10**9)
    ] = None,
    recipe: RecipeOption = "joint",
    captions: CaptionsOption = None,
    samples: Annotated[int, typer.Option(help="Images per split in the evaluation.", min=0, max=10**6)] = 128,
    image_to_image: ImageToImageOption = IMAGE_TO_IMAGE_SAMPLES,
    strength: StrengthOption = None,
    sampling_steps: Annotated[int, typer.Option(help="Sampling steps in the evaluation.", min=1, max=10_000)] = 25,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Analyse, plan, prune, distil, evaluate and report, in a row; run again to resume."""
    from asdm.devices import fastest_device

    compress_and_print(
        model,
        out,
        speedup=speedup,
        params=params,
        macs=macs,
        preset=preset,
        sensitivity=sensitivity,
        compensate=compensate,
        refine=refine,
        data=data,
        steps=training_steps(steps, recipe),
        recipe=recipe,
        captions=captions,
        samples=samples,
        image_to_image=image_to_image,
        strength=strength,
        sampling_steps=sampling_steps,
        prediction_type=prediction_type,
        config=config,
        device=device or fastest_device(),
        dtype=dtype,
        seed=seed,
    )


def compress_and_print(model: str, out: Path, **settings: Any) -> None:
    """Compress a model with progress, then print the evaluation and the headline."""
    with reporting(resumable=True) as report:

        def progress(title: str, done: int, total: int, note: str) -> None:
            if (title, done) == ("analyse", 0):
                warn_if_busy()
            report(title, done, total, note)

        made = asdm.compress(model, out, progress=progress, **settings)
    print_evaluation(made.evaluation)
    print_skipped(made.skipped)
    say(f"\n[bold]{made.headline}[/bold]")
    say(f"pipeline: {made.folder}\nreport:   {made.report}")
