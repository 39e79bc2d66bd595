"""The embedded pipeline's images: 540 emoji concepts in five drawing styles, with captions.

Three of the styles are one design drawn three ways: with gradients, in flat colours and in black lines. So a caption
that no training saw, such as "rabbit, line", has one right answer for a model that knows the rabbit in flat colours.

`concepts.tsv` says which concepts, and the two lists of what is held out which (concept, style) pairs no training may
see. What is rendered here is an ordinary data folder (images and `metadata.jsonl`), read like any other.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from asdm.errors import AsdmError, needs_extra

# Each style's package: npm's @iconify-json/NAME.
PACKAGES = {
    "noto": "noto",
    "twemoji": "twemoji",
    "gradient": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "line": "fluent-emoji-high-contrast",
}
STYLES = tuple(PACKAGES)
ONE_DESIGN = ("gradient", "flat", "line")
IMAGE_SIZE = 64
_MARGIN = 2
_RENDERED_SIZE = 256
_INK = "#222"  # of drawings that leave their colour to the page

HeldOut = Literal["determined", "open"]


@dataclass(frozen=True)
class Pair:
    """One concept in one style: what a caption names and an image shows."""

    concept: str
    style: str

    @property
    def caption(self) -> str:
        return f"{self.concept}, {self.style}"

    @property
    def design(self) -> tuple[str, str]:
        """What the pair shares with the other variants of its drawing."""
        return self.concept, "" if self.style in ONE_DESIGN else self.style

    @property
    def file_name(self) -> str:
        return f"{self.style}/{self.concept.replace(' ', '_')}.png"


def concepts() -> dict[str, str]:
    """Return the name of each concept -> the name of its icon in the packages."""
    return {name: icon for icon, name in (line.split("\t") for line in _lines("concepts.tsv"))}


def all_pairs() -> list[Pair]:
    """Return every (concept, style) pair, held out or not, in a fixed order."""
    return [Pair(concept, style) for concept in concepts() for style in STYLES]


def held_out_pairs(kind: HeldOut | None = None) -> list[Pair]:
    """Return the tenth of the pairs that no training sees: never more than one of a concept.

    Args:
        kind: "determined", whose two other drawings of the design are seen, so that they have one right answer;
            "open", a design of which nothing else is seen; both by default.
    """
    kinds = get_args(HeldOut) if kind is None else (kind,)
    lines = [line for each in kinds for line in _lines(f"held_out_{each}.txt")]
    return [Pair(*line.rsplit(", ", 1)) for line in lines]


def held_out_kinds() -> dict[Pair, HeldOut]:
    """Return each held-out pair's kind."""
    return {pair: kind for kind in get_args(HeldOut) for pair in held_out_pairs(kind)}


def seen_pairs() -> list[Pair]:
    """Return the pairs that training sees."""
    held_out = set(held_out_pairs())
    return [pair for pair in all_pairs() if pair not in held_out]


def render_dataset(icons: Path, folder: Path) -> int:
    """Render every pair at 64x64 on white into `folder`, with `metadata.jsonl`; returns how many.

    `icons` holds the unpacked packages (`PACKAGES`), each in a folder of its name with its `icons.json`.

    Raises:
        AsdmError: a package or an icon is missing.
    """
    drawings = {style: Icons(icons / package) for style, package in PACKAGES.items()}
    names, kinds = concepts(), held_out_kinds()
    rows = []
    for pair in all_pairs():
        target = folder / pair.file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        _on_white(drawings[pair.style].drawing(names[pair.concept])).save(target, optimize=True)
        rows.append(
            {
                "file_name": pair.file_name,
                "text": pair.caption,
                "concept": pair.concept,
                "style": pair.style,
                "design": pair.concept if pair.style in ONE_DESIGN else None,
                "held_out": pair in kinds,
                "held_out_kind": "open" if kinds.get(pair) == "open" else None,
            }
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, "utf-8")
    return len(rows)


class Icons:
    """A set of icons in Iconify's JSON format: the inside of each icon's SVG, sizes, and aliases.

    Raises:
        AsdmError: there is no `icons.json` in the folder.
    """

    def __init__(self, folder: Path):
        self.path = folder / "icons.json"
        if not self.path.is_file():
            raise AsdmError(f"{self.path}: no such file; docs/demo.md says where to get the packages")
        self.content: dict[str, Any] = json.loads(self.path.read_text("utf-8"))

    def drawing(self, name: str) -> Image.Image:
        """Render an icon on nothing at 256 pixels."""
        with needs_extra("demo-build", "rendering the images"):
            from resvg_py import svg_to_bytes
        png = svg_to_bytes(svg_string=self.svg(name), width=_RENDERED_SIZE, height=_RENDERED_SIZE)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")

    def svg(self, name: str) -> str:
        """Return an icon's SVG file.

        Raises:
            AsdmError: there is no such icon.
        """
        icon = self._icon(name)

        def number(key: str, default: float) -> float:
            return float(icon.get(key, self.content.get(key, default)))

        width, height = number("width", 16), number("height", 16)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'color="{_INK}" viewBox="{number("left", 0):g} {number("top", 0):g} {width:g} {height:g}">'
            f"{icon['body']}</svg>"
        )

    def _icon(self, name: str) -> Mapping[str, Any]:
        while name not in self.content["icons"]:
            alias = self.content.get("aliases", {}).get(name)
            if alias is None:
                raise AsdmError(f"{self.path}: no icon {name}")
            name = alias["parent"]
        icon: Mapping[str, Any] = self.content["icons"][name]
        return icon


def _lines(name: str) -> list[str]:
    return resources.files("tools.demo").joinpath(name).read_text("utf-8").splitlines()


def _on_white(drawing: Image.Image) -> Image.Image:
    """Crop to what is drawn, fit into the frame, flatten on white."""
    box = drawing.getbbox()
    if box is None:
        raise AsdmError("an emoji rendered empty")
    drawing = drawing.crop(box)
    side = IMAGE_SIZE - 2 * _MARGIN
    scale = side / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    frame = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
    offset = ((IMAGE_SIZE - size[0]) // 2, (IMAGE_SIZE - size[1]) // 2)
    frame.alpha_composite(drawing, offset)
    return frame.convert("RGB")
