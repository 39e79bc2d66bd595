"""The parts of `asdm evaluate` that follow a published protocol, or generate images for a benchmark's own scorer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import asdm
from asdm.choices import ImageLayout, ProtocolName
from asdm.cli.options import require_effect
from asdm.cli.output import is_main_process, say_path, show
from asdm.cli.progress import reporting
from asdm.cli.tables import protocol_table
from asdm.errors import AsdmError
from asdm.files import require_ours

if TYPE_CHECKING:
    from asdm.evaluation.protocol.results import ProtocolResults

# Options that one kind of evaluation alone takes, by their names in the function.
_PLAIN = ("data", "samples", "image_to_image", "strength", "rounds")
_BY_PROTOCOL = ("captions", "metrics", "weights")
_JOB = ("limit", "size", "batch_size", "folder")
_LAYOUT = ("prompts",)
Load = Callable[[], dict[str, Any]]


def require_options(context: typer.Context, protocol: ProtocolName | None, layout: ImageLayout | None) -> None:
    """
    Raises:
        AsdmError: an option has no effect in this kind of evaluation, or is missing.
    """
    if protocol is not None and layout is not None:
        raise AsdmError(f"--layout {layout}: does not go with --protocol {protocol}; give one of them")
    without: tuple[str, ...]
    if layout is not None:
        kind, without = f"--layout {layout}", (*_PLAIN, *_BY_PROTOCOL, "images", "out")
    elif protocol is not None:
        kind, without = f"--protocol {protocol}", (*_PLAIN, *_LAYOUT)
    else:
        kind, without = "speed and samples, without --protocol or --layout", (*_BY_PROTOCOL, *_JOB, *_LAYOUT)
    require_effect(context, without, f"on an evaluation by {kind}")
    if layout is not None and context.params["prompts"] is None:
        raise AsdmError(f"--layout {layout}: needs --prompts, the benchmark's file of prompts")


def by_protocol(load: Load, protocol: ProtocolName, folder: Path, out: Path | None, **settings: Any) -> None:
    """Evaluate models by a protocol; save and print the results."""
    from asdm.evaluation.protocol.image_job import KIND
    from asdm.evaluation.protocol.inputs import read_inputs
    from asdm.evaluation.protocol.run import win_sheet_name

    require_ours(folder, KIND)
    if is_main_process():  # which refuses for all before a model is loaded, and downloads weights
        read_inputs(protocol, **{name: settings[name] for name in ("images", "captions", "metrics", "weights")})
    pipelines = load()
    with reporting(resumable=True) as report:
        results = asdm.evaluate_by_protocol(
            pipelines, protocol, folder, **settings, progress=lambda title, done, total: report(title, done, total)
        )
    if not is_main_process():
        return
    if out is not None:
        results.save(out)
    _print(results)
    say_path(f"written to {out or folder / 'evaluation.json'}")
    students = list(pipelines)[1:]
    for sheet in (folder / win_sheet_name(name, students) for name in students):
        if sheet.is_file():
            say_path(f"win sheet: {sheet}")


def for_scorer(load: Load, layout: ImageLayout, prompts: Path | None, folder: Path, **settings: Any) -> None:
    """Generate the images of a benchmark, and say where they are."""
    from asdm.evaluation.protocol.image_job import KIND
    from asdm.evaluation.protocol.pictures import pictures_of

    assert prompts is not None
    require_ours(folder, KIND)
    pictures_of(layout, prompts)  # which refuses before a model is loaded
    pipelines = load()
    with reporting(resumable=True) as report:
        folders = asdm.generate_for_scorer(
            pipelines,
            layout,
            prompts,
            folder,
            **settings,
            progress=lambda title, done, total: report(title, done, total),
        )
    if is_main_process():
        for place in folders:
            say_path(f"images for the scorer: {place}")


def _print(results: ProtocolResults) -> None:
    """Print the metrics, what extracts their features, and where the run differs from the published protocol."""
    real = "" if results.real_images is None else f", {results.real_images:,} real images"
    count, side = f"{results.prompts:,} prompts, seed {results.seed}", f"images of {results.stored_side} px"
    say_path(f"{results.protocol}: {count}, {side}{real}")
    show(protocol_table(results))
    for metric, network in results.networks.items():
        say_path(f"{metric} by {network}")
    for note in results.notes:
        say_path(f"note: {note}")
