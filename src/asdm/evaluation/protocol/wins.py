"""The win sheet: the prompts at which a student's images differ most and least from the teacher's, in one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from PIL import Image

from asdm.evaluation.protocol.metrics import METRICS
from asdm.files import write_text
from asdm.version import __version__

WIN_SHEET = "wins.html"
ROWS = 60  # of the most different prompts, and of the least different ones
LONGEST_SIDE = 256  # of an embedded image in pixels


@dataclass(frozen=True)
class WinRow:
    """A prompt, both images as data URIs, their distance, and by score both values."""

    index: int
    prompt: str
    images: tuple[str, str]
    distance: float
    scores: Mapping[str, tuple[float, float]]

    @property
    def wins(self) -> str:
        """Return whether the student's first score is higher: student, teacher, or nothing where they are equal."""
        teacher, student = next(iter(self.scores.values()), (0.0, 0.0))
        return "student" if student > teacher else "teacher" if student < teacher else ""


def write_win_sheet(
    path: Path,
    *,
    prompts: Sequence[str],
    names: tuple[str, str],
    files: Sequence[tuple[Path, Path]],
    measure: str,
    distances: Sequence[float],
    scores: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    rows: int = ROWS,
) -> None:
    """Write the sheet.

    Args:
        names: the teacher's and the student's.
        files: both images of each prompt.
        measure: what the distances are, in words.
        scores: by metric the teacher's and the student's of each prompt.
        rows: the most rows of each of the two lists.
    """
    scores = scores or {}
    order = sorted(range(len(prompts)), key=lambda index: (-distances[index], index))
    shown = min(rows, (len(order) + 1) // 2)

    def row(index: int) -> WinRow:
        values = {METRICS[name].title: (own[index], other[index]) for name, (own, other) in scores.items()}
        teacher, student = files[index]
        return WinRow(index, prompts[index], (_uri(teacher), _uri(student)), distances[index], values)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("wins.html.j2").render(
        names=names,
        measure=measure,
        count=len(prompts),
        mean=sum(distances) / len(distances),
        median=distances[order[len(order) // 2]],
        shares=_shares(scores),
        most=[row(index) for index in order[:shown]],
        least=[row(index) for index in reversed(order[max(shown, len(order) - shown) :])],
        version=__version__,
    )
    write_text(path, html)


def _shares(scores: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, tuple[float, float]]:
    """Return by score the parts of the prompts at which the teacher and the student are better."""
    found = {}
    for name, (own, others) in scores.items():
        pairs = list(zip(own, others, strict=True))
        found[METRICS[name].title] = (
            sum(teacher > student for teacher, student in pairs) / len(pairs),
            sum(student > teacher for teacher, student in pairs) / len(pairs),
        )
    return found


def _template(name: str) -> str:
    return resources.files("asdm.evaluation.protocol").joinpath(name).read_text("utf-8")


def _uri(path: Path) -> str:
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
