"""A stage as it runs: what its folder says it belongs to, and its training by the processes of the launch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline
from torch import nn

from asdm.data.batches import ShuffledBatches
from asdm.digests import short_digest
from asdm.distillation.incubation import blocks_in_teacher, chosen_blocks
from asdm.distillation.lora import low_rank
from asdm.distillation.stages import Stage
from asdm.distillation.tasks import make_task
from asdm.distillation.teaching import WHOLE, Batch
from asdm.distillation.training_set import TrainingSet
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_of
from asdm.files import read_settings, write_text
from asdm.old_names import renamed_stage
from asdm.training.checkpoints import require_same_run
from asdm.training.launch import make_accelerator
from asdm.training.loop import Progress, train
from asdm.training.optimizers import require_shardable
from asdm.training.sharding import is_sharding_requested
from asdm.training.task import BatchSlice

# These settings may change when a stage is resumed, to run on another machine or to save a run that diverged.
CHANGEABLE = {"learning_rate", "warmup_steps", "checkpoint_every", "accumulation", "checkpointing", "mixed_precision"}

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StageRun:
    """A stage as it is trained in a folder; `networks` are digests of the teacher and the student that it began with,
    and what they predict; it is the newest where no later stage has begun; `before` are the names of the stages before
    it. `device` is where a stage without a teacher is trained, by default the student's."""

    folder: Path
    stage: Stage
    seed: int
    networks: dict[str, str]
    is_newest: bool
    before: tuple[str, ...] = ()
    device: str | None = None

    def claim(self, student: Denoiser, examples: TrainingSet) -> None:
        """Write beside the stage's checkpoints whose they are, or check that they are this run's; the newest stage may
        be lengthened.

        Raises:
            AsdmError: they are another's.
        """
        settings = self._settings(student, examples)
        path = self.folder / "run.json"
        if path.is_file():
            # A setting that an earlier version did not have has its default.
            defaults = _fields(Stage(name=self.stage.name, steps=0))
            saved = renamed_stage(read_settings(path))
            kept = {name: settings[name] for name in ("predicts", "stages_before", "images")}
            known = kept | defaults | saved
            if isinstance(known["losses"], dict):
                known["losses"] = defaults["losses"] | known["losses"]
            require_same_run(self.folder, known, json.loads(json.dumps(settings)), may_lengthen=self.is_newest)
        write_text(path, json.dumps(settings, indent=1) + "\n")

    def _settings(self, student: Denoiser, examples: TrainingSet) -> dict[str, Any]:
        """Return all that a checkpoint's weights depend on."""
        recorded = [examples.recorded.identity] if examples.recorded and self.stage.teacher == "recorded" else []
        return {
            "seed": self.seed,
            "edits": student.config.get("edits") or [],
            "data": [*examples.prepared.identity, *recorded],
            "images": short_digest(examples.prepared.first_latents()),
            **self.networks,
            "stages_before": list(self.before),
            **{name: value for name, value in _fields(self.stage).items() if name not in CHANGEABLE},
        }


def _fields(stage: Stage) -> dict[str, Any]:
    """Return a stage's fields; `teacher` as `teacher_is`, as `teacher` is the digest of its weights."""
    fields = stage.model_dump(mode="json")
    return {"teacher_is" if name == "teacher" else name: value for name, value in fields.items()}


def require_launchable(stage: Stage, processes: int) -> None:
    """Raise an AsdmError for a stage that so many processes cannot share, as they were launched."""
    if processes == 1:
        return
    if stage.trained == "lora" and is_sharding_requested():
        raise AsdmError(f"stage {stage.name}: trained=lora: not under FSDP; launch without FSDP")
    if stage.scope == "incubate":  # its blocks are divided, not its batch
        return
    BatchSlice(0, processes * stage.accumulation).of(stage.batch_size)
    if is_sharding_requested():
        require_shardable(stage.optimizer)
        _require_captions_in_all_parts(stage, processes * stage.accumulation)


def _require_captions_in_all_parts(stage: Stage, parts: int) -> None:
    """Raise an AsdmError where some parts of a batch would run the student once more than others: under FSDP they would
    wait for each other."""
    if stage.scope != "joint" or not stage.losses.any_reads("captions", "caption_semantics"):
        return
    if not all(stage.caption_rows(stage.batch_size, BatchSlice(index, parts)) for index in range(parts)):
        raise AsdmError(
            f"stage {stage.name}: caption_only.share={stage.caption_only.share:g}: under FSDP each of {parts} parts "
            f"of a batch needs one; give at least {parts / stage.batch_size:g}"
        )


def train_stage(
    teacher: DiffusionPipeline, student: Denoiser, examples: TrainingSet, run: StageRun, progress: Progress | None
) -> None:
    """Train a stage, or what is left of it.

    Raises:
        AsdmError: the folder is of another run, a loss is not finite, or the stage is not possible.
    """
    stage, is_live = run.stage, run.stage.teacher == "live"
    device = teacher.device if is_live else torch.device(run.device or student.device)
    accelerator = make_accelerator(device, stage.mixed_precision, some_unused=stage.leaves_weights_unused)
    is_spread = stage.scope == "incubate" and accelerator.num_processes > 1
    share = BatchSlice(accelerator.process_index, accelerator.num_processes) if is_spread else WHOLE
    if accelerator.is_main_process:
        run.claim(student, examples)
    accelerator.wait_for_everyone()
    _require_one_precision(teacher, student, stage, accelerator)
    if is_live:
        order = ShuffledBatches(len(examples), stage.batch_size, run.seed)
    else:
        assert examples.recorded is not None
        order = ShuffledBatches(len(examples.recorded), stage.batch_size, run.seed, first_in_order=True)
    with (
        nullcontext() if is_live else _on_host(teacher, student),
        blocks_in_teacher(student, denoiser_of(teacher), stage.blocks_in_teacher),
        low_rank(student, stage, HALF.get(accelerator.mixed_precision)) as changes,
    ):
        task = make_task(teacher, student, examples, stage, share)
        if task.trained():  # there may be more processes than blocks
            train(
                task,
                partial(_batch_of, order),
                stage.loop(run.seed),
                run.folder / f"process-{share.index}-of-{share.count}" if is_spread else run.folder,
                accelerator=accelerator,
                alone=is_spread,
                progress=progress if accelerator.is_main_process else None,
            )
        if is_spread:
            _share_blocks(student, accelerator, stage)
        if changes is not None:
            changes.merge()


@contextmanager
def _on_host(teacher: DiffusionPipeline, student: Denoiser) -> Iterator[None]:
    """Keep the teacher's pipeline and the student in the host's memory, from which a task moves what it trains; then
    bring them back to where they were."""
    parts = (*teacher.components.values(), student)
    modules = [part for part in parts if isinstance(part, nn.Module) and any(True for _ in part.parameters())]
    places = [(module, next(module.parameters()).device) for module in modules]
    for module, _ in places:
        module.to("cpu")
    try:
        yield
    finally:
        for module, device in places:
            module.to(device)


def _require_one_precision(
    teacher: DiffusionPipeline, student: Denoiser, stage: Stage, accelerator: Accelerator
) -> None:
    """Raise an AsdmError where blocks of two dtypes would feed each other."""
    dtype = denoiser_of(teacher).dtype
    if stage.student_blocks is not None and dtype != student.dtype and accelerator.mixed_precision == "no":
        raise AsdmError(
            f"stage {stage.name}: the teacher is in {dtype}, and its blocks run together with the student's in "
            "float32; load it in float32, or give the stage a mixed_precision"
        )


def _share_blocks(student: Denoiser, accelerator: Accelerator, stage: Stage) -> None:
    """Give all processes the blocks that each of them has incubated."""
    for number, name in enumerate(chosen_blocks(stage, student)):
        block = student.get_submodule(name).to(accelerator.device)  # recorded calls leave others' on the host
        for tensor in block.state_dict().values():
            broadcast(tensor, from_process=number % accelerator.num_processes)


def _batch_of(order: ShuffledBatches, step: int) -> Batch:
    return order(step), step
