"""The benchmark's plot: quality against speed of each method, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from asdm.benchmark.results import BenchmarkRow

COLOURS = {
    "original": "black",
    "fewer steps": "tab:gray",
    "runtime": "tab:purple",
    "baseline": "tab:orange",
    "ours": "tab:blue",
    "stack": "tab:red",
}
_PANELS = {  # quality metric -> label of its axis
    "teacher_distance": "distance to the original's images (1 - cosine), lower is better",
    "concept_top5": "concept among the five nearest, higher is better",
    "image_to_image.exact_pair": "image-to-image: the nearest real image is the target, higher is better",
    "image_to_image.seed_part": "image-to-image: distance to the original's, in that of two seeds, lower is better",
}
_LOWER_IS_BETTER = ("teacher_distance", "kid", "image_to_image.seed_part")
_LABELS_OF_A_GROUP = 3
_NEAR = 1e-3  # distances below it are drawn in proportion, larger ones by their logarithm: both kinds are of interest


def pareto_front(rows: Sequence[BenchmarkRow], split: str, quality: str = "teacher_distance") -> list[BenchmarkRow]:
    """Return the rows that no other one beats in both speed and a quality metric, slowest first."""
    sign = 1 if quality in _LOWER_IS_BETTER else -1
    front: list[BenchmarkRow] = []

    def worse(row: BenchmarkRow) -> float:
        return sign * _value(row, split, quality)

    for row in sorted(_judged_rows(rows, split, quality), key=lambda row: (-_speedup(row), worse(row))):
        if not front or worse(row) < worse(front[-1]):
            front.append(row)
    return front[::-1]


def benchmark_plot(rows: Sequence[BenchmarkRow], title: str = "") -> Figure:
    """Plot quality against speed of one place's methods, by split, with the Pareto front.

    The front and the best of each group are labelled.
    """
    splits = list(dict.fromkeys(split for row in rows for split in row.teacher_distance))
    panels = [quality for quality in _PANELS if any(_judged_rows(rows, split, quality) for split in splits)]
    shape = (max(1, len(splits)), max(1, len(panels)))
    figure, axes = plt.subplots(*shape, figsize=(11 * shape[1], 8 * shape[0]), squeeze=False)
    shown = [
        (axes[i][j], split, quality)
        for i, split in enumerate(splits)
        for j, quality in enumerate(panels)
        if _judged_rows(rows, split, quality)
    ]
    for panel in {*axes.flat} - {panel for panel, _, _ in shown}:
        panel.set_visible(False)
    for panel, split, quality in shown:
        _draw_points(panel, _judged_rows(rows, split, quality), split, quality)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.canvas.draw()  # fixes the positions by which labels are placed
    for panel, split, quality in shown:
        _label(panel, _judged_rows(rows, split, quality), split, quality)
    return figure


def _draw_points(axes: Axes, rows: Sequence[BenchmarkRow], split: str, quality: str) -> None:
    for group, colour in COLOURS.items():
        of_group = [row for row in rows if row.group == group]
        if of_group:
            places = [(_speedup(row), _value(row, split, quality)) for row in of_group]
            speeds, qualities = zip(*places, strict=True)
            axes.scatter(speeds, qualities, color=colour, label=group, zorder=3, s=18)
            low, high = zip(*[(r.ratio.low, r.ratio.high) if r.ratio else (0, 0) for r in of_group], strict=True)
            axes.hlines(qualities, low, high, color=colour, lw=0.8, alpha=0.5)
    front = [(_speedup(row), _value(row, split, quality)) for row in pareto_front(rows, split, quality)]
    axes.plot(*zip(*front, strict=True), color="tab:green", lw=1, label="Pareto front")
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30) if tick <= 1.1 * max(map(_speedup, rows))]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.margins(0.12)
    if quality in _LOWER_IS_BETTER:
        axes.set_yscale("symlog", linthresh=_NEAR)
        axes.set_ylim(bottom=-_NEAR / 2)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    axes.set_xlabel("times faster, whole pipeline (with its interval)")
    axes.set_ylabel(_PANELS[quality])
    axes.set_title(f"{split.replace('_', '-')} prompts")
    axes.legend(loc="upper left" if quality in _LOWER_IS_BETTER else "lower left")


def _labelled(rows: Sequence[BenchmarkRow], split: str, quality: str) -> list[BenchmarkRow]:
    """Return the front, and of each group's own front the ends and the middle."""
    labelled = pareto_front(rows, split, quality)
    for group in COLOURS:
        front = pareto_front([row for row in rows if row.group == group], split, quality)
        if len(front) > _LABELS_OF_A_GROUP:
            front = [front[0], front[len(front) // 2], front[-1]]
        labelled += [row for row in front if row not in labelled]
    return labelled


def _label(axes: Axes, rows: Sequence[BenchmarkRow], split: str, quality: str) -> None:
    """Label the best rows, each where its label covers the fewest labels and points."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame, pixels = axes.get_window_extent(renderer), figure.dpi / 72  # type: ignore[union-attr]
    points = [axes.transData.transform((_speedup(row), _value(row, split, quality))) for row in rows]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for row in _labelled(rows, split, quality):
        place = (_speedup(row), _value(row, split, quality))
        label = axes.annotate(
            row.name,
            place,
            xytext=(0, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=7,
            color=COLOURS.get(row.group, "black"),
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "silver"},
        )
        size = Text.get_window_extent(label, renderer).size  # without the line to the point
        offset, box = _best_offset(axes.transData.transform(place), size, taken, frame, pixels)
        label.set_position(offset)
        label.set_horizontalalignment(("right", "center", "left")[_sign(offset[0]) + 1])  # type: ignore[arg-type]
        taken.append(box)


def _best_offset(
    point: Any, size: tuple[float, float], taken: Sequence[Bbox], frame: Bbox, pixels: float
) -> tuple[tuple[float, float], Bbox]:
    """Return the first offset (in points) at which a label covers the least, and the label's box there.

    Args:
        taken: boxes of the labels and points that are there already; all boxes are in pixels.
        frame: the plot's box, beyond which a label is not to reach.
        pixels: of a point.
    """
    best: tuple[float, tuple[float, float], Bbox] | None = None
    for x, y in _AROUND:
        # A label on the left ends at its point; one above or below is centred.
        corner = (point[0] + x * pixels - size[0] * (0.5 - 0.5 * _sign(x)), point[1] + y * pixels)
        box = Bbox.from_bounds(*corner, *size)
        covered = sum(_overlap(box, other) for other in taken) + size[0] * size[1] - _overlap(box, frame)
        if best is None or covered < best[0] - 1:
            best = (covered, (x, y), box)
    assert best is not None
    return best[1], best[2]


# Offsets in points, near ones first.
_AROUND = [
    (reach * x, reach * y)
    for reach in (6, 14, 24, 36, 50, 66, 84, 104)
    for x, y in ((1, 0.3), (1, -1), (-1, 0.3), (-1, -1), (0, 1), (0, -1.6))
]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _overlap(box: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(box, other)
    return common.width * common.height if common is not None else 0.0


def _judged_rows(rows: Sequence[BenchmarkRow], split: str, quality: str) -> list[BenchmarkRow]:
    """Return the rows whose quality and speed are known."""
    return [row for row in rows if row.ratio is not None and row.ratio.is_known and split in _by_split(row, quality)]


def _speedup(row: BenchmarkRow) -> float:
    return row.speedup or 0.0


def _value(row: BenchmarkRow, split: str, quality: str) -> float:
    return _by_split(row, quality)[split]


def _by_split(row: BenchmarkRow, quality: str) -> Mapping[str, float]:
    """Return a row's values of a metric by split. Image-to-image has its own metrics."""
    kind, _, metric = quality.rpartition(".")
    found: Mapping[str, float] = row.image_to_image.get(metric, {}) if kind else getattr(row, quality)
    return found
