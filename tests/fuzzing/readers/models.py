"""Readers of models, their parts and what is added to them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from hypothesis import strategies as st
from safetensors.torch import save

from asdm import (
    load_pipeline,
    save_pipeline,
)
from asdm.distillation.decoder_recipe import DecoderRecipe, read_decoder_recipe
from asdm.files import MARKER, read_settings
from asdm.generation.controlnet import load_controlnet
from asdm.generation.lora import LoraFile, with_loras
from asdm.pipelines.clip import clip_statistics
from asdm.pipelines.decoders import make_tiny, save_decoder, with_decoder
from asdm.pipelines.headers import Header, kind_of
from asdm.pipelines.lora_files import convert_lora
from asdm.pipelines.shapes import denoiser_without_weights
from asdm.runtime.openvino import with_openvino_graphs
from asdm.runtime.writers import FILES
from asdm.training.checkpoints import require_same_run
from conftest import tiny_pipeline
from fuzzing import inputs
from fuzzing.readers.base import (
    linked,
    of_file,
    pipeline,
    reader,
    refusals,
    student_folder,
    teacher_folder,
    unet,
    valid_folder,
    written,
)
from fuzzing.readers.data import a_draw


@reader(6, lambda: inputs.tensor_files(a_draw()))
def safetensors_headers(folder: Path, content: bytes) -> None:
    from asdm.pipelines.tensor_faults import require_safetensors, require_weights

    path = written(folder, "file.safetensors", content)
    require_safetensors(path)
    require_weights(path)
    kind_of(Header.of(path))
    denoiser_without_weights(str(path))


@cache
def _original() -> tuple[bytes, Path]:
    """A checkpoint in one file, and a folder with its configs."""
    from test_single_file import original_layout

    whole = tiny_pipeline()
    folder = save_pipeline(whole, valid_folder() / "whole")
    return save(original_layout(whole), {"modelspec.prediction_type": "epsilon"}), folder


@reader(2, lambda: inputs.tensor_files(_original()[0]))
def single_files(folder: Path, content: bytes) -> None:
    load_pipeline(written(folder, "model.safetensors", content), config=_original()[1])


_WRITES = b"from pathlib import Path; Path('/tmp/escaped').write_text('x')"


def _parts(folder: Callable[[], Path]) -> Callable[[], st.SearchStrategy[tuple[str, bytes | None]]]:
    def made() -> st.SearchStrategy[tuple[str, bytes | None]]:
        def one(name: str) -> st.SearchStrategy[tuple[str, bytes | None]]:
            path = folder() / name
            if name.endswith(".json"):
                content = (
                    inputs.json_files(of_file(path))
                    if path.stat().st_size < 20_000
                    else inputs.damaged(path.read_bytes())
                )
            elif name.endswith(".safetensors"):
                content = inputs.tensor_files(path.read_bytes())
            else:
                content = inputs.damaged(path.read_bytes())
            return st.tuples(st.just(name), st.one_of(content, content, content, st.none()))

        files = sorted(str(path.relative_to(folder())) for path in folder().rglob("*") if path.is_file())
        small = [name for name in files if name.endswith("config.json") or name == "model_index.json"]
        hostile = [
            ("unet/evil.py", _WRITES),
            ("evil.py", _WRITES),
            ("unet/diffusion_pytorch_model.bin", b"\x80\x02cos\nsystem\n(S'id'\ntR."),
        ]
        return st.one_of(
            st.sampled_from(small * 3 + files).flatmap(one), st.sampled_from(hostile), _code_in_configs(folder())
        )

    return made


_CLASSES = [
    ["evil", "Evil"], ["os", "system"], ["subprocess", "Popen"], ["builtins", "exec"], ["torch", "load"],
    ["transformers", "AutoModel"], ["transformers", "pipeline"], ["diffusers", "FluxPipeline"],
    ["diffusers", "ModelMixin"], ["diffusers.utils", "logging"], ["asdm_unet", "AsdmUNet2DConditionModel"],
]  # fmt: skip
_FIELDS: list[dict[str, Any]] = [
    {"auto_map": {"AutoModel": "evil.Evil"}},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"_attn_implementation": "a/b"},
    {"attn_implementation": "kernels/x"},
    {"_class_name": "evil.Evil"},
    {"architectures": ["evil"]},
    {"model_type": "evil"},
    {"dtype": "float64"},
    {"torch_dtype": "x"},
    {"_name_or_path": "/etc"},
    {"_use_default_values": 3},
    {"edits": [{"edit": "remove", "unit": "mid_block"}]},
]


def _code_in_configs(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    """Configs that ask for code, or for huge models."""
    index, config = of_file(folder / "model_index.json"), of_file(folder / "unet" / "config.json")
    text = of_file(folder / "text_encoder" / "config.json")
    part = st.sampled_from([["unet"], ["vae"], ["text_encoder"], ["tokenizer"], ["scheduler"], ["extra"], ["../../x"]])
    kinds = st.sampled_from(_CLASSES)
    large = st.sampled_from([-1, 0, 1, 3, 1000, 10**5, 2**20, 10**9, 10**15])
    fields = st.sampled_from(sorted(key for key in config if not key.startswith("_")))
    texts = st.sampled_from(sorted(key for key in text if not key.startswith("_")))
    extra = st.sampled_from(_FIELDS)
    return st.one_of(
        st.tuples(part, kinds).map(lambda each: ("model_index.json", inputs.dumped(index | {each[0][0]: each[1]}))),
        st.sampled_from(inputs.HOSTILE_TEXTS).map(
            lambda name: ("model_index.json", inputs.dumped(index | {"_class_name": name}))
        ),
        st.tuples(fields, large).map(lambda each: ("unet/config.json", inputs.dumped(config | {each[0]: each[1]}))),
        st.tuples(fields, st.lists(large, max_size=3)).map(
            lambda each: ("unet/config.json", inputs.dumped(config | {each[0]: each[1]}))
        ),
        st.tuples(texts, large).map(
            lambda each: ("text_encoder/config.json", inputs.dumped(text | {each[0]: each[1]}))
        ),
        extra.map(lambda more: ("unet/config.json", inputs.dumped(config | more))),
        extra.map(lambda more: ("text_encoder/config.json", inputs.dumped(text | more))),
    )


@reader(1.5, _parts(teacher_folder))
def pipeline_folders(folder: Path, change: tuple[str, bytes | None]) -> None:
    load_pipeline(linked(teacher_folder(), folder / "model", *change))


@reader(1.5, _parts(student_folder))
def student_folders(folder: Path, change: tuple[str, bytes | None]) -> None:
    load_pipeline(linked(student_folder(), folder / "model", *change))


@reader(2, lambda: inputs.json_files(of_file(student_folder() / "unet" / "config.json")))
def student_configs(folder: Path, content: bytes) -> None:
    denoiser_without_weights(str(linked(student_folder(), folder / "model", "unet/config.json", content)))


@cache
def _lora(style: str) -> bytes:
    from test_checkpoint import lora_file

    return lora_file(
        valid_folder() / f"{style}.safetensors",
        unet(),
        ["up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"],
        style,
    ).read_bytes()


@reader(4, lambda: st.sampled_from(["diffusers", "kohya", "original"]).flatmap(lambda s: inputs.tensor_files(_lora(s))))
def lora_files(folder: Path, content: bytes) -> None:
    path = written(folder, "lora.safetensors", content)

    def load() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with with_loras(pipeline(), [LoraFile(path=path)]):
                pass

    refusals([lambda: convert_lora(path, unet(), folder / "converted.safetensors"), load])


@cache
def _controlnet() -> Path:
    ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(16, 32)).save_pretrained(
        valid_folder() / "control"
    )
    return valid_folder() / "control"


@st.composite
def _controlnets(draw: st.DrawFn) -> tuple[str, bytes | None]:
    name = draw(st.sampled_from(["config.json", "config.json", "diffusion_pytorch_model.safetensors"]))
    content = (_controlnet() / name).read_bytes()
    return name, draw(inputs.json_files(json.loads(content)) if name == "config.json" else inputs.tensor_files(content))


@reader(1, _controlnets)
def controlnets(folder: Path, change: tuple[str, bytes | None]) -> None:
    load_controlnet(linked(_controlnet(), folder / "control", *change), pipeline())


@reader(
    2, lambda: inputs.json_files({"image_processor": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}})
)
def image_processors(folder: Path, content: bytes) -> None:
    from types import SimpleNamespace

    written(folder, "preprocessor_config.json", content)
    mean, std = clip_statistics(SimpleNamespace(name_or_path=str(folder)))  # type: ignore[arg-type]
    torch.tensor([mean, std])


# -- exported graphs ---------------------------------------------------------------------------------------


@cache
def _exported() -> Path:
    """A folder of two small graphs, as `asdm export` writes them."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    folder = valid_folder() / "exported"
    for name, config in (("unet", pipeline().unet.config), ("vae_decoder", pipeline().vae.config)):
        sample = ops.parameter([-1, 4, -1, -1], np.float32, name="sample")
        kernel = ops.constant(np.ones((4, 4, 3, 3), np.float32))
        graph = openvino.Model([ops.convolution(sample, kernel, *[[1, 1]] * 4)], [sample])
        written(folder, f"{name}/config.json", inputs.dumped(dict(config)))
        openvino.save_model(graph, folder / name / FILES["openvino"], compress_to_fp16=False)
    written(folder, MARKER, inputs.dumped({"kind": "export", "format": "openvino", "cache": None}))
    return folder


@st.composite
def _exports(draw: st.DrawFn) -> tuple[str, bytes]:
    names = sorted(str(path.relative_to(_exported())) for path in _exported().rglob("*") if path.is_file())
    name = draw(st.sampled_from(names))
    content = (_exported() / name).read_bytes()
    strategy = inputs.json_files(json.loads(content)) if name.endswith(".json") else inputs.damaged(content)
    return name, draw(strategy)


@reader(1, _exports)
def exported_graphs(folder: Path, change: tuple[str, bytes]) -> None:
    with_openvino_graphs(pipeline(), linked(_exported(), folder / "exported", *change))


# -- tiny decoders ----------------------------------------------------------------------------------------


@reader(3, lambda: inputs.yaml_files(DecoderRecipe(width=8, blocks=[1, 0]).model_dump(exclude_none=True)))
def recipes_of_decoders(folder: Path, content: bytes) -> None:
    read_decoder_recipe(written(folder, "recipe.yaml", content)).tiny_for(pipeline())


_RUN = {"seed": 0, "data": "x", "teacher": "x", **DecoderRecipe().model_dump(mode="json")}


@reader(2, lambda: inputs.json_files(_RUN))
def settings_of_runs(folder: Path, content: bytes) -> None:
    known = _RUN | read_settings(written(folder, "run.json", content))
    require_same_run(folder, known, _RUN | {"steps": 2000})


@cache
def _decoder() -> Path:
    return save_decoder(make_tiny(4, 8, [1, 0]), valid_folder() / "decoder", {"teacher": "x"})


@st.composite
def _decoders(draw: st.DrawFn) -> tuple[str, bytes | None]:
    name = draw(st.sampled_from(["config.json", "config.json", "diffusion_pytorch_model.safetensors"]))
    content = (_decoder() / name).read_bytes()
    return name, draw(inputs.json_files(json.loads(content)) if name == "config.json" else inputs.tensor_files(content))


@reader(3, _decoders)
def decoders(folder: Path, change: tuple[str, bytes | None]) -> None:
    made = with_decoder(pipeline(), linked(_decoder(), folder / "decoder", *change))
    with torch.no_grad():
        made.vae.decode(torch.zeros(1, 4, 8, 8))
