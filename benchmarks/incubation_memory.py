"""What progressive incubation saves: peak memory and time of a step at SD 1.5's shape, beside the joint stage.

python benchmarks/incubation_memory.py            # on the CPU, float32, batch 1, random weights
python benchmarks/incubation_memory.py --no-times # memory alone, where other work takes the cores

Each way of training runs in a process of its own. Its memory is the peak of the resident set beside what it was before
the first tensor was made. Weights that a way does not use are never filled, so they are not resident. The memory of a
GPU is computed by `asdm.distillation.estimate`.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import typer
from common import RESULTS, console, earlier_rows, machine, run, write_rows
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import asdm
from asdm.data.draws import Draws
from asdm.diffusion.parameterization import parameterization_of
from asdm.distillation.estimate import estimate
from asdm.distillation.incubation import incubated_blocks
from asdm.distillation.lora import low_rank
from asdm.distillation.recorded import FeatureKey, Recorded, read_index
from asdm.distillation.recording import Recorder
from asdm.distillation.stages import Stage
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import TrainingSet
from asdm.distillation.weightless import weightless, weightless_examples
from asdm.families import family_of
from asdm.files import write_text
from asdm.pipelines.derived import with_unet
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan
from asdm.training.optimizers import make_optimizer
from asdm.training.task import BatchSlice

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GPUS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80)  # GB
MARGIN = 1.15  # of free memory over what is estimated
OVERHEAD = 1.0  # GB of a GPU for its context and its kernels' workspaces, beside tensors
SAMPLING = {"caption_dropout": 0.1, "caption_mixing": 0.0, "timestep_sampling": "uniform", "min_timestep_fraction": 0.0}
BASE = Stage(name="joint", steps=1, batch_size=1, ema_decay=0, **SAMPLING)
INCUBATE = BASE.model_copy(update={"scope": "incubate"})
RECORDED = {"teacher": "recorded"}
ONE_BLOCK = "one block"  # after another; the row is that of the largest block
WAYS = {
    f"{ONE_BLOCK}, recorded": INCUBATE.model_copy(update=RECORDED),
    ONE_BLOCK: INCUBATE,
    "all blocks": INCUBATE,
    "joint": BASE,
    "joint, recorded": BASE.model_copy(update=RECORDED),
    "joint, recorded, LoRA": BASE.model_copy(update={**RECORDED, "trained": "lora", "lora_rank": 64}),
}


@app.command()
def main(shape: str = "sd15", rounds: int = 1, again: bool = False, times: bool = True) -> None:
    """Compute the memory of all ways and measure those that fit; what was measured before on this machine, by the same
    settings, is measured again only with --again, and then the fastest step stays."""
    make, name, today = Models(shape), f"incubation_memory_{shape}", machine()
    settings = {"shape": shape, "rounds": rounds, "batch_size": 1, "dtype": "float32", "machine": today["machine"]}
    block = max(make.blocks, key=lambda name: sum(p.numel() for p in make.student.get_submodule(name).parameters()))
    blocks = {way: block if way.startswith(ONE_BLOCK) else None for way in WAYS}
    rows = [known(name, {"way": way, "block": blocks[way], **settings}) for way in WAYS]
    with tempfile.TemporaryDirectory() as folder:
        in_child(record, make, Path(folder))
        for row in rows:
            before = dict(row)
            for is_gpu in (True, False):
                if again or ("gpu_gb" if is_gpu else "estimated_mb") not in row:
                    row |= in_child(estimated, make, row["way"], row["block"], is_gpu)
            wanted = {"peak_mb", "step_seconds"} if times else {"peak_mb"}
            if again or not wanted <= row.keys():
                found = measured(make, row, rounds, Path(folder))
                row |= {column: value for column, value in found.items() if column in wanted}
            if again or row != before:
                row["date"] = today["date"]
            done = [row for row in rows if "date" in row]
            write_rows(name, done)
            write_text(RESULTS / f"{name}.md", markdown(done))


def known(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the results that was measured with these settings; one that has nothing else where none was."""
    return next((row for row in earlier_rows(name) if settings.items() <= row.items()), settings)


def measured(make: Models, row: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Return a way's peak memory and the seconds of its step, by a process of its own; nothing where it does not
    fit."""
    free = psutil.virtual_memory().available / 1e6
    if free < MARGIN * row["estimated_mb"]:
        console.print(f"{row['way']}: not measured, needs about {row['estimated_mb']} MB and {free:.0f} MB are free")
        return {}
    found = in_child(measure, make, row["way"], row["block"], rounds, folder)
    found["step_seconds"] = min(found["step_seconds"], row.get("step_seconds", found["step_seconds"]))
    return found


class Models:
    """A teacher and a student without the second and third layers of its levels; their weights are not filled."""

    def __init__(self, shape: str):
        with FakeTensorMode():
            self.pipeline = asdm.load_pipeline(f"random:{shape}")
        self.unet: UNet2DConditionModel = self.pipeline.unet
        self.parameterization = parameterization_of(self.pipeline.scheduler)
        units = [unit.name for unit in family_of(self.unet).units(self.unet)]
        last = (".resnets.1", ".resnets.2", ".attentions.1", ".attentions.2")
        edits = [asdm.Remove(unit=name) for name in units if name.endswith(last) and not name.startswith("mid_block")]
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.student = build_student(self.unet, PruningPlan.for_unet(self.unet, edits))
        self.blocks = incubated_blocks(self.student)


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a module random weights of variance 1 / fan-in, whose rows are multiples of one row, and zero biases: memory
    and time do not depend on them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                row = torch.randn(parameter.shape[1:], generator=generator) * parameter[0].numel() ** -0.5
                factors = torch.randn(len(parameter), *[1] * row.ndim, generator=generator)
                torch.mul(factors, row, out=parameter)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a process of its own, which is the first to end if memory runs out."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")
        sender.send(function(*arguments))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{arguments[1:]}: its process ended with {process.exitcode}") from None
    finally:
        process.join()


@torch.no_grad()
def record(make: Models, folder: Path) -> None:
    """Record two draws, with the inputs of all blocks."""
    unet = filled(weightless(make.unet))
    stage = INCUBATE
    key = FeatureKey(
        teacher="", predicts="", data="", dtype="float16", inputs=True, sampling=SAMPLING, batch_size=1, seed=0
    )
    recorder = Recorder(unet, make.parameterization, weightless_examples(unet), stage, key, folder, False)
    for number in range(2):
        tensors = recorder.answers(torch.tensor([number]), torch.Generator().manual_seed(number), BatchSlice())
        recorder.files.write(number, {name: tensor[0] for name, tensor in tensors.items()})
    (folder / "index.json").write_text(recorder.index(2).model_dump_json(), "utf-8")


def measure(make: Models, name: str, block: str | None, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the peak memory in MB and the seconds of a step, after one that warms up."""
    stage, index = WAYS[name], read_index(folder)
    recorded = Recorded(index, Draws(folder, "float16", index.reduced))
    before = resident("VmRSS")
    unet, student = weightless(make.unet), weightless(make.student)
    if stage.teacher == "live":
        filled(unet)
    filled(student.get_submodule(block) if block is not None and stage.teacher == "recorded" else student)
    chosen = stage if block is None else stage.model_copy(update={"student_blocks": [block]})
    examples = replace(weightless_examples(unet), recorded=recorded)
    seconds = fastest_step(make, unet, student, chosen, examples, rounds)
    return {"peak_mb": round(resident("VmHWM") - before), "step_seconds": round(seconds, 2)}


def fastest_step(make: Models, unet: Any, student: Any, stage: Stage, examples: TrainingSet, rounds: int) -> float:
    """Return the seconds of the fastest step; the first, which makes the optimiser's moments, does not count."""
    seconds = []
    with low_rank(student, stage, None):
        task = make_task(with_unet(make.pipeline, unet), student, examples, stage)
        task.train()
        weights = task.trained()
        optimizer = make_optimizer(weights, "adamw", 1e-5, (0.9, 0.999), 0.01, {})
        for step in range(1 + rounds):
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(step)
            task((torch.tensor([step % 2]), step), generator)["loss"].backward()
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def resident(field: str) -> float:
    """Return the resident set of this process in MB: VmRSS, now; VmHWM, at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def estimated(make: Models, name: str, block: str | None, is_gpu: bool) -> dict[str, Any]:
    """Return the memory that is computed: on a GPU in bfloat16, or in float32 as measured here."""
    stage = WAYS[name].model_copy(update={"mixed_precision": "bf16" if is_gpu else "no"})
    if block is not None:
        stage = stage.model_copy(update={"student_blocks": [block]})
    memory = {**estimate(make.pipeline, make.student, [stage], teraflops=1.0)[0].memory, "encoders": 0}
    gigabytes = sum(memory.values()) / 1e9
    if not is_gpu:
        return {"estimated_mb": round(1e3 * gigabytes)}
    return {
        "gpu_gb": round(gigabytes, 2),
        "smallest_gpu_gb": next(size for size in GPUS if size >= gigabytes + OVERHEAD),
        "gpu_parts": {part: round(size / 1e9, 3) for part, size in memory.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| way | peak, MB | estimated, MB | a step, s | GPU, GB of tensors | smallest GPU, GB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = row["way"] if row["block"] is None else f"{row['way']} (`{row['block']}`)"
        columns = ("peak_mb", "estimated_mb", "step_seconds", "gpu_gb", "smallest_gpu_gb")
        lines.append(f"| {what} | {' | '.join(str(row.get(column, '')) for column in columns)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(app)
