"""The command of the recipe: `python -m tools.demo unet --minutes 60`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm.cli.main import one_line_errors
from asdm.cli.options import POSITIVE
from asdm.cli.output import say
from asdm.cli.progress import reporting
from tools.demo.build import build

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command; a user's mistake is one line and exit status 2."""
    with one_line_errors():
        app()


@app.command()
def demo_build(
    step: Annotated[
        str,
        typer.Argument(
            help="images, tokenizer, clip, vae, unet, assemble, decoder, check; all is all of them but images."
        ),
    ] = "all",
    folder: Annotated[Path, typer.Option(help="Where checkpoints and the result go.")] = Path("runs/demo-build"),
    minutes: Annotated[
        float | None,
        typer.Option(help="Save and stop after this many minutes.", callback=POSITIVE, show_default=False),
    ] = None,
    warm_start: Annotated[bool, typer.Option("--warm-start", help="Train the embedded UNet further.")] = False,
    noto_font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf, for `images`.", show_default=False)
    ] = None,
    twemoji: Annotated[
        Path | None, typer.Option(help="Twemoji's 64 px PNGs, for `images`.", show_default=False)
    ] = None,
) -> None:
    """Build the embedded pipeline again by its recipe; each build step resumes where it stopped."""
    with reporting(resumable=True) as report:
        build(
            step,
            folder,
            minutes=minutes,
            warm_start=warm_start,
            noto_font=noto_font,
            twemoji_folder=twemoji,
            progress=report,
            say=say,
        )


if __name__ == "__main__":
    main()
