"""Readers of evaluations by protocols: results, prompts, folders of images, networks' weights."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from asdm.evaluation.image_folders import DISTANCES, load_distances
from asdm.evaluation.protocol.captions import read_captions
from asdm.evaluation.protocol.extractors import FEATURES, ClipExtractor, Dinov2Extractor
from asdm.evaluation.protocol.features import FeatureCache
from asdm.evaluation.protocol.image_job import KIND, ImageJob, ImageSettings
from asdm.evaluation.protocol.pictures import numbered, pictures_of
from asdm.evaluation.protocol.results import ProtocolResults
from asdm.evaluation.protocol.weights import SOURCES, Source, find_weights
from asdm.files import MARKER
from fuzzing import inputs
from fuzzing.readers.base import linked, of_file, pipeline, reader, valid_folder, written


def _results() -> dict[str, Any]:
    row = {
        "name": "teacher", "images": 4, "side": 64, "steps": 25, "guidance_scale": 7.5, "scheduler": "DDIM",
        "fid": 12.5, "wins": {"clip": 0.5},
    }  # fmt: skip
    about = {"protocol": "demo", "title": "x", "date": "2026-01-01", "machine": "x", "dtype": "float32", "seed": 0}
    return about | {
        "prompts": 4, "stored_side": 64, "real_images": 8, "networks": {"FID": "judge"}, "notes": ["x"], "rows": [row],
    }  # fmt: skip


@reader(4, lambda: inputs.json_files(_results()))
def results_of_protocols(folder: Path, content: bytes) -> None:
    found = ProtocolResults.load(written(folder, "evaluation.json", content))
    found.save(folder / "again.json")
    assert ProtocolResults.load(folder / "again.json") == found


_COCO = {
    "images": [{"id": 1}],
    "annotations": [{"image_id": 1, "id": 2, "caption": "a cat"}, {"image_id": 3, "id": 1, "caption": "a dog"}],
}
_TABLE = b'0,"a cat, red"\n1,a dog\n'


def _text() -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))


def _prompts() -> st.SearchStrategy[tuple[str, bytes]]:
    row = {"caption": "a cat", "id": 1}
    lines = st.lists(st.one_of(inputs.json_files(row), inputs.mutated(row).map(inputs.dumped)), max_size=4)
    return st.one_of(
        st.tuples(st.just("captions.json"), inputs.json_files(_COCO)),
        st.tuples(st.just("captions.jsonl"), lines.map(b"\n".join)),
        st.tuples(st.just("captions.csv"), st.one_of(inputs.damaged(_TABLE), _text())),
        st.tuples(st.sampled_from(["captions.txt", "captions", "captions.parquet"]), _text()),
    )


@reader(6, _prompts)
def captions_of_protocols(folder: Path, contents: tuple[str, bytes]) -> None:
    found = read_captions(written(folder, *contents), 3)
    assert 1 <= len(found) <= 3 and all(isinstance(each, str) and "\n" not in each for each in found)


_GENEVAL = {"tag": "single_object", "prompt": "a cat", "include": [{"class": "cat", "count": 1}]}
_DPG = b"item_id,text,keywords\nx1,a cat,x\nx2,a dog,y\n"


@reader(
    3,
    lambda: st.one_of(
        st.tuples(st.just("geneval"), st.lists(inputs.json_files(_GENEVAL), min_size=1, max_size=3).map(b"\n".join)),
        st.tuples(st.just("dpg"), st.one_of(inputs.damaged(_DPG), _text())),
    ),
)
def prompts_of_scorers(folder: Path, contents: tuple[Any, bytes]) -> None:
    layout, content = contents
    found = pictures_of(layout, written(folder, "prompts", content))
    for path in (*(each.file for each in found.all), *found.texts):
        assert (folder / "out" / path).resolve().is_relative_to(folder / "out"), path
        json.dumps(path)


_SETTINGS = ImageSettings(steps=2, guidance_scale=1, seed=0, side=16)


@cache
def _state() -> PartialState:
    return PartialState(cpu=True)


@cache
def _marker() -> Any:
    place = valid_folder() / "job"
    ImageJob(place, numbered(["a cat"], ".png"), _state()).claim({"images/teacher": (pipeline(), _SETTINGS)})
    return of_file(place / MARKER)


@reader(3, lambda: st.tuples(inputs.json_files(_marker()), inputs.json_files([0.5, 0.25])))
def folders_of_evaluations(folder: Path, contents: tuple[bytes, bytes]) -> None:
    written(folder, f"job/{MARKER}", contents[0])
    (folder / "job" / "images" / "teacher").mkdir(parents=True)
    job = ImageJob(folder / "job", numbered(["a cat"], ".png"), _state())
    written(folder, DISTANCES, contents[1])
    load_distances(folder)
    job.claim({"images/teacher": (pipeline(), _SETTINGS)})
    assert of_file(folder / "job" / MARKER)["kind"] == KIND


# -- networks' weights ------------------------------------------------------------------------------------


@cache
def clip_folder() -> Path:
    folder, tokenizer = valid_folder() / "clip", pipeline().tokenizer
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = tower | special | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    vision = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    written(folder, "preprocessor_config.json", inputs.dumped(normal))
    return folder


@cache
def dinov2_folder() -> Path:
    folder = valid_folder() / "dinov2"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    written(folder, "preprocessor_config.json", (clip_folder() / "preprocessor_config.json").read_bytes())
    return folder


@st.composite
def _changed_weights(draw: st.DrawFn) -> tuple[str, str, bytes | None]:
    kind = draw(st.sampled_from(["clip", "dinov2"]))
    folder = clip_folder() if kind == "clip" else dinov2_folder()
    names = sorted(path.name for path in folder.iterdir())
    name = draw(st.sampled_from([*names, "config.json", "config.json", "model.safetensors", "evil.py"]))
    if name == "evil.py":
        return kind, name, b"raise SystemExit(3)"
    content = (folder / name).read_bytes()
    if name.endswith(".safetensors"):
        changed = inputs.tensor_files(content)
    elif name == "config.json":
        extra = st.sampled_from(
            [{"auto_map": {"AutoModel": "evil.Evil"}}, {"attn_implementation": "kernels/x"}, {"hidden_size": 2**19},
             {"vision_config": {"hidden_size": 2**19}}, {"quantization_config": {"quant_method": "gptq"}}]
        )  # fmt: skip
        valid = json.loads(content)
        changed = st.one_of(inputs.json_files(valid), extra.map(lambda more: inputs.dumped(valid | more)))
    elif name.endswith(".json") and len(content) < 20_000:
        changed = inputs.json_files(json.loads(content))
    else:
        changed = inputs.damaged(content)
    return kind, name, draw(st.one_of(changed, changed, changed, st.none()))


_PIXELS = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)


@reader(3, _changed_weights)
def weights_of_networks(folder: Path, change: tuple[str, str, bytes | None]) -> None:
    kind, *changed = change
    linked(clip_folder() if kind == "clip" else dinov2_folder(), folder / kind, *changed)
    path = find_weights(SOURCES["clip" if kind == "clip" else "dinov2"], str(folder / kind), None)
    if kind == "dinov2":
        found = Dinov2Extractor(path, "cpu").images(_PIXELS)
    else:
        extractor = ClipExtractor.of_folder(path, kind, "cpu", scaled=True)
        found = extractor.texts(["a cat"]) | extractor.images(_PIXELS)
    assert found[FEATURES].ndim == 2


@cache
def _pickled() -> bytes:
    content = io.BytesIO()
    torch.save({"conv.weight": torch.zeros(2, 3)}, content)
    return content.getvalue()


_SYSTEM = b"\x80\x02cos\nsystem\n(S'id'\ntR."


@reader(2, lambda: st.one_of(inputs.damaged(_pickled()), st.sampled_from([_SYSTEM, b"", b"PK\x03\x04"])))
def weights_in_pickles(folder: Path, content: bytes) -> None:
    source = Source("inception", "a network", url=lambda: "https://127.0.0.1:9/weights.pth")
    find_weights(source, str(written(folder, "weights.pth", content)), None)


@cache
def _piece() -> tuple[ClipExtractor, str, bytes]:
    """An extractor, and the file of features that it leaves."""
    clip = CLIPModel.from_pretrained(clip_folder()).eval()
    extractor = ClipExtractor(clip, pipeline().tokenizer, "clip")
    FeatureCache(valid_folder() / "features", _state()).of_texts("texts", extractor, ["a cat", "a dog"])
    (path,) = (valid_folder() / "features").iterdir()
    return extractor, path.name, path.read_bytes()


@reader(2, lambda: inputs.tensor_files(_piece()[2]))
def features_of_evaluations(folder: Path, content: bytes) -> None:
    extractor, name, _ = _piece()
    written(folder, name, content)
    found = FeatureCache(folder, _state()).of_texts("texts", extractor, ["a cat", "a dog"])
    assert found[FEATURES].shape == (2, extractor._clip.config.projection_dim)
