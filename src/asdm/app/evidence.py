"""What the tab Evidence reads: benchmarks, reports and training logs inside one folder, and nothing outside it."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asdm.benchmark.plot import pareto_front
from asdm.benchmark.results import Benchmark, BenchmarkRow
from asdm.errors import AsdmError, one_line
from asdm.training.log import read_log

REPORT, LOG, RUN_SUFFIX = "report.html", "log.jsonl", "_run.json"
DEEPEST, MOST_FOLDERS, MOST_FILES = 6, 5000, 200  # of the search for files
LARGEST_REPORT = 64 * 2**20  # bytes
MOST_POINTS = 2000  # of a loss curve
COLOURS = {
    "original": "#888888", "fewer steps": "#b0a070", "runtime": "#9467bd", "baseline": "#ff7f0e", "ours": "#1f9ede",
    "stack": "#e8505b",
}  # fmt: skip
QUALITIES = {
    "teacher_distance": "distance to the original's images, lower is better",
    "concept_top5": "concept among the five nearest, higher is better",
    "kid": "KID, lower is better",
}


@dataclass(frozen=True)
class EvidenceFiles:
    """The files of a folder that the tab shows, by their paths in it, the newest first."""

    benchmarks: list[str]
    reports: list[str]
    logs: list[str]


def find_evidence(folder: Path) -> EvidenceFiles:
    """Return the benchmarks, reports and training logs in a folder; hidden folders are left out."""
    found = sorted(_walk(folder), key=lambda path: -path.stat().st_mtime)[:MOST_FILES]
    names = {path: str(path.relative_to(folder)) for path in found}
    runs = [path.with_name(path.name.removesuffix(RUN_SUFFIX) + ".json") for path in found if _is_run(path)]
    return EvidenceFiles(
        benchmarks=[str(path.relative_to(folder)) for path in runs if path.is_file()],
        reports=[names[path] for path in found if path.name == REPORT],
        logs=[names[path] for path in found if path.name == LOG],
    )


def _is_run(path: Path) -> bool:
    return path.name.endswith(RUN_SUFFIX)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that may be evidence. Links are not followed."""
    for count, (place, folders, files) in enumerate(os.walk(folder)):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = [] if depth >= DEEPEST else sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(place) / name
            if (name in (REPORT, LOG) or name.endswith(RUN_SUFFIX)) and path.is_file() and not path.is_symlink():
                yield path
        if count >= MOST_FOLDERS:
            return


def evidence_file(folder: Path, name: str | None, kind: str) -> Path:
    """Return the path of a file that a user chose.

    Args:
        kind: how its name ends.

    Raises:
        AsdmError: none was chosen, it lies outside the folder, or it is of another kind.
    """
    if not name:
        raise AsdmError("nothing chosen; start asdm app with --folder where the results are")
    refusal = AsdmError(f"{name[:200]}: not a file of the page's folder")
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.name.endswith(kind) or not path.is_file():
            raise refusal
    except (OSError, RuntimeError, ValueError):  # a name with a null byte, too long, or of links in a circle
        raise refusal from None
    return path


def report_frame(path: Path) -> str:
    """Return a report as a frame in which no script runs and nothing is fetched.

    Raises:
        AsdmError: the report is too large, or no text.
    """
    if path.stat().st_size > LARGEST_REPORT:
        raise AsdmError(f"{path.name}: larger than {LARGEST_REPORT // 2**20} MB; open the file itself")
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise AsdmError(f"{path.name}: not a report that asdm wrote") from None
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    guarded = f'<meta http-equiv="Content-Security-Policy" content="{policy}">{content}'
    return (
        f'<iframe title="report" sandbox="" srcdoc="{html.escape(guarded, quote=True)}" '
        'style="width:100%;height:75vh;border:1px solid var(--border-color-primary);background:white">'
        "</iframe>"
    )


def places_of(benchmark: Benchmark) -> list[str]:
    """Return the models of a benchmark."""
    return list(dict.fromkeys(row.place for row in benchmark.rows))


def pareto_figure(rows: Sequence[BenchmarkRow], split: str, quality: str) -> Any:
    """Return a plotly figure of quality against speed of one place's methods, with the Pareto front.

    Raises:
        AsdmError: no row has this metric and a speed-up.
    """
    import plotly.graph_objects as go

    known = [row for row in rows if row.ratio is not None and row.ratio.is_known and split in getattr(row, quality)]
    if not known:
        raise AsdmError(f"{quality}: not in this benchmark for {split or 'any split'}; choose another metric")
    figure = go.Figure()
    for group in dict.fromkeys(row.group for row in known):
        of_group = [row for row in known if row.group == group]
        figure.add_trace(
            go.Scatter(
                x=[row.speedup for row in of_group],
                y=[getattr(row, quality)[split] for row in of_group],
                mode="markers",
                name=group,
                marker={"color": COLOURS.get(group, "#888888"), "size": 9},
                text=[_about(row, split, quality) for row in of_group],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    front = pareto_front(known, split, quality)
    figure.add_trace(
        go.Scatter(
            x=[row.speedup for row in front],
            y=[getattr(row, quality)[split] for row in front],
            mode="lines",
            name="Pareto front",
            line={"color": "#2ca02c", "width": 1.5},
            hoverinfo="skip",
        )
    )
    return _styled(figure, "times faster, whole pipeline", QUALITIES[quality], log_x=True)


def _about(row: BenchmarkRow, split: str, quality: str) -> str:
    """Return a point's text. Plotly reads some HTML in it."""
    assert row.ratio is not None
    seconds = "" if row.seconds is None else f"<br>{row.seconds:.3g} s an image"
    return (
        f"<b>{html.escape(row.name)}</b><br>{row.speedup:.2f}x ({row.ratio.low:.2f} to {row.ratio.high:.2f})"
        f"{seconds}<br>{QUALITIES[quality].partition(',')[0]} {getattr(row, quality)[split]:.4g}<br>{row.steps} steps"
    )


def loss_figure(rows: Sequence[dict[str, float]]) -> Any:
    """Return a plotly figure of the terms of a training's loss against its steps.

    Raises:
        AsdmError: the log has no step yet.
    """
    import plotly.graph_objects as go

    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int | float)]
    if not rows:
        raise AsdmError("the log has no step yet")
    every = -(-len(rows) // MOST_POINTS)
    terms = [name for name in dict.fromkeys(name for row in rows for name in row) if _is_loss(name)]
    figure = go.Figure()
    for term in terms:
        steps, values = zip(*[(row["step"], row[term]) for row in rows if term in row], strict=True)
        window = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        figure.add_trace(
            go.Scatter(
                x=list(steps[window - 1 :: every]), y=[float(v) for v in smooth[::every]], name=term, mode="lines"
            )
        )
    smoothed = len(rows) // 50
    return _styled(figure, "step", f"loss, mean of {smoothed} steps" if smoothed > 1 else "loss", log_y=True)


def _is_loss(name: str) -> bool:
    return name not in ("step", "seconds", "images") and not name.startswith(("learning_rate", "lr", "grad", "time"))


def read_losses(path: Path) -> list[dict[str, float]]:
    """Read a training's log.

    Raises:
        AsdmError: it is no log.
    """
    try:
        return read_log(path)
    except OSError as error:
        raise AsdmError(f"{path.name}: cannot be read ({one_line(error)})") from None


def _styled(figure: Any, x: str, y: str, log_x: bool = False, log_y: bool = False) -> Any:
    """Give a figure colours that are legible on light and dark pages."""
    values = [1, 1.5, 2, 3, 5, 8, 10, 15, 20, 30]
    ticks = {"type": "log", "tickvals": values, "ticktext": [f"{value:g}x" for value in values]}
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)"}
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#888888", "size": 13},
        margin={"l": 60, "r": 10, "t": 20, "b": 50},
        legend={"orientation": "h", "y": -0.2},
        modebar={"bgcolor": "rgba(0,0,0,0)", "remove": ["select2d", "lasso2d"]},
        hoverlabel={"bgcolor": "#ffffff", "font": {"color": "#222222"}},
        height=520,
        xaxis={"title": {"text": x}, **axis, **(ticks if log_x else {})},
        yaxis={"title": {"text": y}, **axis, **({"type": "log"} if log_y else {})},
    )
    return figure
