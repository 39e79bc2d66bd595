"""Images beside each other with labels: contact sheets, and a student's image beside the teacher's with their
difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_TILE = 256  # pixels; smaller images are enlarged by a whole factor, without smoothing
LEAST_LEGIBLE = 128  # pixels of a tile's longer side
LARGEST_SHEET = 16_000  # pixels a side
GAP = 12
_SMALLEST_FONT, _LARGEST_FONT, _LINE = 11, 40, 1.35  # pixels; lines per font size
FULL_DIFFERENCE = 64  # of 255; the end of the difference map's scale
# With Latin, Greek, Cyrillic and Arabic letters; Pillow's own font has Latin ones only.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_BACKGROUND, _TEXT, _FAINT = "white", "#111111", "#666666"


@dataclass(frozen=True)
class Tile:
    """An image with lines of text below it, the first one in black."""

    image: Image.Image
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """The place of a tile on a sheet: the size of its image, with so many lines below it."""

    width: int
    height: int
    lines: int

    @property
    def font_size(self) -> int:
        """Of the lines, in pixels."""
        return max(_SMALLEST_FONT, min(self.width // 16, _LARGEST_FONT))

    @property
    def line(self) -> int:
        """The height of a line."""
        return round(self.font_size * _LINE)

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height with the lines and the gap to the next cell."""
        return self.width + GAP, self.height + self.lines * self.line + GAP // 2 + GAP

    def most(self) -> tuple[int, int]:
        """Return how many columns and rows of such cells a sheet may have."""
        across, down = ((LARGEST_SHEET - GAP) // side for side in self.sides)
        return across, down


@dataclass(frozen=True)
class Layout:
    """The columns and rows of a sheet, and their cells."""

    columns: int
    rows: int
    cell: Cell

    @classmethod
    def of(cls, size: tuple[int, int], tiles: int, columns: int, lines: int) -> Layout:
        """Return the layout of sheets for so many tiles, whose images are of one size.

        Tiles are as large as sheets of at most `LARGEST_SHEET` pixels a side allow. Where they would not be legible,
        there are several sheets, and no more columns than a sheet has room for.
        """
        cells = [Cell(*sides, lines) for sides in _tile_sizes(*size)]
        most_columns, most_rows = cells[-1].most()
        columns = min(columns, most_columns)
        rows = math.ceil(tiles / columns)
        rows = math.ceil(rows / math.ceil(rows / most_rows))  # of each sheet
        fits = (cell for cell in cells if cell.most()[0] >= columns and cell.most()[1] >= rows)
        return cls(columns, rows, next(fits))

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        width, height = self.cell.sides
        return self.columns * width + GAP, self.rows * height + GAP

    def place(self, index: int) -> tuple[int, int]:
        """Return where on the sheet a tile begins."""
        row, column = divmod(index, self.columns)
        width, height = self.cell.sides
        return GAP + column * width, GAP + row * height


def _tile_sizes(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Yield the sizes that images may have on a sheet, the largest first: whole multiples, then smaller ones."""
    longer = max(width, height)
    for factor in range(math.ceil(SMALLEST_TILE / longer), math.ceil(LEAST_LEGIBLE / longer) - 1, -1):
        yield width * factor, height * factor
    for side in range(longer - 1, LEAST_LEGIBLE - 1, -1):
        yield max(1, width * side // longer), max(1, height * side // longer)


class Sheets:
    """Contact sheets whose tiles are drawn as they come, so that memory holds one sheet. All images have one size.

    Args:
        tiles: how many come.
        columns: of a sheet, at most.
        lines: of a tile, at most.
        write: gets each sheet when it is full.
    """

    def __init__(self, tiles: int, columns: int, lines: int, write: Callable[[Image.Image], Any]):
        self._tiles, self._columns, self._lines, self._write = tiles, columns, lines, write
        self._layout: Layout | None = None
        self._page: Image.Image | None = None
        self._drawn = 0  # tiles of this page

    def add(self, tile: Tile) -> None:
        """Draw a tile."""
        layout = self._layout = self._layout or Layout.of(tile.image.size, self._tiles, self._columns, self._lines)
        if self._page is None:
            self._page = Image.new("RGB", layout.sides, _BACKGROUND)
        _draw(self._page, tile, layout.cell, layout.place(self._drawn))
        self._drawn += 1
        if self._drawn == layout.columns * layout.rows:
            self.finish()

    def finish(self) -> None:
        """Hand over the last sheet, without empty rows."""
        if self._page is not None and self._layout is not None:
            rows = math.ceil(self._drawn / self._layout.columns)
            sides = replace(self._layout, rows=rows).sides
            self._write(self._page if sides == self._page.size else self._page.crop((0, 0, *sides)))
            self._page, self._drawn = None, 0


def sheets(tiles: Sequence[Tile], columns: int) -> list[Image.Image]:
    """Return sheets with all tiles in rows of `columns`; one, unless their tiles would not be legible."""
    pages: list[Image.Image] = []
    drawn = Sheets(len(tiles), columns, max(len(tile.lines) for tile in tiles), pages.append)
    for tile in tiles:
        drawn.add(tile)
    drawn.finish()
    return pages


def _draw(page: Image.Image, tile: Tile, cell: Cell, place: tuple[int, int]) -> None:
    left, top = place
    method = Image.Resampling.NEAREST if cell.width >= tile.image.width else Image.Resampling.LANCZOS
    page.paste(tile.image.convert("RGB").resize((cell.width, cell.height), method), place)
    draw, font = ImageDraw.Draw(page), ImageFont.truetype(_FONT, cell.font_size)
    for row, text in enumerate(tile.lines):
        below = (left, top + cell.height + GAP // 2 + row * cell.line)
        draw.text(below, shortened(text, font, cell.width), fill=_FAINT if row else _TEXT, font=font)


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
