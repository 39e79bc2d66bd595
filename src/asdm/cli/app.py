"""The application: its commands, in the order in which the help lists them, and the options before a command's name."""

from __future__ import annotations

from typing import Annotated

import typer

from asdm.cli.analyze import analyze
from asdm.cli.benchmark import benchmark
from asdm.cli.compress import compress
from asdm.cli.convert_lora import convert_lora
from asdm.cli.demo import demo
from asdm.cli.distill import distill
from asdm.cli.distill_decoder import distill_decoder
from asdm.cli.doctor import doctor
from asdm.cli.evaluate import evaluate
from asdm.cli.export import export
from asdm.cli.generate import generate
from asdm.cli.output import say
from asdm.cli.plan import plan
from asdm.cli.prepare_data import prepare_data
from asdm.cli.prune import prune
from asdm.cli.web import app as web_app
from asdm.version import __version__

COMMANDS = (
    analyze,
    plan,
    prune,
    prepare_data,
    distill,
    distill_decoder,
    evaluate,
    generate,
    export,
    convert_lora,
    compress,
    demo,
    benchmark,
    web_app,
    doctor,
)

app = typer.Typer(
    name="asdm",
    help="Make a diffusion pipeline smaller and faster, and measure the gain in speed and the loss in quality.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"))(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"asdm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    threads: Annotated[int | None, typer.Option(help="CPU threads to use; all by default.", min=1, max=1024)] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version, and stop.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
