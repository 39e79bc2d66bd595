"""Readers of data: prepared data, tables, captions, images, archives."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from asdm.data.draws import Draws
from asdm.data.prepared import PreparedData, prepared_captions
from asdm.data.sources import open_data
from asdm.distillation.caption_only import read_captions
from asdm.distillation.recorded import INDEX, read_index
from asdm.generation.files import read_prompts
from asdm.generation.image import JSON_CHUNK, read_about
from asdm.images import open_image
from fuzzing import inputs
from fuzzing.readers.base import reader, refusals, valid_folder, written

_KEY = {
    "teacher": "x",
    "predicts": "epsilon",
    "data": "x",
    "dtype": "int8",
    "inputs": False,
    "sampling": {},
    "batch_size": 1,
    "seed": 0,
}
_FEATURES = {"key": _KEY, "draws": 2, "shapes": {"noisy": [[4, 8, 8], "float32"]}, "reduced": ["noisy"],
             "blocks": {"b": {"features": "noisy", "structure": None, "leaves": [{"tensor": "noisy"}]}}}  # fmt: skip


def a_draw() -> bytes:
    return save({"noisy": torch.zeros(4, 8, 8, dtype=torch.int8), "noisy.scale": torch.ones(4, 1, 1)})


@reader(
    3,
    lambda: st.one_of(
        st.tuples(inputs.json_files(_FEATURES), st.just(a_draw())),
        st.tuples(st.just(inputs.dumped(_FEATURES)), inputs.tensor_files(a_draw())),
    ),
)
def teacher_features(folder: Path, contents: tuple[bytes, bytes]) -> None:
    draws = Draws(folder, "int8", ["noisy"])
    draws.path(0).parent.mkdir(parents=True)
    draws.path(0).write_bytes(contents[1])
    written(folder, INDEX, contents[0])
    read_index(folder)
    draws.read(torch.tensor([0]), "noisy")


def _sample() -> bytes:
    content = io.BytesIO()
    np.savez(content, latents=np.zeros((4, 2, 2), np.float16), encoder_hidden_states=np.zeros((3, 8), np.float16))
    return content.getvalue()


@cache
def _hostile_shards() -> list[bytes]:
    """Arrays that decompress to a thousand times their size, and objects, which are pickled."""
    compressed, objects = io.BytesIO(), io.BytesIO()
    np.savez_compressed(compressed, latents=np.zeros(40_000_000, np.float16))
    np.savez(objects, latents=np.array([print], dtype=object))
    return [compressed.getvalue(), objects.getvalue()]


@st.composite
def _prepared(draw: st.DrawFn) -> tuple[bytes, bytes, bytes]:
    sample, index = _sample(), {"pieces": 1, "made_by": "x"}
    places = [[0, len(sample)], [len(sample), len(sample)]]
    piece = {"captions": ["a cat", "a dog"], "places": places, "skipped": {"x": "y"}}
    shards = st.one_of(st.just(sample * 2), inputs.damaged(sample * 2), st.sampled_from(_hostile_shards()))
    first = draw(st.one_of(st.just(inputs.dumped(index)), inputs.json_files(index)))
    second = draw(st.one_of(st.just(inputs.dumped(piece)), inputs.json_files(piece)))
    return first, second, draw(shards)


@reader(5, _prepared)
def prepared_data(folder: Path, contents: tuple[bytes, bytes, bytes]) -> None:
    for name, content in zip(("prepared.json", "00000.json", "00000.tar"), contents, strict=True):
        written(folder, name, content)
    prepared_captions(folder)
    data = PreparedData(folder)
    if len(data):
        data.batch(range(len(data)))


_PICTURE = inputs.image_files


def _use(source: Any) -> None:
    """Read a source as a training does: every example, and its pixels."""
    skipped: dict[str, str] = {}
    from asdm.data.examples import load_pixels

    load_pixels(open_data(source, "all").examples, 16, skipped)


@st.composite
def _tables(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(["metadata.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet"]))
    row = {"file_name": "0.png", "text": "a cat", "held_out": False, "concept": "cat"}
    if name == "metadata.jsonl":
        lines = draw(st.lists(st.one_of(inputs.json_files(row), inputs.mutated(row).map(inputs.dumped)), max_size=4))
        return name, b"\n".join(lines)
    if name == "metadata.csv":
        text = b'file_name,text,held_out\n0.png,"a cat, red",0\n'
        return name, draw(
            st.one_of(inputs.damaged(text), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
        )
    return name, draw(inputs.damaged(_parquet()))


@cache
def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(pyarrow.table({"file_name": ["0.png"], "text": ["a cat"]}), content)
    return content.getvalue()


@reader(8, lambda: st.tuples(_tables(), _PICTURE()))
def captions_in_tables(folder: Path, contents: tuple[tuple[str, bytes], bytes]) -> None:
    (name, table), picture = contents
    written(folder, "0.png", picture)
    written(folder, name, table)
    _use(folder)


@reader(
    4,
    lambda: st.tuples(
        st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))), _PICTURE()
    ),
)
def captions_in_text_files(folder: Path, contents: tuple[bytes, bytes]) -> None:
    written(folder, "0.png", contents[1])
    read = [lambda: read_prompts(str(folder / "0.txt")), lambda: read_captions(folder / "0.txt"), lambda: _use(folder)]
    written(folder, "0.txt", contents[0])
    refusals(read)


@reader(10, _PICTURE)
def images(folder: Path, content: bytes) -> None:
    open_image(written(folder, "image.png", content))


@cache
def _generated() -> bytes:
    content = io.BytesIO()
    about = PngInfo()
    about.add_text(JSON_CHUNK, json.dumps({"prompt": "a cat", "seed": 1}))
    Image.new("RGB", (16, 16)).save(content, format="PNG", pnginfo=about)
    return content.getvalue()


@reader(4, lambda: st.one_of(inputs.damaged(_generated()), inputs.image_files()))
def generated_images(folder: Path, content: bytes) -> None:
    assert isinstance(read_about(written(folder, "image.png", content)), dict)


@reader(8, inputs.archives)
def webdataset_shards(folder: Path, content: bytes) -> None:
    _use(str(written(folder, "00000.tar", content)))


@cache
def _dataset() -> dict[str, bytes]:
    import datasets

    target = valid_folder() / "dataset"
    picture = {"bytes": inputs._pictures()[0], "path": None}
    rows = {"image": [picture], "text": ["a cat"]}
    datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    ).save_to_disk(str(target))
    return {path.name: path.read_bytes() for path in target.iterdir()}


@st.composite
def _datasets(draw: st.DrawFn) -> dict[str, bytes]:
    files = dict(_dataset())
    name = draw(st.sampled_from(sorted(files)))
    is_json = name.endswith(".json")
    files[name] = draw(inputs.json_files(json.loads(files[name])) if is_json else inputs.damaged(files[name]))
    if draw(st.booleans()):
        files["dataset.py"] = b"raise SystemExit(3)"
    return files


@reader(1, _datasets)
def datasets_on_disk(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        written(folder, name, content)
    _use(f"hf:{folder}")
