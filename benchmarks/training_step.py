"""What a distillation costs. Each command prints a table and writes its results.

python benchmarks/training_step.py step          # embedded pipeline: a step beside its necessary parts, measured
python benchmarks/training_step.py estimate      # SD 1.5's and SDXL's shape: memory and time on a GPU, computed
python benchmarks/training_step.py compare       # on a GPU: what is computed beside what is so
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from common import RESULTS, finish, run, without_second_layers
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import asdm
from asdm import checks
from asdm.data.batches import ShuffledBatches
from asdm.distillation.estimate import estimate as estimated
from asdm.distillation.stages import Stage
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import prepare
from asdm.errors import AsdmError
from asdm.families import BlockIO
from asdm.measure.hooks import outputs_of
from asdm.measure.latency import Latency, seconds_of
from asdm.measure.machine import fast_training
from asdm.measure.memory import peak_megabytes
from asdm.student.build import build_student
from asdm.training.launch import make_accelerator
from asdm.training.loop import train
from asdm.training.optimizers import OptimizerName
from asdm.training.task import BatchSlice

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SETUPS: list[tuple[int, bool, OptimizerName, bool]] = [  # GPUs, FSDP, optimiser, gradient checkpointing
    (1, False, "adamw", False),
    (1, False, "adamw8bit", True),
    (8, False, "adamw", False),
    (8, True, "adamw", True),
]


@app.command()
@fast_training()
def step(rounds: int = 12, batch_size: int = 32) -> None:
    """The loop's own steps beside the teacher's forward and the student's forward and backward alone, in turns; and
    what lives at the peak of a step beside the sum of what it cannot do without."""
    pipeline = asdm.load_pipeline("demo")
    student = build_student(pipeline.unet, without_second_layers(pipeline.unet))
    stage = Stage(name="joint", steps=rounds + 1, batch_size=batch_size, checkpoint_every=rounds + 1)
    shorter = stage.model_copy(update={"steps": 2})
    with tempfile.TemporaryDirectory() as folder:
        examples = prepare(pipeline, "demo", Path(folder) / "prepared")
        task = make_task(pipeline, student, examples, stage)
        run = partial(trained, task, ShuffledBatches(len(examples), batch_size, seed=0))
        parts = Parts(task, batch_size)
        rows = timed(partial(run, stage, Path(folder) / "timed"), parts)
        rows += counted(partial(run, shorter, Path(folder) / "counted"), parts)
    finish("training_step", rows, batch_size=batch_size, rounds=rounds)


def trained(
    task: Any, order: ShuffledBatches, stage: Stage, folder: Path, device: str = "cpu", **settings: Any
) -> None:
    accelerator = make_accelerator(device, stage.mixed_precision)
    train(task, lambda number: (order(number), number), stage.loop(0), folder, accelerator=accelerator, **settings)


class Parts:
    """What a step cannot do without, each alone, on one batch."""

    def __init__(self, task: Any, batch_size: int):
        self.task = task
        self.noised = task.noised(torch.arange(batch_size), torch.Generator().manual_seed(0), BatchSlice())

    @torch.no_grad()
    def teacher_forward(self) -> None:
        self.task.teacher_pred(self.noised)

    @torch.enable_grad()
    def student_forward_and_backward(self) -> None:
        F.mse_loss(self.task.student_pred(self.noised), self.noised.target).backward()
        self.task.student.zero_grad()

    def megabytes(self) -> dict[str, float]:
        """Weights, gradients, AdamW's moments, the average, what the student's forward and backward keep at their peak
        beside them, and the teacher's features."""
        teacher, student = (
            sum(p.numel() for p in unet.parameters()) for unet in (self.task.teacher, self.task.student)
        )
        counts = {"teacher": teacher, "student": student, "gradients": student, "moments": 2 * student}
        found = {name: 4 * count / 1e6 for name, count in (counts | {"average": student}).items()}
        handles = [
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            for p in self.task.student.parameters()
        ]
        found["activations"] = peak_megabytes(self.student_forward_and_backward)
        for handle in handles:
            handle.remove()
        with outputs_of(self.task.teacher, list(self.task.teacher_blocks.values())) as outputs:
            self.teacher_forward()
        io = BlockIO()
        features = sum(io.image_states(output).nbytes for output in outputs.values())
        return found | {"teacher's features": features / 1e6}


def timed(run: Callable[..., None], parts: Parts) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {"step": [], "teacher forward": [], "student forward and backward": []}

    def measure(row: dict[str, float]) -> None:
        alone = [seconds_of(parts.teacher_forward), seconds_of(parts.student_forward_and_backward)]
        if row["step"] > 1:  # the first is the warm-up
            for values, value in zip(seconds.values(), [row["seconds"], *alone], strict=True):
                values.append(value)

    run(progress=measure)
    times = {name: Latency.of(values) for name, values in seconds.items()}
    step, *alone = (t.ms for t in times.values())
    rows: list[dict[str, Any]] = [
        {"what": name, "ms": t.ms, "interval_ms": f"{t.low_ms:.0f}-{t.high_ms:.0f}"} for name, t in times.items()
    ]
    return [*rows, {"what": "step / the two alone", "ratio": step / sum(alone)}]


def counted(run: Callable[[], None], parts: Parts) -> list[dict[str, Any]]:
    necessary = parts.megabytes()
    peak = necessary["teacher"] + necessary["student"] + peak_megabytes(torch.enable_grad()(run))
    together = sum(necessary.values())
    return [
        *({"what": name, "megabytes": size} for name, size in necessary.items()),
        {"what": "sum of the parts", "megabytes": together},
        {"what": "peak of a step", "megabytes": peak, "ratio": peak / together},
    ]


@app.command()
def estimate(tflops: float = 100.0, steps: int = 50_000, batch_size: int = 64) -> None:
    """Memory of each GPU and time of a joint distillation in bfloat16, eight images at a time, of a UNet without the
    second layers of its stages; no weights are made."""
    rows = []
    for shape in ("sd15", "sdxl"):
        with FakeTensorMode():
            pipeline = asdm.load_pipeline(f"random:{shape}")
            student = build_student(pipeline.unet, without_second_layers(pipeline.unet))
        for gpus, sharded, optimizer, checkpointing in SETUPS:
            stage = estimated_stage(optimizer, checkpointing, steps, batch_size, gpus)
            found = estimated(pipeline, student, [stage], teraflops=tflops, processes=gpus, sharded=sharded)[0]
            setup = {"shape": shape, "gpus": gpus, "fsdp": sharded, "optimizer": optimizer}
            costs = {"step_tflop": found.step_teraflops, "days": found.seconds / 86400, "gb": found.gigabytes}
            memory = {part: size / 1e9 for part, size in found.memory.items()}
            rows.append({**setup, "checkpointing": checkpointing, **costs, **memory})
    finish("training_estimate", rows, tflops=tflops, steps=steps, batch_size=batch_size)


@app.command()
def compare(model: str = "sd15", steps: int = 6, images: int = 64) -> None:
    """Memory and time of a step on this GPU beside what `estimate` computed for one GPU; the first step, which warms
    up, is not counted."""
    path = RESULTS / "training_estimate.json"
    if not path.is_file():
        raise AsdmError(f"{path}: not there; the command estimate makes it")
    known = json.loads(path.read_text("utf-8"))
    checks.one_of(*dict.fromkeys(row["shape"] for row in known["rows"]))("model", model)
    pipeline = asdm.load_pipeline(f"random:{model}", device="cuda")
    student = build_student(pipeline.unet, without_second_layers(pipeline.unet))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        examples = prepare(pipeline, noise_images(Path(folder) / "images", images), Path(folder) / "prepared")
        for expected in known["rows"]:
            if expected["shape"] != model or expected["gpus"] > 1 or not installed(expected["optimizer"]):
                continue
            stage = estimated_stage(expected["optimizer"], expected["checkpointing"], steps, known["batch_size"])
            task = make_task(pipeline, student, examples, stage)
            order = ShuffledBatches(len(examples), stage.batch_size, seed=0)
            torch.cuda.reset_peak_memory_stats()
            seconds: list[float] = []
            trained(
                task,
                order,
                stage,
                Path(folder) / f"{len(rows)}",
                device="cuda",
                progress=lambda row, seconds=seconds: seconds.append(row["seconds"]),
            )
            peak = torch.cuda.max_memory_allocated() / 1e9
            step = statistics.median(seconds[1:])
            setup = {name: expected[name] for name in ("shape", "optimizer", "checkpointing")}
            found = {"gb": peak, "estimated_gb": expected["gb"], "step_seconds": step}
            rows.append({**setup, **found, "tflops": expected["step_tflop"] / step})
    finish("training_compared", rows, torch.device("cuda"), steps=steps, batch_size=known["batch_size"])


def installed(optimizer: str) -> bool:
    return optimizer != "adamw8bit" or importlib.util.find_spec("bitsandbytes") is not None


def estimated_stage(optimizer: OptimizerName, checkpointing: bool, steps: int, batch_size: int, gpus: int = 1) -> Stage:
    """In bfloat16, eight images at a time."""
    return Stage(
        name="joint",
        steps=steps,
        batch_size=batch_size,
        accumulation=batch_size // (8 * gpus),
        mixed_precision="bf16",
        optimizer=optimizer,
        checkpointing=checkpointing,
        checkpoint_every=steps,
    )


def noise_images(folder: Path, count: int) -> Path:
    """Return a folder of images with captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.effect_noise((64, 64), 64).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise, number {number}", "utf-8")
    return folder


if __name__ == "__main__":
    run(app)
