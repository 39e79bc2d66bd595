"""What `reliability.py` works on: processes of commands that it forks, tiny inputs, and the commands that write."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tools/

import asdm
from asdm import cli
from asdm.data.prepared import PreparedData
from asdm.data.sources import open_data
from asdm.distillation.stages import Stage
from asdm.errors import AsdmError
from asdm.evaluation import image_timing
from asdm.evaluation.protocol.results import ProtocolResults
from asdm.files import read_marker
from asdm.measure import latency
from asdm.pipelines.decoders import load_decoder
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan
from tools.demo import recipe
from tools.demo.__main__ import app as demo_app

REMOVED = ("down_blocks.1.attentions.1", "mid_block.attentions.0", "up_blocks.2.attentions.1")
IMAGES, SHARDS = 24, 4
# Of the commands, which import them in their first lines; a forked process has them.
LIBRARIES = (
    "asdm.benchmark.models", "asdm.compression.compress", "asdm.distillation.decoder", "asdm.estimates.forecast",
    "asdm.evaluation.protocol.run", "asdm.runtime.export", "openvino", "nncf",
)  # fmt: skip
latency.PATIENCE = image_timing.IMAGES_PATIENCE = 0.2  # seconds: what is written matters, not how fast anything is
DEMO_STEPS, DEMO_PAIRS = 4, 32  # of each training of a build that is killed
DEMO_STAGES = ("tokenizer", "clip", "vae", "unet", "assemble")

# -- processes --------------------------------------------------------------------------------------------


def start(call: Callable[[], Any], errors: Path) -> int:
    """Call a function in a child; return its process. What it prints goes to `errors`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with errors.open("w", encoding="utf-8") as file:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(file.fileno(), 2)
            torch.set_num_threads(1)
            call()
            status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def wait(pid: int) -> int:
    """Return a child's exit status, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*arguments: object) -> Callable[[], None]:
    """Return a call of `asdm` with these arguments."""

    def call() -> None:
        sys.argv = ["asdm", "--threads", "1", *map(str, arguments)]
        cli.main()

    return call


def completed(call: Callable[[], Any], errors: Path) -> int:
    """Return the exit status of a call in a child."""
    return wait(start(call, errors))


def require_completed(call: Callable[[], Any], errors: Path) -> None:
    """Raise an AsdmError unless a call in a child ends well."""
    status = completed(call, errors)
    if status:
        raise AsdmError(f"exit status {status}: {errors.read_text('utf-8')[-2000:]}")


# -- inputs -----------------------------------------------------------------------------------------------


def small_unet(pipeline: Any) -> Any:
    """Return the embedded pipeline with a UNet of 2 million parameters."""
    torch.manual_seed(0)
    config = dict(pipeline.unet.config) | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 16}
    pipeline.register_modules(unet=UNet2DConditionModel.from_config(config).eval())
    return pipeline


def tiny_pipeline() -> StableDiffusionPipeline:
    """Return a pipeline of random weights and one million parameters, for images of 32 pixels, with the embedded one's
    tokenizer and scheduler."""
    pipeline = asdm.load_pipeline("demo")
    torch.manual_seed(0)
    width = 32
    text = pipeline.text_encoder.config
    text.update({"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2})
    unet = dict(pipeline.unet.config) | {
        "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "cross_attention_dim": width, "sample_size": 8,
    }  # fmt: skip
    vae = dict(pipeline.vae.config) | {"block_out_channels": (16, 16, 16), "norm_num_groups": 8, "sample_size": 32}
    pipeline.register_modules(
        unet=UNet2DConditionModel.from_config(unet).eval(),
        vae=AutoencoderKL.from_config(vae).eval(),
        text_encoder=type(pipeline.text_encoder)(text).eval(),
    )
    return pipeline


def prepare_inputs(folder: Path) -> None:
    """Write into a folder `teacher`, `student`, `plan.json`, `profile.json`, `lora`, `recipe.json`, `data` (images) and
    `shards` (the same in tars)."""
    pipeline = tiny_pipeline()
    asdm.save_pipeline(pipeline, folder / "teacher")
    plan = PruningPlan.for_unet(pipeline.unet, [asdm.Remove(unit=unit) for unit in REMOVED])
    plan.save(folder / "plan.json")
    asdm.save_pipeline(asdm.with_unet(pipeline, build_student(pipeline.unet, plan)), folder / "student")
    asdm.analyze(pipeline, samples=1, timesteps=1, latency_rounds=1).save(folder / "profile.json")
    (folder / "data").mkdir()
    (folder / "shards").mkdir()
    for number, example in enumerate(open_data("demo").examples[:IMAGES]):
        example.image().save(folder / "data" / f"{number:03d}.png")
        (folder / "data" / f"{number:03d}.txt").write_text(example.caption, "utf-8")
    files = sorted((folder / "data").iterdir())
    for shard in range(SHARDS):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as archive:
            for path in files[shard * len(files) // SHARDS : (shard + 1) * len(files) // SHARDS]:
                archive.add(path, path.name)
    stages = [Stage(name="joint", steps=4, batch_size=2, checkpoint_every=2).model_dump(exclude_none=True)]
    (folder / "recipe.json").write_text(json.dumps(stages), "utf-8")
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    pipeline.save_lora_weights(folder / "lora", unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    rows = [{"tag": "single_object", "prompt": "a cat"}]
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yield a folder with the inputs."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):
            import_module(library)
    folder = Path(tempfile.mkdtemp(prefix="asdm-reliability-"))
    try:
        require_completed(lambda: prepare_inputs(folder), folder / "errors.txt")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- commands ---------------------------------------------------------------------------------------------


def compression(teacher: Path, data: Path, out: Path) -> Callable[[], None]:
    """Return a call of `compress` that takes seconds."""
    few = [
        "--params",
        "0.9",
        "--sensitivity",
        "taylor",
        "--steps",
        "4",
        "--samples",
        "2",
        "--refine",
        "0",
        "--sampling-steps",
        "2",
    ]
    return command("compress", teacher, "--data", data, "--out", out, *few, "--image-to-image", 0, "--yes")


def writing_commands(inputs: Path, out: Path) -> dict[str, Callable[[], None]]:
    """Return every command that writes, with its output in `out`."""
    teacher, student, data = inputs / "teacher", inputs / "student", inputs / "data"
    few = ["--data", data, "--samples", 2, "--steps", 2, "--rounds", 1, "--image-to-image", 0]
    by_protocol = ["--protocol", "demo", "--images", data, "--limit", 4, "--steps", 2, "--metrics", "kid,ssim"]
    geneval = ["--layout", "geneval", "--prompts", inputs / "geneval.jsonl", "--steps", 2]
    training = ["--data", data, "--recipe", inputs / "recipe.json", "--yes"]
    decoder = ["--data", data, "--steps", 4, "--width", 8, "--blocks", "1,1,0", "--batch-size", 2, "--yes"]
    methods = ["--data", data, "--samples", 2, "--image-to-image", 0, "--steps", 4, "--rounds", 1, "--only", "original"]
    lora = inputs / "lora" / "pytorch_lora_weights.safetensors"
    one_file = ["--to", "checkpoint", "--for", "diffusers"]
    return {
        "analyze": command("analyze", teacher, "--samples", 1, "--timesteps", 1, "--out", out / "profile.json"),
        "plan": command("plan", inputs / "profile.json", "--params", 0.9, "--out", out / "plan.json"),
        "prune": command("prune", teacher, inputs / "plan.json", "--out", out / "student"),
        "prepare-data": command("prepare-data", teacher, data, "--out", out / "prepared"),
        "distill": command("distill", teacher, student, *training, "--out", out / "distilled"),
        "distill-decoder": command("distill-decoder", teacher, *decoder, "--out", out / "decoder"),
        "evaluate": command(
            "evaluate", teacher, student, *few, "--images", out / "pictures", "--out", out / "evaluation.json"
        ),
        "evaluate --protocol": command("evaluate", teacher, student, *by_protocol, "--folder", out / "evaluation"),
        "evaluate --layout": command("evaluate", teacher, *geneval, "--folder", out / "geneval"),
        "generate": command("generate", student, "a house", "--steps", 2, "--out", out / "images"),
        "export --to openvino": command("export", student, "--to", "openvino", "--out", out / "openvino"),
        "export --to checkpoint": command("export", teacher, *one_file, "--out", out / "model.safetensors"),
        "convert-lora": command("convert-lora", lora, "--for", student, "--out", out / "lora.safetensors"),
        "compress": compression(teacher, data, out / "compressed"),
        "benchmark": command(
            "benchmark", teacher, *methods, "--images", out / "pictures", "--out", out / "benchmark", "--yes"
        ),
        "benchmark's images": command(
            "benchmark", teacher, *methods, "--images", out / "pictures", "--out", inputs / "benchmark", "--yes"
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Killed:
    """A command that is killed.

    Attributes:
        call: returns a call with an output folder.
        load: reads the output, and refuses one that is not whole.
        same: patterns of its files that are the same in every run. Others hold times, and are named in `timed`.
    """

    name: str
    call: Callable[[Path], Callable[[], None]]
    load: Callable[[Path], Any]
    same: Sequence[str] = ("**/*",)
    timed: Sequence[str] = ()


def killed_commands(inputs: Path) -> list[Killed]:
    """Return the commands that are killed."""
    teacher, student, data = inputs / "teacher", inputs / "student", inputs / "data"

    def prepare(out: Path) -> Callable[[], None]:
        return command("prepare-data", teacher, f"{inputs}/shards/{{0..{SHARDS - 1}}}.tar", "--out", out)

    def export(out: Path) -> Callable[[], None]:
        return command("export", student, "--to", "openvino", "--out", out)

    def one_file(out: Path) -> Callable[[], None]:
        file = out / "model.safetensors"
        return command("export", teacher, "--to", "checkpoint", "--for", "diffusers", "--out", file)

    def decoder(out: Path) -> Callable[[], None]:
        return writing_commands(inputs, out)["distill-decoder"]

    def protocol(out: Path) -> Callable[[], None]:
        return writing_commands(inputs, out)["evaluate --protocol"]

    return [
        Killed(
            "compress",
            lambda out: compression(teacher, data, out),
            asdm.load_pipeline,
            ("unet/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*", "model_index.json"),
            ("profile.json", "plan.json", "evaluation.json", "report.html", "asdm.json", "README.md"),
        ),
        Killed("prepare-data", prepare, PreparedData, ("*.tar", "*.json")),
        Killed("export --to openvino", export, _require_exported),
        Killed("export --to checkpoint", one_file, lambda out: load_file(_only(out / "model.safetensors"))),
        Killed(
            "distill-decoder",
            decoder,
            lambda out: load_decoder(out / "decoder", tiny_pipeline()),
            ("decoder/*",),
            ("decoder.training/log.jsonl",),
        ),
        Killed(
            "evaluate --protocol",
            protocol,
            lambda out: ProtocolResults.load(out / "evaluation" / "evaluation.json"),
            ("**/*.png", "**/*.jpg", "**/features/*", "**/wins.html", "evaluation/evaluation.json"),
        ),
        Killed("demo-build", demo_build, lambda out: asdm.load_pipeline(_only(out / "pipeline")), ("pipeline/**/*",)),
    ]  # fmt: skip


def _only(path: Path) -> Path:
    if not path.exists():
        raise AsdmError(f"{path}: not there")
    return path


def _require_exported(out: Path) -> None:
    if read_marker(out).get("format") != "openvino":
        raise AsdmError(f"{out}: holds no graphs")


def demo_build(out: Path) -> Callable[[], None]:
    """Return a call of the embedded pipeline's build from its tokenizer to its folder, with few steps and images and
    a small UNet."""

    def call() -> None:
        few: dict[str, Any] = {"steps": DEMO_STEPS, "warmup_steps": 1, "checkpoint_every": 1}
        recipe.LOOPS.update({name: replace(loop, **few) for name, loop in recipe.LOOPS.items()})
        recipe.BATCH_SIZES.update(dict.fromkeys(recipe.BATCH_SIZES, 4))
        pairs = recipe.seen_pairs()[:DEMO_PAIRS]
        config = {name: value for name, value in recipe.make_unet().config.items() if not name.startswith("_")}
        config |= {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8}
        recipe.seen_pairs = lambda: pairs
        recipe.make_unet = lambda: UNet2DConditionModel(**config)
        for stage in DEMO_STAGES:
            demo_app([stage, "--folder", str(out)], standalone_mode=False)

    return call
