"""The plots of a report: the model's blocks with each unit's cost and sensitivity, loss curves, sheets of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from asdm.edits import removed_units
from asdm.evaluation.unit_colours import PART_LETTERS, UNIT_LETTERS, SensitivityColours, shown
from asdm.families import BlockPlace, ModelFamily
from asdm.sensitivity.profile import RedundancyMap, UnitRecord
from asdm.student.plan import PruningPlan

KIND_COLOURS = {
    "resnet": "#4477aa",
    "attention": "#ee6677",
    "block": "#66ccee",
    "self_attention": "#ccbb44",
    "cross_attention": "#228833",
    "feed_forward": "#aa3377",
}
# Of the diagram, in widths of a resnet's cell:
_CELL_WIDTHS = {"resnet": 1.0}
_OTHER_CELL_WIDTH = 1.9
_CELL_HEIGHT, _CELL_GAP = 0.5, 0.08
_MIDDLE = 1.2
_STEP = 0.45  # by which the U gets wider from a level to the next one above


def redundancy_plot(redundancy: RedundancyMap, plan: PruningPlan | None = None) -> Figure:
    """Draw the model's blocks, each unit coloured by its sensitivity, and latency share against sensitivity.

    What `plan` removes is crossed out.
    """
    family = redundancy.family
    names = [unit.name for unit in redundancy.units]
    removed = set() if plan is None else set(removed_units(plan.edits, names, family))
    covered = {unit.name for unit in redundancy.units if family.is_covered_by(unit.name, removed)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), width_ratios=[1.35, 1], layout="constrained")
    _draw_blocks(figure, left, redundancy, family, covered)
    _draw_scatter(right, redundancy, covered)
    return figure


def _draw_blocks(
    figure: Figure, axes: plt.Axes, redundancy: RedundancyMap, family: ModelFamily, covered: set[str]
) -> None:
    cells = _Cells(axes, SensitivityColours.of(redundancy), covered)
    units_of, parts_of = redundancy.units_by_block(), redundancy.parts_by_unit()
    places = family.block_places(list(units_of))
    levels = max(place.level for place in places.values())
    for block, units in units_of.items():
        widths = [_CELL_WIDTHS.get(unit.kind, _OTHER_CELL_WIDTH) for unit in units]
        left, bottom = _left_end(places[block], levels, sum(widths)), -places[block].level
        share = sum(unit.latency_share for unit in units)
        title = f"{block}  {100 * share:.0f}%"
        axes.text(left + sum(widths) / 2, bottom + 0.56, title, ha="center", va="bottom", fontsize=8)
        for unit, width in zip(units, widths, strict=True):
            cells.draw(unit, parts_of.get(unit.name, []), left, bottom, width - _CELL_GAP)
            left += width
    axes.autoscale_view()
    axes.set_aspect("auto")
    axes.axis("off")
    axes.margins(0.02, 0.06)
    axes.set_title(_legend(redundancy, family), fontsize=9)
    label = "sensitivity (relative squared error)"
    figure.colorbar(cells.colours.scale, ax=axes, location="bottom", shrink=0.6, pad=0.02, label=label)


def _left_end(place: BlockPlace, levels: int, width: float) -> float:
    """Return where a block's first cell begins: the encoder ends, and the decoder begins, at the sides of the U."""
    widening = _STEP * (levels - place.level)
    if place.side == "middle":
        return _MIDDLE - width / 2
    return _MIDDLE + widening if place.side == "decoder" else -width - widening


def _legend(redundancy: RedundancyMap, family: ModelFamily) -> str:
    kinds = {unit.kind for unit in redundancy.units}
    letters = ", ".join(f"{letter} {kind}" for kind, letter in UNIT_LETTERS.items() if kind in kinds)
    return f"{letters} (S self, C cross, F feed-forward inside); % of the {family.label}'s latency; X removed"


@dataclass(frozen=True)
class _Cells:
    """Draws units as cells, those that are removed crossed out."""

    axes: plt.Axes
    colours: SensitivityColours
    covered: set[str]

    def draw(self, unit: UnitRecord, parts: Sequence[UnitRecord], left: float, bottom: float, width: float) -> None:
        """Draw a unit; its parts, where it has some, take the lower half."""
        letter = UNIT_LETTERS.get(unit.kind, "")
        if not parts:
            self._box(unit, left, bottom, width, _CELL_HEIGHT, letter)
            return
        half, each = _CELL_HEIGHT / 2, width / len(parts)
        self._box(unit, left, bottom + half, width, half, letter)
        for index, part in enumerate(parts):
            part_letter = PART_LETTERS.get(part.kind, "") if len(parts) <= 6 else ""
            self._box(part, left + index * each, bottom, each, half, part_letter)

    def _box(self, unit: UnitRecord, x: float, y: float, width: float, height: float, letter: str) -> None:
        colour, ink = self.colours(unit.sensitivity)
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=0.8))
        self.axes.text(x + width / 2, y + height / 2, letter, ha="center", va="center", fontsize=8, color=ink)
        if unit.name in self.covered:
            self.axes.plot([x, x + width], [y, y + height], color="red", linewidth=2)
            self.axes.plot([x, x + width], [y + height, y], color="red", linewidth=2)


def _draw_scatter(axes: plt.Axes, redundancy: RedundancyMap, covered: set[str]) -> None:
    for unit in redundancy.units:
        is_removed = unit.name in covered
        axes.scatter(
            100 * unit.latency_share,
            shown(unit.sensitivity),
            color=KIND_COLOURS[unit.kind],
            marker="X" if is_removed else "o",
            s=70 if is_removed else 28,
            edgecolors="black" if is_removed else "none",
            linewidths=0.8,
        )
    axes.set_yscale("log")
    axes.set_xlabel("latency saved by removal, % of a call")
    axes.set_ylabel("sensitivity (relative squared error)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=kind.replace("_", "-"))
        for kind, colour in KIND_COLOURS.items()
        if any(unit.kind == kind for unit in redundancy.units)
    ]
    if covered:
        handles.append(Line2D([], [], color="gray", marker="X", markeredgecolor="black", linestyle="", label="removed"))
    axes.legend(handles=handles, fontsize=8, frameon=False)


_LOSS_COLOURS = {
    "task": "#4477aa",
    "output": "#ee6677",
    "feature": "#228833",
    "semantic": "#ccbb44",
    "semantic_text": "#aa3377",
}


def loss_plot(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Plot the loss terms of each stage against the step, or its loss where it has no terms; stage after stage. A
    stage of no steps has nothing to plot."""
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    offset = 0
    for name, rows in logs.items():
        if not rows:
            continue
        terms = [term for term in _LOSS_COLOURS if any(term in row for row in rows)]
        for term in terms or ["loss"]:
            steps, values = np.array([(row["step"], row[term]) for row in rows if term in row]).T
            colour = _LOSS_COLOURS.get(term, "black")
            axes.plot(offset + steps, values, color=colour, alpha=0.2, linewidth=0.8)
            window = max(1, len(values) // 25)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(offset + steps[window - 1 :], smooth, color=colour, label=f"{term} ({name})")
        offset += len(rows)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


def image_sheet(
    captions: Sequence[str], rows: Sequence[Sequence[Image.Image]], *, side: int = 64, across: int = 12
) -> Image.Image:
    """Make a sheet of cells, `across` in a line: a caption, and below it one image of each of `rows`."""
    label, gap = 14, 6
    cell_height = label + len(rows) * side + gap
    lines = -(-len(captions) // across)
    sheet = Image.new("RGB", (across * (side + gap), lines * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, caption in enumerate(captions):
        x, y = index % across * (side + gap) + gap // 2, index // across * cell_height
        text = caption
        while draw.textlength(text) > side:
            text = text[:-1]
        draw.text((x, y), text, fill="black")
        for row, images in enumerate(rows):
            image = images[index].resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(image, (x, y + label + row * side))
    return sheet
