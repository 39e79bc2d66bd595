"""`asdm demo`: the embedded pipeline, compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from asdm.cli.compress import compress_and_print
from asdm.cli.estimates import YesOption

QUICK = {"refine": 2, "steps": 260, "samples": 32, "image_to_image": 12}
FULL = {"refine": 4, "steps": 1500, "samples": 128, "image_to_image": 64}


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write everything to.")] = Path("asdm-demo"),
    full: Annotated[bool, typer.Option("--full", help="Distil 1,500 steps; evaluate 128 prompts per split.")] = False,
    image_to_image: Annotated[
        int | None,
        typer.Option(
            help=f"Images per split that start from an image, by default {QUICK['image_to_image']}, with --full "
            f"{FULL['image_to_image']}; 0 leaves image-to-image out.",
            min=0,
            max=10**6,
            show_default=False,
        ),
    ] = None,
    yes: YesOption = False,
) -> None:
    """Compress the embedded Stable Diffusion pipeline by 1.5x, and report speed and quality."""
    settings: dict[str, Any] = dict(FULL if full else QUICK)
    if image_to_image is not None:
        settings["image_to_image"] = image_to_image
    compress_and_print("demo", out, speedup=1.5, data="demo", yes=yes, **settings)
