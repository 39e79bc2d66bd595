"""`asdm prepare-data`: latents and prompt embeddings, and the teacher's features, computed once for many trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm.choices import FeatureDtype
from asdm.cli import loading
from asdm.cli.options import (
    DATA,
    NAME,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    PredictionTypeOption,
    SeedOption,
)
from asdm.cli.output import is_main_process, print_skipped, say, say_path
from asdm.cli.progress import reporting
from asdm.errors import AsdmError

DRAWS = 1024


def prepare_data(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help=DATA, callback=NAME, show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write shards to.")],
    batch_size: Annotated[int, typer.Option(help="Images encoded at a time.", min=1, max=10**6)] = 16,
    steps: Annotated[
        int,
        typer.Option(
            help="Sampling steps, if DATA has captions only and MODEL generates the images.", min=1, max=10_000
        ),
    ] = 25,
    ignore_missing_shards: Annotated[
        bool,
        typer.Option("--ignore-missing-shards", help="Leave out shards that cannot be loaded, in whole or in part."),
    ] = False,
    teacher_features: Annotated[
        FeatureDtype | None,
        typer.Option(
            help="Also record MODEL's predictions and block features on fixed draws, for stages with teacher: "
            "recorded, and store the features so.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Draws to record (an image, its caption, a time step, noise), 1024 by default.",
            min=1,
            max=10**8,
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The recipe that will read the features, small-gpu by default, or a YAML file.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Compute the latents and prompt embeddings of DATA once, for `distill --data`; run again to resume."""
    from asdm.data.sources import require_usable
    from asdm.distillation.recipes import require_recipe
    from asdm.files import require_ours

    if teacher_features is None and (draws is not None or recipe is not None):
        raise AsdmError("--draws and --recipe say which features are recorded: add --teacher-features float16")
    recipe = require_recipe(recipe or "small-gpu")
    require_ours(out, "prepared")
    require_usable(data)
    pipeline = loading.load_model(model, device, dtype, prediction_type=prediction_type, config=config)
    if teacher_features is not None:
        _print_size(pipeline, out, recipe, teacher_features, draws or DRAWS)
    with reporting(resumable=True) as report:
        prepared = asdm.prepare_data(
            pipeline,
            data,
            out,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            ignore_missing_shards=ignore_missing_shards,
            progress=lambda done, total: report("prepare", done, total, "pieces"),
        )
        if teacher_features is not None:
            asdm.record_teacher(
                pipeline,
                out,
                recipe=recipe,
                draws=draws or DRAWS,
                dtype=teacher_features,
                seed=seed,
                progress=lambda done, total: report("record", done, total, "draws"),
            )
    if is_main_process():
        print_skipped(prepared.skipped)
        say_path(f"{len(prepared)} samples in {out}")


def _print_size(pipeline: Any, out: Path, recipe: str, dtype: Any, draws: int) -> None:
    """Print the size of the features that will be recorded.

    Raises:
        AsdmError: they do not fit onto the disk.
    """
    from asdm.data.draws import require_space
    from asdm.distillation.recorded import FOLDER
    from asdm.distillation.recording import recorded_stage, recording_size

    size = recording_size(pipeline, recorded_stage(pipeline, recipe), dtype, draws)
    missing = size.missing(out / FOLDER)
    free = require_space(out / FOLDER, missing * size.each, size.each)
    if is_main_process():
        say(
            f"teacher features: {size.draws} draws of {size.each / 1e6:.1f} MB as {dtype}, {missing} of them missing, "
            f"{missing * size.each / 1e9:.2f} GB; {free / 1e9:.1f} GB are free"
        )
