"""`asdm export`: graphs for OpenVINO or ONNX, or one file for the programs that people draw with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm.choices import ExportFormat, FileDtype, Program
from asdm.cli import loading
from asdm.cli.options import DATA, NAME, ConfigOption, DecoderOption, ModelArgument, PredictionTypeOption
from asdm.cli.output import say, say_path, warn_of_skipped
from asdm.cli.progress import reporting
from asdm.errors import AsdmError


def export(
    model: ModelArgument,
    to: Annotated[
        ExportFormat,
        typer.Option("--to", help="The format of the graphs; or checkpoint: one file in the original layout."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write to; for a checkpoint the .safetensors file.")],
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
    decoder: DecoderOption = None,
    program: Annotated[
        Program | None,
        typer.Option(
            "--for",
            help="With --to checkpoint: who reads the file: comfyui (also Forge; the default), sdcpp "
            "(stable-diffusion.cpp) or diffusers.",
            show_default=False,
        ),
    ] = None,
    unet_only: Annotated[
        bool, typer.Option("--unet-only", help="With --to checkpoint: without VAE and text encoders.")
    ] = False,
    dtype: Annotated[
        FileDtype | None,
        typer.Option(help="With --to checkpoint: precision of the file; fp16 by default.", show_default=False),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="With --to checkpoint: the model's licence; by default what its model card says.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
) -> None:
    """Write a teacher or a student as OpenVINO or ONNX graphs, in a folder that optimum loads, or as one file for
    ComfyUI, Forge and stable-diffusion.cpp."""
    claims: dict[str, Any] = {"prediction_type": prediction_type, "config": config}
    of_graphs = {"--size": size, "--int8": int8, "--weights-only": weights_only, "--data": data, "--cache": cache}
    of_graphs |= {"--decoder": decoder}
    of_file = {"--for": program, "--unet-only": unet_only, "--dtype": dtype, "--license": license}
    for name, value in (of_graphs if to == "checkpoint" else of_file).items():
        if value not in (None, False):
            raise AsdmError(f"{name}: does not go with --to {to}; leave it out")
    if to == "checkpoint":
        _export_checkpoint(model, out, program or "comfyui", unet_only, dtype or "fp16", license, claims)
        return
    _export_graphs(
        model,
        decoder,
        out,
        claims,
        to=to,
        size=size,
        int8=("weights" if weights_only else "activations") if int8 else None,
        data=data,
        cache=cache,
        weights_only=weights_only,
    )


def _export_graphs(
    model: str, decoder: str | None, out: Path, claims: dict[str, Any], *, weights_only: bool, **settings: Any
) -> None:
    from asdm.files import require_ours

    if weights_only and settings["int8"] is None:
        raise AsdmError("--weights-only goes with --int8")
    require_ours(out, "export")
    warn_of_skipped(settings["data"])
    with reporting() as report:
        made = asdm.export(
            loading.load_with_decoder(model, decoder, "cpu", **claims),
            out,
            **settings,
            progress=lambda name, done, total: report("export", done, total, name),
        )
    for name, difference in made.differences.items():
        say(f"{name}: differs from torch's outputs by at most {difference:.2%}")
    say_path(f"written to {made.folder}")


def _export_checkpoint(
    model: str,
    out: Path,
    program: Program,
    unet_only: bool,
    dtype: FileDtype,
    license: str | None,
    claims: dict[str, Any],
) -> None:
    import torch

    from asdm.pipelines.loading import load_mapped
    from asdm.runtime.checkpoint import require_file

    require_file(out)
    # What is in no folder in the precision of the file, so that memory never holds more than that.
    precision = {"fp16": torch.float16, "fp32": torch.float32}[dtype]
    pipeline = load_mapped(model, dtype=precision, **claims)
    made = asdm.export_checkpoint(pipeline, out, program, unet_only=unet_only, dtype=dtype, license=license)
    for note in made.notes:
        say(f"to set: this model {note}")
    say_path(f"written to {made.file}, and what it is to {made.card}")
