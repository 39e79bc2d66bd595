"""`distill`: the stages of a recipe, one after another, resumed where they were stopped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline

from asdm import checks
from asdm.data.prepared import digest_of, is_prepared, open_prepared, require_own_images
from asdm.devices import on_device
from asdm.diffusion.kinds import require_text_to_image
from asdm.diffusion.parameterization import parameterization_of
from asdm.distillation.incubation import blocks_in_teacher, require_blocks
from asdm.distillation.lora import low_rank
from asdm.distillation.recipes import recipe_stages, with_captions
from asdm.distillation.run import StageRun, require_launchable, train_stage
from asdm.distillation.stages import Stage
from asdm.distillation.tasks import make_task, semantic_parts
from asdm.distillation.training_set import TrainingSet, open_features, prepare
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_of, family_of, require_torch
from asdm.files import folder_lock
from asdm.measure.hooks import preserve_module_state
from asdm.measure.machine import fast_training
from asdm.training.launch import require_precision
from asdm.training.loop import Progress
from asdm.training.optimizers import require_installed


@checks.arguments(
    teacher=checks.PIPELINE,
    student=checks.UNET,
    data=checks.path,
    folder=checks.path,
    recipe=checks.path,
    steps=checks.TRAINING_STEPS,
    stages=checks.each(checks.a(Stage), least=1),
    captions=checks.path,
    device=checks.path,
    seed=checks.SEED,
    progress=checks.function,
)
@fast_training()
def distill(
    teacher: DiffusionPipeline,
    student: Denoiser,
    data: str | Path,
    folder: str | Path,
    *,
    recipe: str | Path = "joint",
    steps: int | None = None,
    stages: Sequence[Stage] | None = None,
    captions: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingSet:
    """Train `student` in place to predict what the teacher's denoiser predicts; resume from what is in `folder`.

    Under `accelerate launch` the processes share each step's batch, and the blocks that are incubated alone.

    Args:
        data: any source that `--data` takes, such as what `prepare_data` wrote.
        folder: gets the prepared latents and, for each stage, `log.jsonl`, TensorBoard events and the
            newest checkpoint; a run killed at any moment loses the steps since that checkpoint at most.
        recipe: "joint", "bk-sdm", "incubation", "small-gpu" or "lcm", of `steps` steps (1000 by default), or a YAML
            file, whose stages have their own. A student of "lcm" samples with `lcm_scheduler`.
        stages: the recipe in detail, instead of `recipe` and `steps`.
        captions: captions without images, on which the meaning of the student's predictions is compared with that of
            the teacher's, too: a .txt file, one a line, or "spliced", for splices of the data's captions.
        device: where stages with `teacher: recorded` are trained; by default where the student is. They hold what they
            train there, and keep teacher and student in the host's memory.
        progress: called after each step, in the first process, with `done` and `total` of all stages' steps, the
            losses and the `seconds` it took.

    Returns:
        What was trained on; `skipped` names the unusable items of the data with the reason.

    Raises:
        AsdmError: the data cannot be used, or another model generated its images, a loss is not finite, `folder` is of
            another run or one is at work there, teacher and student do not fit, the denoiser has inputs that no prompt
            brings, or the student's weights are not in float32.
    """
    require_text_to_image(teacher)
    denoiser = denoiser_of(teacher)
    require_fit(denoiser, student)
    _require_trainable(denoiser, student)
    if device is not None:
        on_device(torch.empty(0), device)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = recipe_stages(recipe, student, 1000 if steps is None else steps) if stages is None else list(stages)
    if captions is not None:
        stages = with_captions(stages, captions)
    networks = {
        "teacher": digest_of(denoiser),
        "student": digest_of(student),
        "predicts": parameterization_of(teacher.scheduler).description,
    }
    reading = [stage for stage in stages if stage.teacher == "recorded"]
    with folder_lock(folder), preserve_module_state(denoiser, teacher.vae):
        require_stages(teacher, stages, data, device)
        _require_student_for(teacher, student, stages)
        examples = prepare(teacher, data, folder / "prepared", recorded=bool(reading), seed=seed)
        total, before = sum(stage.steps for stage in stages), 0
        names = [stage.name for stage in stages]
        for index, stage in enumerate(stages):
            report = None if progress is None else partial(_report, progress, before, total)
            is_newest = not any(folder.glob(f"{index + 1:02d}-*"))
            place, earlier = folder / f"{index:02d}-{stage.name}", tuple(names[:index])
            run = StageRun(place, stage, seed, networks, is_newest, earlier, device)
            train_stage(teacher, student, examples, run, report)
            before += stage.steps
    student.eval().requires_grad_(False)
    student.disable_gradient_checkpointing()
    return examples


def require_fit(teacher: Denoiser, student: Denoiser) -> None:
    """Raise an AsdmError where the student reads or writes other tensors than the teacher."""
    for denoiser in (teacher, student):
        require_torch(denoiser)
    family, own = family_of(teacher), family_of(student)
    if own is not family:
        raise AsdmError(
            f"the student is a {own.label}, the teacher a {family.label}: it was not pruned from such a model; name "
            "the teacher that it was pruned from"
        )
    name = family.unlike(teacher, student)
    if name is not None:
        raise AsdmError(
            f"the student's {name} is {student.config[name]}, the teacher's {teacher.config[name]}: it was not pruned "
            "from such a model; name the teacher that it was pruned from"
        )


def _require_trainable(teacher: Denoiser, student: Denoiser) -> None:
    """Raise an AsdmError for a student that is the teacher, or is not in float32."""
    if student is teacher:
        raise AsdmError("the student is the teacher's own UNet, which stays as it is; give a copy of it")
    if student.dtype != torch.float32:
        raise AsdmError(
            f"a student in {student.dtype} cannot be trained; give it as student.float(), and choose the precision "
            "of the computation with a stage's mixed_precision"
        )


def require_stages(
    teacher: DiffusionPipeline, stages: Sequence[Stage], data: str | Path, device: str | None = None
) -> None:
    """Raise an AsdmError for a stage that requires what this teacher, this data or this machine has not, whatever the
    student: before any work.

    Args:
        device: as of `distill`.
    """
    if stages and is_prepared(data):
        require_own_images(teacher, data)
    for stage in stages:
        require_installed(stage.optimizer)
        require_blocks(stage.student_blocks or (), denoiser_of(teacher))
        require_launchable(stage, int(os.environ.get("WORLD_SIZE", "1")))
        is_recorded = stage.teacher == "recorded"
        require_precision(device if is_recorded and device is not None else teacher.device, stage.mixed_precision)
        if is_recorded and not is_prepared(data):
            raise AsdmError(
                f"stage {stage.name}: teacher=recorded, and {data} was not prepared; run asdm prepare-data MODEL "
                f"{data} --out PREPARED --teacher-features float16, and give PREPARED as the data"
            )
        if is_recorded:
            open_features(teacher, open_prepared(teacher, data)).require_drawn_for(stage)
        if stage.scope == "joint":
            semantic_parts(teacher, stage, _no_examples())


def _no_examples() -> TrainingSet:
    """Return what stands for the examples before any are prepared."""
    return TrainingSet(SimpleNamespace(captions=[""]), None)  # type: ignore[arg-type]


def _require_student_for(teacher: DiffusionPipeline, student: Denoiser, stages: Sequence[Stage]) -> None:
    """Raise an AsdmError for a stage that requires what this student has not: before the data is prepared and the
    stages before it are trained."""
    for stage in stages:
        with (
            blocks_in_teacher(student, denoiser_of(teacher), stage.blocks_in_teacher),
            low_rank(student, stage, None),
        ):
            make_task(teacher, student, _no_examples(), stage)


def _report(progress: Progress, before: int, total: int, row: dict[str, float]) -> None:
    progress(row | {"done": before + row["step"], "total": total})
