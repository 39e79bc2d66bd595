"""The ablation's results: rows in a file that several processes add to, the tables of them, and the plot."""

from __future__ import annotations

import json
import statistics
from typing import Any

from ablation_recipes import WORK, base_name, variants
from common import RESULTS, console
from filelock import FileLock
from matplotlib.figure import Figure

from asdm.files import write_text
from asdm.measure.latency import Ratio

ROWS = RESULTS / "ablation.json"
METRICS_OF_IMAGES = ("exact_pair", "style", "concept_top5", "target_distance", "kid", "teacher_distance")
METRICS = (*METRICS_OF_IMAGES, "prediction_error")
DIVISION = {  # of expert kernels: field of a row, and its title
    "expert_information": "bits that kernel and style share",
    "expert_chance": "of a division by chance",
    "expert_explained": "of the mixtures' variance explained by style",
}
COLOURS = {"teacher": "black", "bk-sdm": "tab:red", "joint": "tab:green", "full": "tab:blue"}


def add_row(row: dict[str, Any]) -> None:
    """Add a row to the results, to which another process may be adding, too."""
    with FileLock(WORK / "lock"):
        write_text(ROWS, json.dumps([*known_rows(), row], indent=1) + "\n")
    console.print(row, highlight=False)


def known_rows() -> list[dict[str, Any]]:
    """Return the rows of all finished runs."""
    rows: list[dict[str, Any]] = json.loads(ROWS.read_text("utf-8")) if ROWS.is_file() else []
    return rows


def is_known(name: str, seed: int, target: float) -> bool:
    """Return whether a run is finished."""
    return any((row["name"], row["seed"], row["target"]) == (name, seed, target) for row in known_rows())


def known_teacher(seed: int) -> dict[str, Any] | None:
    """Return a finished run of the teacher, which is the same for every target."""
    return next((row for row in known_rows() if row["name"] == "teacher" and row["seed"] == seed), None)


def rows_by_name(rows: list[dict[str, Any]], target: float) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a target by recipe, in the recipes' order."""
    names = ["teacher", *variants(target)]
    found = {name: [row for row in rows if row["target"] == target and row["name"] == name] for name in names}
    return {name: mine for name, mine in found.items() if mine}


def print_table(title: str, by_name: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table in Markdown: a line a recipe, the mean and the deviation of each metric over the seeds."""
    if not by_name:
        return
    print(f"\n| {title} | seeds | UNet | steps | {' | '.join(m.replace('_', ' ') for m in METRICS)} |")
    print("|" + "---|" * (4 + len(METRICS)))
    for name, mine in by_name.items():
        cells = [_cell([row[f"{metric}_heldout"] for row in mine if f"{metric}_heldout" in row]) for metric in METRICS]
        timed = next((row for row in mine if "speedup_interval" in row), None)  # all seeds have one UNet
        speed = "" if timed is None else Ratio(timed["speedup"], *timed["speedup_interval"]).brief()
        print(f"| {name} | {len(mine)} | {speed} | {mine[0]['steps']} | {' | '.join(cells)} |")


def print_division(title: str, by_name: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table in Markdown of how far expert kernels divide the styles among them; none where there are none."""
    by_name = {name: [row for row in mine if "expert_information" in row] for name, mine in by_name.items()}
    by_name = {name: mine for name, mine in by_name.items() if mine}
    if not by_name:
        return
    print(f"\n| {title} | seeds | {' | '.join(DIVISION.values())} |")
    print("|" + "---|" * (2 + len(DIVISION)))
    for name, mine in by_name.items():
        cells = [_cell([row[field] for row in mine]) for field in DIVISION]
        print(f"| {name} | {len(mine)} | {' | '.join(cells)} |")


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Draw each recipe's distance to the teacher and its exact pairs, both held out, at the first target, with the
    deviation over the seeds."""
    by_name = rows_by_name(rows, min(row["target"] for row in rows))
    panels = {"teacher_distance_heldout": "distance to the teacher's images", "exact_pair_heldout": "exact pair"}
    figure = Figure(figsize=(10, 0.3 * len(by_name) + 1.2), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for place, (name, mine) in enumerate(by_name.items()):
            if name == "teacher" and key == "teacher_distance_heldout":
                continue
            mean, deviation = _mean_and_deviation([row[key] for row in mine])
            colour = COLOURS.get(base_name(name), "tab:gray")
            axes.errorbar(mean, place, xerr=deviation, fmt="o", color=colour, capsize=3)
        axes.set_title(f"{title}, held out", fontsize=10)
        axes.set_yticks(range(len(by_name)), list(by_name))
        axes.grid(axis="x", color="gainsboro")
        axes.set_axisbelow(True)
    figure.axes[0].invert_yaxis()
    return figure


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean, deviation = _mean_and_deviation(values)
    return f"{mean:.3f} ± {deviation:.3f}" if len(values) > 1 else f"{mean:.3f}"


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
