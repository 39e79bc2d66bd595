"""What a recipe will cost, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline, UNet2DConditionModel

from asdm.evaluation.latency import measure_interleaved, unet_call
from asdm.incubation.blocks import assembled, incubated_blocks, narrowed
from asdm.incubation.stages import Stage

BACKWARD = 2  # a backward pass takes about two forward ones


@dataclass(frozen=True)
class StageEstimate:
    """A stage's cost: `seconds` for all its steps, `gigabytes` of weights, gradients, moments and averages, without
    the activations, which depend on the batch and on gradient checkpointing."""

    stage: Stage
    trained_parameters: int
    seconds: float
    gigabytes: float


def estimate(teacher: DiffusionPipeline, student: UNet2DConditionModel, stages: Sequence[Stage]) -> list[StageEstimate]:
    """Estimates from a timed UNet call of each network; the student's `requires_grad` is left as it was."""
    calls = {"teacher": unet_call(teacher.unet, batch_size=1), "student": unet_call(student, batch_size=1)}
    times = measure_interleaved(calls, rounds=3, warmup=1, device=student.device)
    forward = {name: time.median_ms / 1000 for name, time in times.items()}
    frozen_bytes = sum(p.numel() * p.element_size() for p in teacher.unet.parameters())
    student_bytes = sum(p.numel() * p.element_size() for p in student.parameters())
    wanted = {name: p.requires_grad for name, p in student.named_parameters()}
    rows = []
    for stage in stages:
        trained = _trained_parameters(teacher.unet, student, stage)
        a_sample = forward["teacher"] + (1 + BACKWARD) * forward["student"]
        branches = 2 if stage.guidance_scale is not None else 1
        moments = 4 if stage.optimizer == "muon" else 8
        by_parameter = 4 + moments + (4 if stage.ema_decay else 0)
        rows.append(
            StageEstimate(
                stage=stage,
                trained_parameters=trained,
                seconds=stage.steps * stage.batch_size * branches * a_sample,
                gigabytes=(frozen_bytes + student_bytes + trained * by_parameter) / 1e9,
            )
        )
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(wanted[name])
    return rows


def _trained_parameters(teacher: UNet2DConditionModel, student: UNet2DConditionModel, stage: Stage) -> int:
    with assembled(student, teacher, stage.assembled):
        narrowed(student, stage.trained)
        teachers = {id(p) for p in teacher.parameters()}
        moving = {id(p) for p in student.parameters() if p.requires_grad and id(p) not in teachers}
        if stage.scope == "incubate":
            moving &= {id(p) for name in incubated_blocks(student) for p in student.get_submodule(name).parameters()}
        count = sum(p.numel() for p in student.parameters() if id(p) in moving)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return count
