"""Distillation of a whole student pipeline: its denoiser, and the scheduler that it then samples with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from asdm.compensation.folding import fold_compensation
from asdm.diffusion.generation import is_few_step
from asdm.distillation.consistency import lcm_scheduler
from asdm.distillation.distill import distill
from asdm.distillation.stages import Stage
from asdm.distillation.training_set import TrainingSet
from asdm.families import component_of, denoiser_of
from asdm.training.loop import Progress


def distill_pipeline(
    teacher: DiffusionPipeline,
    student: DiffusionPipeline,
    data: str | Path,
    folder: str | Path,
    *,
    stages: Sequence[Stage],
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TrainingSet:
    """Train the student's denoiser in place (`distill`) and fold its compensations (`fold_compensation`).

    After a last stage of consistency the student samples by `lcm_scheduler`. If it did so before another last stage, it
    samples by its teacher's scheduler.
    """
    denoiser = denoiser_of(student)
    examples = distill(teacher, denoiser, data, folder, stages=stages, device=device, seed=seed, progress=progress)
    student.register_modules(**{component_of(student): fold_compensation(denoiser)})
    last, sampler = stages[-1], teacher.scheduler
    if last.scope == "consistency":
        student.scheduler = lcm_scheduler(sampler.config, last.consistency.solver_steps)
    elif is_few_step(student):
        student.scheduler = type(sampler).from_config(sampler.config)
    return examples
