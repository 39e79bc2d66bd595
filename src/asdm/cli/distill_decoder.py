"""`asdm distill-decoder`: train a tiny decoder beside a model's VAE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import asdm
from asdm.cli import loading
from asdm.cli.estimates import YesOption, announce
from asdm.cli.options import (
    DATA,
    NAME,
    POSITIVE,
    ConfigOption,
    DeviceOption,
    ModelArgument,
    PredictionTypeOption,
    SeedOption,
)
from asdm.cli.output import is_main_process, print_skipped, say, say_path, show
from asdm.cli.progress import reporting
from asdm.cli.tables import decoder_table
from asdm.errors import AsdmError

if TYPE_CHECKING:
    from asdm.distillation.decoder import DecoderTraining
    from asdm.distillation.decoder_recipe import DecoderRecipe


def distill_decoder(
    model: ModelArgument,
    data: Annotated[str, typer.Option("--data", help=DATA, callback=NAME)],
    out: Annotated[Path, typer.Option(help="The folder to write the decoder to.")],
    steps: Annotated[
        int | None, typer.Option(help="Training steps, 1500 by default.", min=1, max=10**9, show_default=False)
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            help="Channels of all layers, by default 64, and 32 for a narrow VAE.", min=1, max=1024, show_default=False
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Residual blocks of each level, from the latents to the pixels, such as 3,3,3,1, the default for "
            "images of eight times the latents' side.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Latents in a step, 16 by default.", min=1, max=10**6, show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A YAML file with these settings and others (docs/decoder.md).", show_default=False),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Save and stop after this many minutes of training.", callback=POSITIVE, show_default=False),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    yes: YesOption = False,
) -> None:
    """Train a tiny decoder to make the images that a model's VAE makes, several times faster; run again to resume."""
    from asdm.data.sources import require_usable
    from asdm.distillation.decoder import require_teachable
    from asdm.files import require_ours
    from asdm.pipelines.decoders import KIND, save_decoder

    settings = _recipe(recipe, steps=steps, width=width, blocks=blocks, batch_size=batch_size)
    require_ours(out, KIND)
    require_usable(data)
    pipeline = loading.load_model(model, device, prediction_type=prediction_type, config=config)
    require_teachable(pipeline)
    training = out.with_name(f"{out.name}.training")
    if is_main_process():
        _announce(pipeline, settings, data, training, yes)
    with reporting(resumable=True) as report:
        made = asdm.distill_decoder(
            pipeline,
            data,
            training,
            recipe=settings,
            minutes=minutes,
            seed=seed,
            progress=lambda row: report("decoder", int(row["step"]), int(row["steps"]), f"pixels {row['pixels']:.4f}"),
        )
    if not is_main_process():
        return
    print_skipped(made.examples.skipped)
    if not made.is_done:
        say(f"stopped after {minutes:g} minutes; run again to go on")
        return
    save_decoder(made.decoder, out, {"teacher": model, "recipe": settings.model_dump(mode="json")})
    _print_comparison(pipeline, made, data)
    say_path(f"written to {out}; log and checkpoints in {training}")


def _recipe(file: Path | None, *, blocks: str | None, **given: Any) -> DecoderRecipe:
    """Return the recipe of a file, or the default one, with the options' values."""
    from asdm.distillation.decoder_recipe import DecoderRecipe, read_decoder_recipe

    fields = {name: value for name, value in given.items() if value is not None}
    if blocks is not None:
        try:
            fields["blocks"] = [int(part) for part in blocks.split(",")]
        except ValueError:
            raise AsdmError(f"--blocks={blocks}: must be whole numbers with commas, such as 3,3,3,1") from None
    read = {} if file is None else read_decoder_recipe(file).model_dump()
    return DecoderRecipe(**read | fields)


def _announce(pipeline: Any, recipe: DecoderRecipe, data: str, folder: Path, yes: bool) -> None:
    """Print how long the training will take."""
    from asdm.estimates.decoder import decoder_training
    from asdm.estimates.machine import MachineSpeed

    announce(MachineSpeed(pipeline).times(decoder_training(pipeline, recipe, data=data, folder=folder)), yes=yes)


def _print_comparison(pipeline: Any, made: DecoderTraining, data: str) -> None:
    """Print what the decoder is beside the VAE: its size, its speed and its images."""
    from asdm.evaluation.decoders import compare_decoder, held_out_set, prepared_set

    decoded = held_out_set(pipeline, data) or prepared_set(made.examples.prepared)
    show(decoder_table(compare_decoder(pipeline, made.decoder, decoded)))
