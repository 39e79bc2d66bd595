"""`asdm convert-lora`: a LoRA file for the original, rewritten for a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import asdm
from asdm.cli.options import NAME, not_a_folder
from asdm.cli.output import say, say_path

_NAMED = 5


def convert_lora(
    lora: Annotated[
        str,
        typer.Argument(
            help="The LoRA's .safetensors file, in kohya's or diffusers' layout.", callback=NAME, show_default=False
        ),
    ],
    student: Annotated[
        str,
        typer.Option(
            "--for",
            help="The student: its folder, for diffusers; or the checkpoint that `asdm export` wrote, for the programs "
            "that read it.",
            callback=NAME,
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.", callback=not_a_folder)],
) -> None:
    """Renumber a LoRA for the original model to a student, without the layers that the student lacks."""
    from asdm.pipelines.shapes import denoiser_without_weights

    checkpoint = student if Path(student).is_file() else None
    made = asdm.convert_lora(lora, denoiser_without_weights(student), out, checkpoint)
    say(f"{made.kept} layers are adapted; dropped are {len(made.dropped)}, which the student lacks")
    for name in made.dropped[:_NAMED]:
        say(f"  dropped: {name}")
    if len(made.dropped) > _NAMED:
        say(f"  and {len(made.dropped) - _NAMED} more")
    say_path(f"written to {made.file}")
