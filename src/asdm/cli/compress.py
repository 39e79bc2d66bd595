"""`asdm compress`: all steps in a row."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import asdm
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES
from asdm.cli.estimates import YesOption, announce, only_print
from asdm.cli.options import (
    CaptionsOption,
    CompensateOption,
    ConfigOption,
    DataOption,
    DecoderOption,
    DeviceOption,
    DtypeOption,
    ImageToImageOption,
    MacsOption,
    ModelArgument,
    ParamsOption,
    PortableOption,
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
from asdm.cli.output import print_evaluation, print_skipped, say, say_path, tell, warn_if_busy
from asdm.cli.progress import reporting
from asdm.errors import AsdmError

if TYPE_CHECKING:
    from asdm.estimates.work import StepTime


def compress(
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write everything to; not needed with --estimate.", show_default=False),
    ] = None,
    speedup: SpeedupOption = None,
    params: ParamsOption = None,
    macs: MacsOption = None,
    preset: PresetOption = None,
    portable: PortableOption = False,
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
    decoder: DecoderOption = None,
    save_decoder: Annotated[
        bool, typer.Option("--save-decoder", help="Save the result with --decoder in the place of the VAE.")
    ] = False,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print how long each step will take on this machine, and stop.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """Analyse, plan, prune, distil, evaluate and report, in a row; run again to resume."""
    from asdm.devices import fastest_device

    if out is None and not estimate:
        raise AsdmError("--out is missing: name the folder to write everything to")
    compress_and_print(
        model,
        out or Path(tempfile.gettempdir()) / f"asdm-{os.getpid()}",  # to which an estimate writes nothing
        speedup=speedup,
        params=params,
        macs=macs,
        preset=preset,
        portable=portable,
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
        decoder=decoder,
        save_decoder=save_decoder,
        prediction_type=prediction_type,
        config=config,
        device=device or fastest_device(),
        dtype=dtype,
        seed=seed,
        only_estimate=estimate,
        yes=yes,
    )


def compress_and_print(
    model: str, out: Path, *, only_estimate: bool = False, yes: bool = False, **settings: Any
) -> None:
    """Print how long the compression of a model will take, compress it with progress, then print the evaluation and
    the headline.

    Args:
        only_estimate: end after the first of these.
        yes: ask nothing.
    """
    with reporting(resumable=True) as report:

        def progress(title: str, done: int, total: int, note: str) -> None:
            if (title, done) == ("analyse", 0):
                warn_if_busy()
            report(title, done, total, note)

        def estimated(times: Sequence[StepTime]) -> None:
            if only_estimate:
                only_print(times)
            if not times:
                tell(f"{out}: nothing is left to compute; if the data or the model have changed, name another folder")
            announce(times, yes=yes)

        made = asdm.compress(model, out, progress=progress, estimated=estimated, **settings)
    print_evaluation(made.evaluation)
    print_skipped(made.skipped)
    say(f"\n{made.headline}", style="bold")
    say_path(f"pipeline: {made.folder}\nreport:   {made.report}")
