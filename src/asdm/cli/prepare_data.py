"""`asdm prepare-data`: latents and prompt embeddings, computed once for many trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import asdm
from asdm.cli import loading
from asdm.cli.options import DATA, NAME, ConfigOption, DeviceOption, ModelArgument, PredictionTypeOption, SeedOption
from asdm.cli.output import is_main_process, print_skipped, say_path
from asdm.cli.progress import reporting


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
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Compute the latents and prompt embeddings of DATA once, for `distill --data`; run again to resume."""
    from asdm.data.sources import require_usable
    from asdm.files import require_ours

    require_ours(out, "prepared")
    require_usable(data)
    with reporting(resumable=True) as report:
        prepared = asdm.prepare_data(
            loading.load_model(model, device, prediction_type=prediction_type, config=config),
            data,
            out,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            ignore_missing_shards=ignore_missing_shards,
            progress=lambda done, total: report("prepare", done, total, "pieces"),
        )
    if is_main_process():
        print_skipped(prepared.skipped)
        say_path(f"{len(prepared)} samples in {out}")
