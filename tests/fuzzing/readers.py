"""All readers of strangers' files, with valid files to start from."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch import nn

from asdm import (
    CacheSchedule,
    Evaluation,
    PruningPlan,
    RedundancyMap,
    analyze,
    build_student,
    load_pipeline,
    save_pipeline,
    with_unet,
)
from asdm.benchmark.results import Benchmark
from asdm.data.draws import Draws
from asdm.data.prepared import PreparedData, prepared_captions
from asdm.data.sources import open_data
from asdm.distillation.caption_only import read_captions
from asdm.distillation.recipes import as_yaml, joint_stages, read_stages
from asdm.distillation.recorded import INDEX, read_index
from asdm.families import family_of
from asdm.files import MARKER, require_ours
from asdm.generation.additions import LoraFile, load_controlnet, with_loras
from asdm.generation.files import read_prompts
from asdm.generation.image import JSON_CHUNK, read_about
from asdm.images import open_image
from asdm.pipelines.checkpoints import Header, claim_of, kind_of, scheduler_for, settled
from asdm.pipelines.clip import clip_statistics
from asdm.pipelines.lora_files import convert_lora
from asdm.pipelines.shapes import denoiser_without_weights
from asdm.runtime.openvino import with_openvino_graphs
from asdm.student.surgery import model_without_weights
from asdm.training.checkpoints import TrainingState, checkpoint_step, load_ema_weights
from asdm.training.log import read_log
from conftest import tiny_pipeline, tiny_unet
from fuzzing import inputs

HERE = Path(__file__).parent.parent
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


# -- records ----------------------------------------------------------------------------------------------


@reader(10, lambda: inputs.json_files(json.loads(plan().to_json())))
def plans(folder: Path, content: bytes) -> None:
    found = PruningPlan.load(written(folder, "plan.json", content))
    model_without_weights(unet(), found.edits)
    found.require_for(unet())


@reader(6, lambda: inputs.json_files(profile()))
def redundancy_maps(folder: Path, content: bytes) -> None:
    found = RedundancyMap.load(written(folder, "profile.json", content))
    assert found.family is not None


@reader(4, lambda: inputs.json_files(of_file(HERE / "evaluation_0_1.json")))
def evaluations(folder: Path, content: bytes) -> None:
    Evaluation.load(written(folder, "evaluation.json", content))


def _schedule() -> dict[str, Any]:
    fields = {
        "fingerprint": family_of(unet()).fingerprint(unet()),
        "steps": 10,
        "full_steps": [0, 3, 6],
        "depth": 1,
        "order": 1,
        "full_ms": 2.0,
        "cached_ms": 1.0,
    }
    return fields | {"speedup": 1.5, "speedup_interval": [1.4, 1.6]}


@reader(6, lambda: inputs.json_files(_schedule()))
def cache_schedules(folder: Path, content: bytes) -> None:
    found = CacheSchedule.load(written(folder, "schedule.json", content))
    assert 0 in found.full_steps_of(20)
    found.require_fit(unet())


@reader(
    8,
    lambda: inputs.yaml_files([stage.model_dump(mode="json", exclude_none=True) for stage in joint_stages(unet(), 20)]),
)
def recipes(folder: Path, content: bytes) -> None:
    stages = read_stages(written(folder, "recipe.yaml", content))
    as_yaml(stages)


_TRAINING = {
    "model": {
        "target": "ldm.X",
        "params": {"linear_start": 0.1, "linear_end": 0.2, "timesteps": 1000, "parameterization": "v"},
    }
}


@reader(4, lambda: st.one_of(inputs.yaml_files(_TRAINING), inputs.yaml_files(dict(pipeline().scheduler.config))))
def scheduler_configs(folder: Path, content: bytes) -> None:
    for name in ("config.yaml", "config.json"):
        claim = claim_of(written(folder, name, content))
        scheduler_for(pipeline().scheduler, settled([claim], None, name))


@cache
def _benchmark() -> tuple[Any, Any]:
    rows, runs = (of_file(HERE.parent / "docs" / "results" / f"{name}.json") for name in ("benchmark", "benchmark_run"))
    place = rows[0]["place"]
    return [row for row in rows if row["place"] == place][:3], {place: runs[place]}


@reader(2, lambda: st.tuples(*map(inputs.json_files, _benchmark())))
def benchmark_results(folder: Path, contents: tuple[bytes, bytes]) -> None:
    written(folder, "b_run.json", contents[1])
    Benchmark.load(written(folder, "b.json", contents[0]))


@reader(3, lambda: inputs.json_files({"kind": "compression", "settings": {"model": "demo"}}))
def markers_of_folders(folder: Path, content: bytes) -> None:
    written(folder, MARKER, content)
    require_ours(folder, "pipeline")


# -- data -------------------------------------------------------------------------------------------------

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
_DRAW = save({"noisy": torch.zeros(4, 8, 8, dtype=torch.int8), "noisy.scale": torch.ones(4, 1, 1)})


@reader(
    3,
    lambda: st.one_of(
        st.tuples(inputs.json_files(_FEATURES), st.just(_DRAW)),
        st.tuples(st.just(inputs.dumped(_FEATURES)), inputs.tensor_files(_DRAW)),
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


# -- trainings --------------------------------------------------------------------------------------------


def _training() -> tuple[dict[str, nn.Parameter], Any]:
    torch.manual_seed(0)
    weights = {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(weights.values())
    return weights, optimizer


@cache
def _checkpoint() -> dict[str, bytes]:
    weights, optimizer = _training()
    sum(weight.sum() for weight in weights.values()).backward()
    optimizer.step()
    TrainingState(weights, optimizer, None, torch.amp.GradScaler("cpu")).save(valid_folder() / "training", 5)
    return {path.name: path.read_bytes() for path in (valid_folder() / "training" / "checkpoint-0000005").iterdir()}


@st.composite
def _checkpoints(draw: st.DrawFn) -> tuple[str, dict[str, bytes], bytes]:
    files = dict(_checkpoint())
    name = draw(st.sampled_from(sorted(files)))
    is_json = name.endswith(".json")
    files[name] = draw(inputs.json_files(json.loads(files[name])) if is_json else inputs.tensor_files(files[name]))
    if draw(st.integers(0, 9)) == 0:
        del files[name]
    folder = draw(
        st.sampled_from(["checkpoint-0000005"] * 6 + ["checkpoint-x5", "checkpoint-9" * 3, "checkpoint-" + "9" * 200])
    )
    row = {"step": 1, "loss": 0.5}
    log = draw(st.one_of(inputs.json_files(row), st.just(b'{"step": 1, "loss": 0.5}\n{"ste')))
    return folder, files, log


@reader(6, _checkpoints)
def training_checkpoints(folder: Path, contents: tuple[str, dict[str, bytes], bytes]) -> None:
    name, files, log = contents
    for file, content in files.items():
        written(folder, f"{name}/{file}", content)
    rows = read_log(written(folder, "log.jsonl", log))
    assert all("step" in row for row in rows)
    checkpoint_step(folder)
    weights, optimizer = _training()

    def resume() -> None:
        TrainingState(weights, optimizer, None, torch.amp.GradScaler("cpu")).load_newest(folder)
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()

    refusals([resume, lambda: load_ema_weights(folder, weights)])


# -- models -----------------------------------------------------------------------------------------------


@cache
def _unet_file() -> bytes:
    return (teacher_folder() / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@reader(6, lambda: inputs.tensor_files(_DRAW))
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


def _linked(source: Path, target: Path, changed: str, content: bytes | None) -> Path:
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
    load_pipeline(_linked(teacher_folder(), folder / "model", *change))


@reader(1.5, _parts(student_folder))
def student_folders(folder: Path, change: tuple[str, bytes | None]) -> None:
    load_pipeline(_linked(student_folder(), folder / "model", *change))


@reader(2, lambda: inputs.json_files(of_file(student_folder() / "unet" / "config.json")))
def student_configs(folder: Path, content: bytes) -> None:
    denoiser_without_weights(str(_linked(student_folder(), folder / "model", "unet/config.json", content)))


@cache
def _lora(style: str) -> bytes:
    from test_checkpoint import lora_file

    return lora_file(
        valid_folder() / f"{style}.safetensors",
        unet(),
        ["up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"],
        style,
    ).read_bytes()


@reader(1, lambda: st.one_of(inputs.tensor_files(_lora("diffusers")), inputs.tensor_files(_lora("kohya"))))
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
    load_controlnet(_linked(_controlnet(), folder / "control", *change), pipeline())


@reader(
    2, lambda: inputs.json_files({"image_processor": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}})
)
def image_processors(folder: Path, content: bytes) -> None:
    from types import SimpleNamespace

    written(folder, "preprocessor_config.json", content)
    mean, std = clip_statistics(SimpleNamespace(name_or_path=str(folder)))  # type: ignore[arg-type]
    torch.tensor([mean, std])


@reader(
    1,
    lambda: st.tuples(
        inputs.json_files({"kind": "export", "format": "openvino", "cache": 1}),
        inputs.json_files({"in_channels": 4}),
        st.binary(max_size=60),
    ),
)
def exported_graphs(folder: Path, contents: tuple[bytes, bytes, bytes]) -> None:
    for name, content in (
        (MARKER, contents[0]),
        ("unet/config.json", contents[1]),
        ("unet/openvino_model.xml", contents[2]),
        ("unet/openvino_model.bin", b""),
    ):
        written(folder, name, content)
    with_openvino_graphs(pipeline(), folder)


def fresh(folder: Path) -> Path:
    """Return the folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
