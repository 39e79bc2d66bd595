"""`asdm export`: graphs for OpenVINO or ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import asdm
from asdm.choices import GraphFormat
from asdm.cli import loading
from asdm.cli.options import DATA, NAME, ConfigOption, ModelArgument, PredictionTypeOption
from asdm.cli.output import say, say_path, warn_of_skipped
from asdm.cli.progress import reporting
from asdm.errors import AsdmError


def export(
    model: ModelArgument,
    to: Annotated[GraphFormat, typer.Option("--to", help="The format of the graphs.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the images in pixels; by default the model's own.", min=1, max=8192, show_default=False
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise all weights and the denoiser's convolutions to 8 bits.")
    ] = False,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="With --int8: weights only.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"With --int8: the data that the ranges of activations are measured on. {DATA}",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        int | None,
        typer.Option(
            help="Also write the denoiser as two graphs for feature caching (cache_features): the inner one can be "
            "cached, the outer one has this many of the last layers.",
            min=1,
            max=100,
            show_default=False,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
) -> None:
    """Write a teacher or a student as OpenVINO or ONNX graphs, in a folder that optimum loads."""
    from asdm.files import require_ours

    if weights_only and not int8:
        raise AsdmError("--weights-only goes with --int8")
    require_ours(out, "export")
    warn_of_skipped(data)
    with reporting() as report:
        made = asdm.export(
            loading.load_model(model, "cpu", prediction_type=prediction_type, config=config),
            out,
            to,
            size=size,
            int8=("weights" if weights_only else "activations") if int8 else None,
            data=data,
            cache=cache,
            progress=lambda name, done, total: report("export", done, total, name),
        )
    for name, difference in made.differences.items():
        say(f"{name}: differs from torch's outputs by at most {difference:.2%}")
    say_path(f"written to {made.folder}")
