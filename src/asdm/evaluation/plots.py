"""The pictures of a report: the U with what each unit costs and is worth, loss curves, sheets of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from asdm.edits import removed_units
from asdm.families import family_named
from asdm.families.unet_structure import is_covered_by
from asdm.sensitivity.profile import RedundancyMap, UnitRecord
from asdm.student.plan import PruningPlan

KIND_COLOURS = {
    "resnet": "#4477aa",
    "attention": "#ee6677",
    "self_attention": "#ccbb44",
    "cross_attention": "#228833",
    "feed_forward": "#aa3377",
}
_PART_LETTERS = {"self_attention": "S", "cross_attention": "C", "feed_forward": "F"}


def redundancy_plot(redundancy: RedundancyMap, plan: PruningPlan | None = None) -> Figure:
    """Left: the U, each unit coloured by its sensitivity. Right: latency share against sensitivity.

    What `plan` removes is crossed out.
    """
    removed = (
        set()
        if plan is None
        else set(
            removed_units(plan.edits, [unit.name for unit in redundancy.units], family_named(plan.base.class_name))
        )
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), width_ratios=[1.35, 1], layout="constrained")
    _draw_u(figure, left, redundancy, removed)
    _draw_scatter(right, redundancy, removed)
    return figure


def _draw_u(figure: Figure, axes: plt.Axes, redundancy: RedundancyMap, removed: set[str]) -> None:
    values = [max(unit.sensitivity, 1e-6) for unit in redundancy.units]
    colours = ScalarMappable(LogNorm(min(values), max(values)), "viridis")
    levels = len({unit.block for unit in redundancy.units if unit.block.startswith("down_blocks")})
    by_block: dict[str, list[UnitRecord]] = {}
    for unit in redundancy.units:
        if unit.parent is None:
            by_block.setdefault(unit.block, []).append(unit)
    parts: dict[str, list[UnitRecord]] = {}
    for unit in redundancy.units:
        if unit.parent is not None:
            parts.setdefault(unit.parent, []).append(unit)
    for stage, units in by_block.items():
        side, _, number = stage.partition(".")
        level = levels if side == "mid_block" else int(number) if side == "down_blocks" else levels - 1 - int(number)
        widths = [1.0 if unit.kind == "resnet" else 1.9 for unit in units]
        total = sum(widths)
        start = {
            "down_blocks": -1.2 - total - 0.45 * (levels - level) + 1.2,
            "mid_block": -total / 2 + 1.2,
        }.get(side, 1.2 + 0.45 * (levels - level))
        share = sum(unit.latency_share for unit in units)
        axes.text(
            start + total / 2,
            -level + 0.56,
            f"{stage}  {100 * share:.0f}%",
            ha="center",
            va="bottom",
            fontsize=8,
        )
        for unit, width in zip(units, widths, strict=True):
            _draw_cell(axes, unit, parts.get(unit.name, []), start, -level, width - 0.08, colours, removed)
            start += width
    axes.autoscale_view()
    axes.set_aspect("auto")
    axes.axis("off")
    axes.margins(0.02, 0.06)
    axes.set_title(
        "R resnet, A attention (S self, C cross, F feed-forward inside); % of the UNet's latency; X removed",
        fontsize=9,
    )
    figure.colorbar(
        colours,
        ax=axes,
        location="bottom",
        shrink=0.6,
        pad=0.02,
        label="sensitivity (relative squared error)",
    )


def _draw_cell(
    axes: plt.Axes,
    unit: UnitRecord,
    parts: Sequence[UnitRecord],
    left: float,
    bottom: float,
    width: float,
    colours: ScalarMappable,
    removed: set[str],
) -> None:
    def box(of: UnitRecord, x: float, y: float, w: float, h: float, letter: str) -> None:
        colour = colours.to_rgba(np.clip(of.sensitivity, 1e-6, None))
        axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor="white", linewidth=0.8))
        luminance = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2]
        ink = "black" if luminance > 0.5 else "white"
        axes.text(x + w / 2, y + h / 2, letter, ha="center", va="center", fontsize=8, color=ink)
        if is_covered_by(of.name, removed):
            axes.plot([x, x + w], [y, y + h], color="red", linewidth=2)
            axes.plot([x, x + w], [y + h, y], color="red", linewidth=2)

    if not parts:
        box(unit, left, bottom, width, 0.5, "R" if unit.kind == "resnet" else "A")
        return
    box(unit, left, bottom + 0.25, width, 0.25, "A")
    each = width / len(parts)
    for index, part in enumerate(parts):
        letter = _PART_LETTERS.get(part.kind, "") if len(parts) <= 6 else ""
        box(part, left + index * each, bottom, each, 0.25, letter)


def _draw_scatter(axes: plt.Axes, redundancy: RedundancyMap, removed: set[str]) -> None:
    for unit in redundancy.units:
        axes.scatter(
            100 * unit.latency_share,
            max(unit.sensitivity, 1e-6),
            color=KIND_COLOURS[unit.kind],
            marker="X" if is_covered_by(unit.name, removed) else "o",
            s=70 if is_covered_by(unit.name, removed) else 28,
            edgecolors="black" if is_covered_by(unit.name, removed) else "none",
            linewidths=0.8,
        )
    axes.set_yscale("log")
    axes.set_xlabel("latency saved by removal, % of a UNet call")
    axes.set_ylabel("sensitivity (relative squared error)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=kind.replace("_", "-"))
        for kind, colour in KIND_COLOURS.items()
        if any(unit.kind == kind for unit in redundancy.units)
    ]
    if removed:
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
    """Each stage's loss terms against the step, one line each, or its loss where it has no other; stages one after
    another."""
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    offset = 0
    for name, rows in logs.items():
        terms = [term for term in _LOSS_COLOURS if any(term in row for row in rows)]
        for term in terms or ["loss"]:
            found = [(row["step"], row[term]) for row in rows if term in row]
            steps, values = np.array(found).T
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
    """A sheet of cells, `across` to a line: a caption, and under it one image of each of `rows`."""
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
