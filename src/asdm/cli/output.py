"""The two consoles, and what several commands print."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from asdm.cli.tables import image_to_image_table, narrowest, quality_table, speed_table
from asdm.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from asdm.evaluation.results import Evaluation, SpeedMetrics


class _Console(Console):
    """A console that prints texts as they are: names and other programs' messages have no markup.

    Its reader may go away. The command then goes on in silence, as its results are files.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = _Console()
errors = _Console(stderr=True)
LISTED_FILES = 10  # of those that were skipped


def replace_unencodable() -> None:
    """Let both streams print a replacement for what their encoding lacks, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def is_main_process() -> bool:
    """Return whether this process prints: rank 0 of a distributed launch, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str, style: str | None = None) -> None:
    """Print a text, wrapped."""
    console.print(text, style=style)


def say_path(text: str) -> None:
    """Print a line with a path, not wrapped."""
    console.print(text, soft_wrap=True)


def show(table: Table) -> None:
    """Print a table; where its numbers need more columns than the terminal has, its lines are longer."""
    if narrowest(table) > console.width:
        table.width = narrowest(table)
    console.print(table, crop=False)


def tell(text: str) -> None:
    """Print a line beside the results, not wrapped."""
    errors.print(text, soft_wrap=True)


def warn_if_busy() -> None:
    """Warn before a measurement if other processes use the cores."""
    from asdm.measure.load import look_at_load

    line = look_at_load()
    if line is not None:
        tell(line)


def print_skipped(skipped: Mapping[str, str]) -> None:
    """List the data's files that were skipped, with reasons."""
    if not skipped:
        return
    errors.print(f"{len(skipped)} of the data's files were skipped:")
    for name, reason in list(skipped.items())[:LISTED_FILES]:
        line = printable(f"  {name}: {reason}").encode("utf-8", "replace").decode()  # a name may not be valid text
        errors.print(line)
    if len(skipped) > LISTED_FILES:
        errors.print(f"  and {len(skipped) - LISTED_FILES} more")


def warn_of_skipped(data: str | None) -> None:
    """Refuse unusable data before the work begins, and list the files of it that will be skipped."""
    if data is None:
        return
    from asdm.data.skipped import skipped_files

    print_skipped(skipped_files(data))


def print_evaluation(evaluation: Evaluation) -> None:
    """Print speed and, where images were generated, quality."""
    show(speed_table(evaluation))
    if evaluation.busy_line is not None:
        say(f"during the measurement, {evaluation.busy_line}")
    if not evaluation.quality:
        return
    show(quality_table(evaluation))
    say(
        "Concept (top-1, top-5), style, both (exact) and KID by EfficientNet-Lite0 features; R@1 by the pipeline's own "
        "CLIP; distance to the first model's images of the same seeds.",
        style="dim",
    )
    _print_image_to_image(evaluation)


def _time_from_an_image(row: SpeedMetrics) -> str | None:
    """Return a pipeline's latency of image-to-image, with its speed-up; None where it was not timed."""
    if row.image_to_image is None or row.image_to_image_ratio is None:
        return None
    speedup = "" if row.image_to_image_speedup == 1 else f" ({row.image_to_image_ratio.brief()})"
    return f"{row.name} {row.image_to_image.ms:.0f} ms{speedup}"


def _print_image_to_image(evaluation: Evaluation) -> None:
    """Print the quality of image-to-image, or why there is none."""
    found = evaluation.image_to_image
    if found is None:
        return
    if found.note is not None:
        say(f"no image-to-image: {found.note}")
    if not found.rows:
        return
    show(image_to_image_table(evaluation))
    times = ", ".join(filter(None, map(_time_from_an_image, evaluation.speed)))
    if times:
        say(f"an image from an image: {times}")
    explained = (
        "Exact: the nearest of all real images is the target, another variant of the source's design."
        if found.has_targets
        else "Variations of the data's images by their own captions; distance to the first model's results of the same "
        "seeds, and as a part of that between two seeds."
    )
    say(explained, style="dim")
