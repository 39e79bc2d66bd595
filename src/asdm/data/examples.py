"""Examples of a data source: captions with their images. And the interface of a source.

A source is read in pieces (a thousand files of a folder, a shard), each by itself, so that several processes can share
them and an interrupted run resumes at the next one. What cannot be used is counted and named, never fatal.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image
from torch import Tensor

from asdm.errors import one_line
from asdm.images import image_fault, open_pixels, to_tensor

PIECE = 1024  # examples of a folder, a dataset or a file of captions that are read at a time
CAPTION_FIELDS = ("caption", "text", "prompt")
LONGEST_CAPTION = 10_000  # characters; text encoders read less than half of it

Split = Literal["train", "held_out", "all"]
_LABELS = ("concept", "style", "design")
ROW_FIELDS = ("file_name", *CAPTION_FIELDS, *_LABELS, "held_out", "held_out_kind")  # that are read of a row
_LONGEST_KIND = 40  # characters
_NO_UTF_8 = re.compile("[\udc80-\udcff]")  # bytes of a file that are no UTF-8, as `text_of` marks them
_NO = ("", "false", "f", "no", "n", "off", "none", "null")  # in a table of texts


@dataclass(frozen=True)
class Example:
    """A caption, and its image where the source has images: a file, or a file's content.

    `concept` and `style` name what it shows and in which style, where the source says so. `design` is the same for
    images that show one design in several variants, such as a drawing and its outlines. Held-out examples of a
    `held_out_kind` are evaluated apart, as a split of that name.
    """

    name: str
    caption: str
    file: Path | bytes | None = field(default=None, repr=False)
    concept: str | None = None
    style: str | None = None
    held_out: bool = False
    design: str | None = None
    held_out_kind: str | None = None

    def image(self) -> Image.Image:
        """Open the image.

        Raises:
            OSError: not an image that can be read.
        """
        if self.file is None:
            raise OSError("captions alone have no images")
        return open_pixels(self.file)

    def pixels(self, size: int) -> Tensor:
        """Load the image (3, size, size) in [-1, 1], centre-cropped.

        Raises:
            OSError: the file is not an image that can be read.
        """
        with self.image() as image:
            return to_tensor(image, size)


@dataclass(frozen=True)
class Unusable:
    """A row that cannot be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Unread(Unusable):
    """A remote piece that could not be read to its end. It may be readable another time."""


class Source(Protocol):
    """What gives examples, piece by piece."""

    identity: str  # what tells this source from another one
    remote: bool  # whether reading it means downloading it
    split: Split  # which examples it gives

    def __len__(self) -> int:
        """Return how many pieces there are."""
        ...

    def read(self, piece: int) -> Iterator[Example | Unusable]: ...


def count_of_pieces(rows: int) -> int:
    """Return how many pieces so many rows make."""
    return -(-rows // PIECE)


def rows_of_piece(piece: int, rows: int) -> range:
    """Return which of so many rows are in a piece."""
    return range(piece * PIECE, min((piece + 1) * PIECE, rows))


def caption_of(row: Mapping[str, Any], fields: Sequence[str] = CAPTION_FIELDS) -> Any:
    """Return a row's caption, of any type: that of the first of these fields that says something; None where none
    does."""
    return next((row[name] for name in fields if _says_something(row.get(name))), None)


def _says_something(caption: Any) -> bool:
    texts = caption if isinstance(caption, list) else [caption]
    return any(text.strip() if isinstance(text, str) else text is not None for text in texts)


def caption_fault(text: str) -> str | None:
    """Say why a text cannot be a caption or a prompt; None where it can."""
    if "\0" in text or _NO_UTF_8.search(text):
        return "is not text in UTF-8"
    return f"has more than {LONGEST_CAPTION:,} characters" if len(text) > LONGEST_CAPTION else None


def example_of(name: str, caption: Any, file: Path | bytes | None, about: dict[str, Any]) -> Example | Unusable:
    """Make an example, or say why there is none.

    Args:
        name: what messages call it.
        caption: what stands where the caption should, of any type; of a list the first text.
        about: other fields of its row: `held_out`, and its labels.
    """
    if isinstance(caption, list):  # several people's; COCO and Flickr have five
        caption = next((each for each in caption if isinstance(each, str) and each.strip()), "")
    if caption is not None and not isinstance(caption, str):
        return Unusable(name, f"its caption is no text: {one_line(caption)}")
    fault = caption_fault(caption or "")
    if fault is not None:
        return Unusable(name, f"its caption {fault}")
    caption = " ".join((caption or "").encode("utf-8", "replace").decode().split())  # half an emoji is no character
    if not caption:
        return Unusable(name, "its caption is empty")
    if file is None:
        return Unusable(name, "it has no image")
    labels = {key: found if isinstance(found := about.get(key), str) and found else None for key in _LABELS}
    is_held_out, kind = _says_yes(about.get("held_out")), _kind(about.get("held_out_kind"))
    return Example(name, caption, file, **labels, held_out=is_held_out, held_out_kind=kind)


def _says_yes(value: Any) -> bool:
    """Return whether a field says yes: any text but a word for no, any number but 0 and NaN, which stands for a gap."""
    if isinstance(value, str):
        text = value.strip().lower()
        try:
            value = float(text)
        except ValueError:
            return text not in _NO
    return bool(value) and not (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str | None:
    """Return a kind of held-out rows, which names folders and results; None for what is no plain word."""
    is_word = isinstance(value, str) and value.isascii() and value.isidentifier() and len(value) <= _LONGEST_KIND
    return value if is_word and value not in ("seen", "prompts") else None


def in_split(example: Example, split: Split) -> bool:
    """Return whether a split has the example."""
    return split == "all" or example.held_out == (split == "held_out")


def digest(rows: Iterable[Any]) -> str:
    """Return what tells these rows from others."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def state_of(path: Path) -> list[Any]:
    """Return a file, and what tells whether it is still the same."""
    about = path.stat()
    return [str(path.resolve()), about.st_size, about.st_mtime_ns]


def can_be_decoded(example: Example) -> bool:
    """Return whether the image can be decoded. Its header alone does not say."""
    try:
        with example.image() as image:
            image.load()
    except Exception:  # PIL's readers raise many kinds
        return False
    return True


def load_pixels(examples: Sequence[Example], size: int, skipped: dict[str, str]) -> tuple[list[Example], list[Tensor]]:
    """Load images (3, size, size) of the examples that can be decoded; the others go to `skipped`."""
    kept, pixels = [], []
    for example in examples:
        try:
            pixels.append(example.pixels(size))
        except Exception as error:  # PIL's readers raise many kinds
            name = example.file.name if isinstance(example.file, Path) else ""
            skipped[example.name] = f"cannot be decoded: {image_fault(error, name)}"
        else:
            kept.append(example)
    return kept, pixels
