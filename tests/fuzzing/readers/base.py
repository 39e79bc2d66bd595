"""A reader, the list of all, and the valid files that damaged ones are made of."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from asdm import (
    PruningPlan,
    analyze,
    build_student,
    save_pipeline,
    with_unet,
)
from conftest import tiny_pipeline, tiny_unet

HERE = Path(__file__).parent.parent.parent
SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file. `inputs` makes files, of which it gets its `share`; `read` writes one and reads it."""

    name: str
    share: float
    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Path, Any], Any]


READERS: list[Reader] = []


def reader(share: float, made: Callable[[], st.SearchStrategy[Any]]) -> Callable[[Callable[[Path, Any], Any]], Any]:
    """Register a function `read(folder, value)` under its name."""

    def register(read: Callable[[Path, Any], Any]) -> Callable[[Path, Any], Any]:
        READERS.append(Reader(read.__name__.replace("_", " "), share, made, read))
        return read

    return register


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fresh(folder: Path) -> Path:
    """Return the folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def refusals(calls: list[Callable[[], Any]]) -> None:
    """Make all calls; raise the last refusal."""
    from asdm import AsdmError

    last = None
    for call in calls:
        try:
            call()
        except AsdmError as error:
            last = error
    if last is not None:
        raise last


def linked(source: Path, target: Path, changed: str, content: bytes | None) -> Path:
    """Make a folder of links to a valid one's files, one of which is other or missing."""
    for path in source.rglob("*"):
        inside = target / path.relative_to(source)
        if path.is_file():
            inside.parent.mkdir(parents=True, exist_ok=True)
            if str(path.relative_to(source)) != changed:
                inside.symlink_to(path)
    if content is not None:
        written(target, changed, content)
    return target


# -- valid files, made once a process ----------------------------------------------------------------------


@cache
def valid_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="asdm-fuzz-valid-"))


@cache
def unet() -> Any:
    return tiny_unet(**SMALL)


@cache
def pipeline() -> Any:
    made = tiny_pipeline()
    made.register_modules(unet=unet())
    return made


@cache
def teacher_folder() -> Path:
    return save_pipeline(pipeline(), valid_folder() / "teacher")


@cache
def plan() -> PruningPlan:
    edits = [
        {"edit": "remove", "unit": "down_blocks.0.attentions.0", "compensate": "linear"},
        {"edit": "remove", "unit": "mid_block"},
        {
            "edit": "gri_attention",
            "unit": "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
            "regions": 4,
            "pool": 2,
        },
    ]
    return PruningPlan.for_unet(unet(), edits)


@cache
def student_folder() -> Path:
    return save_pipeline(with_unet(pipeline(), build_student(unet(), plan())), valid_folder() / "student")


@cache
def profile() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = analyze(pipeline(), sensitivity="taylor", timesteps=1, samples=1, latency_rounds=1, prompts=["a cat"])
    few = found.model_copy(update={"units": found.units[:3], "others": found.others[:2]})
    return json.loads(json.dumps(few.model_dump()))


def of_file(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))
