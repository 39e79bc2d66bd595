"""The command of the recipe: `python -m tools.demo unet --minutes 60`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from asdm.cli.options import POSITIVE
from asdm.errors import AsdmError
from tools.demo.build import build

SECONDS_BETWEEN_LINES = 15  # of progress
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command; a user's mistake is one line and exit status 2."""
    try:
        app()
    except AsdmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here", file=sys.stderr)
        raise SystemExit(130) from None


@app.command()
def demo_build(
    step: Annotated[
        str, typer.Argument(help="images, tokenizer, clip, vae, unet, assemble, check; all is all of them but images.")
    ] = "all",
    folder: Annotated[Path, typer.Option(help="Where checkpoints and the result go.")] = Path("runs/demo-build"),
    minutes: Annotated[
        float | None, typer.Option(help="Save and stop after so long.", callback=POSITIVE, show_default=False)
    ] = None,
    warm_start: Annotated[bool, typer.Option("--warm-start", help="Train the embedded UNet further.")] = False,
    noto_font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf, for `images`.", show_default=False)
    ] = None,
    twemoji: Annotated[
        Path | None, typer.Option(help="Twemoji's 64 px PNGs, for `images`.", show_default=False)
    ] = None,
) -> None:
    """Build the embedded pipeline by its recipe. Each step resumes where it was stopped."""
    build(
        step,
        folder,
        minutes=minutes,
        warm_start=warm_start,
        noto_font=noto_font,
        twemoji_folder=twemoji,
        progress=_Lines(),
        say=print,
    )


class _Lines:
    """Progress as lines, with some seconds between them."""

    def __init__(self) -> None:
        self.printed = time.monotonic()

    def __call__(self, title: str, done: int, total: int, note: str) -> None:
        if time.monotonic() - self.printed > SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            print(f"{title} {done}/{total} {note}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
