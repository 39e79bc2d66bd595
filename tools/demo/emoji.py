"""The embedded default's images: 512 emoji concepts in two drawing styles, with captions.

`concepts.tsv` says which concepts, `held_out.txt` which (concept, style) pairs no training may see.
What is rendered here is an ordinary data folder (images and `metadata.jsonl`), read like any other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from asdm.errors import AsdmError

STYLES = ("noto", "twemoji")
IMAGE_SIZE = 64
_MARGIN = 2
_NOTO_BITMAP_SIZE = 109  # the one size at which Noto Color Emoji carries its bitmaps


@dataclass(frozen=True)
class Pair:
    """One concept in one style: what a caption names and an image shows."""

    concept: str
    style: str

    @property
    def caption(self) -> str:
        return f"{self.concept}, {self.style}"

    @property
    def file_name(self) -> str:
        return f"{self.style}/{self.concept.replace(' ', '_')}.png"


def concepts() -> dict[str, str]:
    """Name of each concept -> its emoji character."""
    lines = resources.files("tools.demo").joinpath("concepts.tsv").read_text("utf-8").splitlines()
    return {name: character for character, name in (line.split("\t") for line in lines)}


def all_pairs() -> list[Pair]:
    """Every (concept, style) pair, held out or not, in a fixed order."""
    return [Pair(concept, style) for concept in concepts() for style in STYLES]


def held_out_pairs() -> list[Pair]:
    """Return the tenth of the pairs that no training sees; never both styles of one concept."""
    lines = resources.files("tools.demo").joinpath("held_out.txt").read_text("utf-8").splitlines()
    return [Pair(*line.rsplit(", ", 1)) for line in lines]


def seen_pairs() -> list[Pair]:
    """Return the pairs that training sees."""
    held_out = set(held_out_pairs())
    return [pair for pair in all_pairs() if pair not in held_out]


def render_dataset(noto_font: Path, twemoji_folder: Path, folder: Path) -> int:
    """Render every pair at 64x64 on white into `folder`, with `metadata.jsonl`; returns how many.

    `noto_font` is `NotoColorEmoji.ttf` (Debian's `fonts-noto-color-emoji`); `twemoji_folder` holds
    Twemoji's PNGs named by code point (`img/twitter/64` of npm's `emoji-datasource-twitter`).

    Raises:
        AsdmError: a source is missing.
    """
    if not noto_font.is_file():
        raise AsdmError(f"{noto_font}: no such font file; it is in Debian's fonts-noto-color-emoji")
    if not twemoji_folder.is_dir():
        raise AsdmError(f"{twemoji_folder}: no such folder; it is img/twitter/64 of emoji-datasource-twitter")
    font = ImageFont.truetype(str(noto_font), _NOTO_BITMAP_SIZE)
    characters = concepts()
    held_out = set(held_out_pairs())
    rows = []
    for pair in all_pairs():
        character = characters[pair.concept]
        drawing = _noto(character, font) if pair.style == "noto" else _twemoji(character, twemoji_folder)
        target = folder / pair.file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        _on_white(drawing).save(target, optimize=True)
        rows.append(
            {
                "file_name": pair.file_name,
                "text": pair.caption,
                "concept": pair.concept,
                "style": pair.style,
                "held_out": pair in held_out,
            }
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, "utf-8")
    return len(rows)


def _noto(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((10, 16), character, font=font, embedded_color=True)
    return canvas


def _twemoji(character: str, folder: Path) -> Image.Image:
    plain = folder / f"{ord(character):x}.png"
    with_selector = folder / f"{ord(character):x}-fe0f.png"
    return Image.open(plain if plain.is_file() else with_selector).convert("RGBA")


def _on_white(drawing: Image.Image) -> Image.Image:
    """Crop to what is drawn, fit into the frame, flatten on white."""
    box = drawing.getbbox()
    if box is None:
        raise AsdmError("an emoji rendered empty; is the font of version 2.042 or newer?")
    drawing = drawing.crop(box)
    side = IMAGE_SIZE - 2 * _MARGIN
    scale = side / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    frame = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
    offset = ((IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2)
    frame.alpha_composite(drawing, offset)
    return frame.convert("RGB")
