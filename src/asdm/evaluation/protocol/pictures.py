"""Which files of images a job generates, from prompts or from a benchmark's own file of prompts.

GenEval (arXiv 2310.11513) reads `00000/metadata.jsonl` and `00000/samples/0000.png`. DPG-Bench (arXiv 2403.05135) reads
one grid of four images for each prompt, under the prompt's id.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asdm.choices import ImageLayout
from asdm.data.examples import caption_fault
from asdm.data.metadata import text_of
from asdm.errors import AsdmError, one_line
from asdm.reading import parse_json

IMAGES_OF_A_PROMPT = 4  # in GenEval and in DPG-Bench
_FOLDER_NAME = re.compile(r"[\w-][\w.-]*")  # of DPG-Bench's ids


@dataclass(frozen=True)
class Picture:
    """One file: an image of a prompt, or a grid of several images of it, in two columns."""

    file: str
    prompt: str
    images: int = 1


@dataclass(frozen=True)
class Pictures:
    """The files of a job in order, all of as many images. The n-th image's noise is that of seed + n.

    `texts` are files that a scorer reads beside the images, by path.
    """

    all: Sequence[Picture]
    texts: Mapping[str, str] = field(default_factory=dict)

    def first(self, count: int | None) -> Pictures:
        """Return the pictures of the first prompts."""
        if count is None:
            return self
        prompts = list(dict.fromkeys(self.places()))[:count]
        wanted = set(prompts)
        pictures = [each for each, place in zip(self.all, self.places(), strict=True) if place in wanted]
        texts = {path: text for path, text in self.texts.items() if path.partition("/")[0] in wanted}
        return Pictures(pictures, texts)

    def places(self) -> list[str]:
        """Return what files of one prompt have in common, for each file: the first part of its path."""
        return [each.file.partition("/")[0] for each in self.all]


def numbered(prompts: Sequence[str], suffix: str) -> Pictures:
    """Return a file for each prompt, `000000.png` and so on."""
    return Pictures([Picture(f"{index:06d}{suffix}", prompt) for index, prompt in enumerate(prompts)])


def pictures_of(layout: ImageLayout, path: Path) -> Pictures:
    """Read a benchmark's file of prompts, and return the files that its scorer wants.

    Args:
        path: for geneval `evaluation_metadata.jsonl`; for dpg the folder of prompts, `ID.txt` each, or `dpg_bench.csv`.

    Raises:
        AsdmError: there is no such file, or it has other content.
    """
    if not path.exists():
        raise AsdmError(f"{path}: no such file of prompts for {layout}")
    found = _geneval(path) if layout == "geneval" else _dpg(path)
    for picture in found.all:
        fault = caption_fault(picture.prompt)
        if fault is not None:
            raise AsdmError(f"{path}: the prompt of {picture.file} {fault}")
    return found


def _geneval(path: Path) -> Pictures:
    pictures, texts = [], {}
    if path.is_dir():
        raise AsdmError(f"{path}: a folder; geneval's prompts are evaluation_metadata.jsonl")
    lines = [line for line in text_of(path).split("\n") if line.strip()]
    for index, line in enumerate(lines):
        row = _json_of(line)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not isinstance(row.get("tag"), str):
            raise AsdmError(f'{path}:{index + 1}: not a row of geneval, with "tag" and "prompt" ({one_line(line, 60)})')
        texts[f"{index:05d}/metadata.jsonl"] = json.dumps(row)
        for sample in range(IMAGES_OF_A_PROMPT):
            pictures.append(Picture(f"{index:05d}/samples/{sample:04d}.png", row["prompt"]))
    if not pictures:
        raise AsdmError(f"{path}: has no prompts")
    return Pictures(pictures, texts)


def _json_of(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def _dpg(path: Path) -> Pictures:
    prompts = _dpg_folder(path) if path.is_dir() else _dpg_table(path)
    wrong = next((name for name in prompts if not _FOLDER_NAME.fullmatch(name)), None)
    if wrong is not None:
        raise AsdmError(f"{path}: {one_line(repr(wrong), 60)} is no id of a prompt; an id has letters, digits, - and _")
    if not prompts:
        raise AsdmError(f"{path}: has no prompts; dpg's are files ID.txt, or dpg_bench.csv with item_id and text")
    return Pictures([Picture(f"{name}.png", prompt, IMAGES_OF_A_PROMPT) for name, prompt in prompts.items()])


def _dpg_folder(path: Path) -> dict[str, str]:
    files = sorted(path.glob("*.txt"))
    return {file.stem: " ".join(text_of(file).split()) for file in files}


def _dpg_table(path: Path) -> dict[str, str]:
    prompts: dict[str, str] = {}
    try:
        for row in csv.DictReader(text_of(path).splitlines()):
            if row.get("item_id") and row.get("text"):
                prompts.setdefault(row["item_id"], " ".join(row["text"].split()))
    except csv.Error as error:
        raise AsdmError(f"{path}: not a table of prompts ({one_line(error)})") from None
    return prompts
