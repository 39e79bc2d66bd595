"""Images beside each other with labels: contact sheets, and a student's image beside the teacher's with their
difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_TILE = 256  # pixels; smaller images are enlarged by a whole factor, without smoothing
LARGEST_SHEET = 16_000  # pixels a side
GAP = 12
_LARGEST_FONT, _LINE = 40, 1.35  # pixels; lines per font size
_TALLEST_LABEL = 3 * _LARGEST_FONT * _LINE + GAP
FULL_DIFFERENCE = 64  # of 255; the end of the difference map's scale
# With Latin, Greek, Cyrillic and Arabic letters; Pillow's own font has Latin ones only.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_BACKGROUND, _TEXT, _FAINT = "white", "#111111", "#666666"


@dataclass(frozen=True)
class Tile:
    """An image with lines of text below it, the first one in black."""

    image: Image.Image
    lines: tuple[str, ...]


def sheet(tiles: Sequence[Tile], columns: int) -> Image.Image:
    """Return one image with all tiles in rows of `columns`. All images have one size.

    Sheets of more than `LARGEST_SHEET` pixels a side are scaled down.
    """
    width, height = tiles[0].image.size
    rows = math.ceil(len(tiles) / columns)
    scale = _scale(width, height, columns, rows)
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    size = max(11, min(width // 16, _LARGEST_FONT))
    font = ImageFont.truetype(_FONT, size)
    line = round(size * _LINE)
    label = line * max(len(tile.lines) for tile in tiles) + GAP // 2
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + label + GAP) + GAP), _BACKGROUND)
    draw = ImageDraw.Draw(page)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for index, tile in enumerate(tiles):
        left, top = GAP + (index % columns) * (width + GAP), GAP + (index // columns) * (height + label + GAP)
        page.paste(tile.image.convert("RGB").resize((width, height), method), (left, top))
        for row, text in enumerate(tile.lines):
            place = (left, top + height + GAP // 2 + row * line)
            draw.text(place, shortened(text, font, width), fill=_FAINT if row else _TEXT, font=font)
    return page


def _scale(width: int, height: int, columns: int, rows: int) -> float:
    """Return the factor of the images' size on a sheet: whole where it enlarges."""
    enlarged = max(1, math.ceil(SMALLEST_TILE / max(width, height)))
    free = (LARGEST_SHEET - GAP) / columns - GAP, (LARGEST_SHEET - GAP) / rows - GAP - _TALLEST_LABEL
    most = max(1.0, free[0]) / width, max(1.0, free[1]) / height
    fits = min(most)
    return min(enlarged, max(1, int(fits))) if fits >= 1 else fits


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text in one line, cut at the end where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[: -max(1, len(text) // 20)]
    return text + "..."


def difference_map(one: Image.Image, other: Image.Image) -> tuple[Image.Image, float]:
    """Return a map of the difference of two images of one size, black where they agree; and its mean, of 255."""
    pixels = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in (one, other)]
    difference = np.abs(pixels[0] - pixels[1]).mean(axis=2)
    colours = matplotlib.colormaps["inferno"](np.clip(difference / FULL_DIFFERENCE, 0, 1))
    return Image.fromarray((colours[..., :3] * 255).round().astype(np.uint8)), float(difference.mean())
