"""`asdm demo`: the embedded pipeline, compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asdm.cli.compress import compress_and_print

QUICK = {"steps": 320, "samples": 64}
FULL = {"steps": 1500, "samples": 128}


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write everything to.")] = Path("asdm-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Distil 1,500 steps; evaluate 128 seen and all 102 held-out prompts.")
    ] = False,
) -> None:
    """Compress the embedded Stable Diffusion pipeline by 1.5x, and report speed and quality."""
    compress_and_print("demo", out, speedup=1.5, refine=4, data="demo", **(FULL if full else QUICK))
