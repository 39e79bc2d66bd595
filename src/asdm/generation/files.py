"""Prompts from files, and generated images as files under names made from their prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from PIL import Image

from asdm import checks
from asdm.errors import AsdmError
from asdm.files import write_new
from asdm.generation.comparison import Comparison
from asdm.generation.image import GeneratedImage
from asdm.generation.request import GenerationRequest
from asdm.generation.sheets import Sheets, Tile
from asdm.images import open_image, open_mask

STANDARD_INPUT = "-"
LONGEST_NAME = 60  # characters of the prompt
LONGEST_STEM = 180  # bytes of them; file systems have 255 for a name, and what is added to it needs some
MOST_COLUMNS = 16  # of a contact sheet with one row a prompt


def read_prompts(name: str) -> list[str]:
    """Read one prompt a line from a text file, or for "-" from standard input. Empty lines do not count.

    Raises:
        AsdmError: there is no such file, it is not UTF-8, or it has no prompt.
    """
    where = "standard input" if name == STANDARD_INPUT else name
    try:
        content = sys.stdin.buffer.read() if name == STANDARD_INPUT else Path(name).read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise AsdmError(f"{where}: not text in UTF-8; convert it") from None
    except (FileNotFoundError, IsADirectoryError):
        raise AsdmError(f"{where}: no such file of prompts") from None
    if "\0" in text:
        raise AsdmError(f"{where}: not a text file; write one prompt a line")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise AsdmError(f"{where}: has no prompt; write one a line")
    return prompts


def parse_seeds(text: str) -> list[int]:
    """Read seeds such as `1,5,8-11`.

    Raises:
        AsdmError: it is no such list, or names a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise AsdmError(f"seeds={text[:80]}: must be whole numbers and ranges, such as 1,5,8-11")
        numbers = (int(first), int(last) if dash else int(first))
        checks.IMAGE_SEED("seeds", max(numbers))
        if not 0 <= numbers[1] - numbers[0] < 10_000:
            raise AsdmError(f"seeds={part.strip()}: a range must rise, by fewer than 10000")
        seeds += range(numbers[0], numbers[1] + 1)
    if len(set(seeds)) < len(seeds):
        raise AsdmError(f"seeds={text[:80]}: a seed is named twice")
    return seeds


def open_inputs(image: Path | None, mask: Path | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Read the files of an image and its mask.

    Raises:
        AsdmError: a file cannot be read, or the mask is not of the image's size.
    """
    start = None if image is None else open_image(image)
    hole = None if mask is None else open_mask(mask)
    if start is not None and hole is not None and start.size != hole.size:
        raise AsdmError(f"{mask}: {hole.size} pixels; it must be of the size of {image}, {start.size}")
    return start, hole


class ImageFolder:
    """A folder that a request's images are written to as they are finished; existing files stay.

    `paths` are the files that were written, `lines` what there is to say of them.

    Args:
        out: the folder, or for a single image the name of its file.
        with_sheet: whether contact sheets are drawn, too.

    Raises:
        AsdmError: `out` names a file, and there is more than one image.
    """

    def __init__(self, out: Path, request: GenerationRequest, with_sheet: bool = False):
        self._stem = out.stem if out.suffix.lower() == ".png" and not out.is_dir() else None
        if self._stem is not None and request.total > 1:
            raise AsdmError(f"{out}: a file, and there are {request.total} images; name a folder")
        if self._stem is None and out.exists() and not out.is_dir():
            raise AsdmError(f"{out}: a file; name a folder, or for one image a name that ends in .png")
        self.folder, self.paths = out if self._stem is None else out.parent, list[Path]()
        self.lines: list[str] = []
        self._total, self._of_each = request.total, request.total // len(request.prompts)
        self._with_sheet = with_sheet
        self._sheets: Sheets | None = None

    def write(self, image: GeneratedImage) -> None:
        """Write an image."""
        self._save(image)
        if self._with_sheet:
            columns = self._of_each if 1 < self._of_each <= MOST_COLUMNS else math.ceil(self._total**0.5)
            self._draw([Tile(image.image, (image.prompt, f"seed {image.seed}"))], columns)

    def write_comparison(self, comparison: Comparison) -> None:
        """Write a student's image, the teacher's, and both beside each other with their difference."""
        student, teacher = comparison.student, comparison.teacher
        stem = self._save(student).stem
        self.paths.append(write_new(png_paths(self.folder, f"{stem}_teacher"), teacher.write))
        self.paths.append(_write_png(comparison.picture(), self.folder, f"{stem}_comparison"))
        self.lines.append(
            f"{stem}: teacher {teacher.seconds:.2f} s, student {student.seconds:.2f} s "
            f"({comparison.speedup:.2f}x, one image each)"
        )
        if self._with_sheet:
            tiles = comparison.tiles()
            self._draw(tiles, columns=len(tiles))

    def write_last_sheet(self) -> None:
        """Write the contact sheet that is not full; full ones are written already."""
        if self._sheets is not None:
            self._sheets.finish()

    def _draw(self, tiles: list[Tile], columns: int) -> None:
        """Draw the tiles of one image or comparison on a contact sheet."""
        if self._sheets is None:
            lines = max(len(tile.lines) for tile in tiles)
            self._sheets = Sheets(self._total * len(tiles), columns, lines, self._write_sheet)
        for tile in tiles:
            self._sheets.add(tile)

    def _write_sheet(self, page: Image.Image) -> None:
        self.paths.append(_write_png(page, self.folder, "grid"))

    def _save(self, image: GeneratedImage) -> Path:
        suffix = f"_seed{image.seed}" if self._of_each > 1 else ""
        stem = (self._stem or stem_of(image.prompt)) + suffix
        self.paths.append(write_new(png_paths(self.folder, stem), image.write))
        return self.paths[-1]


def stem_of(prompt: str) -> str:
    """Return the name of a file that a prompt is for, without its suffix."""
    plain = "".join(c if c.isalnum() else "_" for c in prompt)[:LONGEST_NAME]
    return plain.encode()[:LONGEST_STEM].decode(errors="ignore").strip("_") or "image"


def png_paths(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the names that a PNG may have in a folder: the stem, then the stem with numbers."""
    yield folder / f"{stem}.png"
    yield from (folder / f"{stem}-{number}.png" for number in count(1))


def _write_png(image: Image.Image, folder: Path, stem: str) -> Path:
    return write_new(png_paths(folder, stem), lambda path: image.save(path, format="PNG"))
