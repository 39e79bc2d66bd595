"""Image-caption sources: a folder of images with captions, or the embedded default's images."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from asdm.errors import AsdmError
from asdm.images import to_tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DATA_HELP = "a folder of images with captions (name.txt beside each, or metadata.jsonl), or demo"


Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Example:
    """One image file and its caption; what it shows and how it is drawn, where the source says so."""

    path: Path
    caption: str
    concept: str | None = None
    style: str | None = None
    held_out: bool = False

    def pixels(self, size: int) -> Tensor:
        """The image (3, size, size) in [-1, 1], centre-cropped.

        Raises:
            OSError: the file is not an image that can be read.
        """
        with Image.open(self.path) as image:
            return to_tensor(image, size)


@dataclass(frozen=True)
class Data:
    """The examples of a source, and what had to be passed over, by file, with the reason."""

    examples: list[Example]
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    def sample(self, count: int, seed: int) -> list[Example]:
        """`count` examples drawn without replacement (with, where there are fewer)."""
        draw = random.Random(seed)
        if count <= len(self.examples):
            return draw.sample(self.examples, count)
        return draw.choices(self.examples, k=count)


def open_data(source: str | Path, split: Split = "train") -> Data:
    """Read a source's captions and check each image's header; pixels are read later.

    Rows of `metadata.jsonl` may be marked `"held_out": true`: they are for evaluation, never in "train".
    They may also say `"concept"` and `"style"`, by which generated images are judged.

    Raises:
        AsdmError: no such folder, no images, or no captions.
    """
    if str(source) == "demo":
        from asdm.demo import images_folder

        source = images_folder()
    folder = Path(source)
    if not folder.is_dir():
        raise AsdmError(f"{folder}: no such data folder; DATA is {DATA_HELP}")
    metadata = folder / "metadata.jsonl"
    examples, skipped = _from_metadata(metadata) if metadata.is_file() else _from_text_files(folder)
    readable = []
    for example in examples:
        if split != "all" and example.held_out != (split == "held_out"):
            continue
        fault = _fault(example.path)
        if fault:
            skipped[str(example.path.relative_to(folder))] = fault
        else:
            readable.append(example)
    if not readable and split != "held_out":
        reasons = f" ({len(skipped)} skipped, the first: {next(iter(skipped.items()))})" if skipped else ""
        raise AsdmError(f"{folder}: no images with captions{reasons}; DATA is {DATA_HELP}")
    return Data(readable, skipped)


def _from_metadata(path: Path) -> tuple[list[Example], dict[str, str]]:
    examples, skipped = [], {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file_name"], str(row["text"]).strip()
        except (json.JSONDecodeError, KeyError, TypeError):
            skipped[f"{path.name}:{number}"] = 'not a row with "file_name" and "text"'
            continue
        if not caption:
            skipped[name] = "its caption is empty"
        else:
            labels = {key: row.get(key) for key in ("concept", "style")}
            examples.append(Example(path.parent / name, caption, **labels, held_out=bool(row.get("held_out"))))
    return examples, skipped


def _from_text_files(folder: Path) -> tuple[list[Example], dict[str, str]]:
    examples, skipped = [], {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        text = path.with_suffix(".txt")
        caption = " ".join(text.read_text("utf-8", errors="replace").split()) if text.is_file() else ""
        if caption:
            examples.append(Example(path, caption))
        else:
            skipped[str(path.relative_to(folder))] = "its caption is empty" if text.is_file() else "it has no caption"
    return examples, skipped


def _fault(path: Path) -> str | None:
    """Why an image cannot be used; None where it can, as far as its header tells."""
    if not path.is_file():
        return "no such file"
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        return f"not a readable image: {' '.join(str(error).split())[:80]}"
    return None


def can_be_decoded(example: Example) -> bool:
    """Whether the image can be read to its end; a header that is whole does not tell."""
    try:
        with Image.open(example.path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def load_pixels(examples: Sequence[Example], size: int, skipped: dict[str, str]) -> tuple[list[Example], list[Tensor]]:
    """Images (3, size, size) of the examples that can be decoded; the others go to `skipped`."""
    kept, pixels = [], []
    for example in examples:
        try:
            pixels.append(example.pixels(size))
        except (OSError, SyntaxError, ValueError) as error:
            skipped[example.path.name] = f"cannot be decoded: {' '.join(str(error).split())[:80]}"
        else:
            kept.append(example)
    return kept, pixels


class ShuffledBatches:
    """Batches of indices: epochs of a shuffled set, a function of the step alone."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed = count, batch_size, seed

    def __call__(self, step: int) -> Tensor:
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.count
        orders = {int(epoch): self._order(int(epoch)) for epoch in epochs.unique()}
        return torch.stack([orders[int(e)][p % self.count] for e, p in zip(epochs, positions, strict=True)])

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        return torch.randperm(self.count, generator=generator)
