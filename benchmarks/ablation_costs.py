"""What a recipe's steps cost, and how many of them cost as much as those of BK-SDM's recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from ablation_recipes import (
    COMPONENTS,
    RECORDED,
    SETTLED,
    UNTRAINED,
    base_name,
    length_of,
    planned_speedup,
    variants,
)
from ablation_students import plan_of, recorded, stages_of, student_of
from diffusers import DiffusionPipeline, UNet2DConditionModel

import asdm
from asdm.data.batches import ShuffledBatches
from asdm.distillation.recipes import SEMANTICS
from asdm.distillation.stages import Stage
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import TrainingSet, prepare
from asdm.files import write_text
from asdm.measure.latency import measure_interleaved, seconds_of
from asdm.training.launch import make_accelerator
from asdm.training.optimizers import make_optimizer

COST_ROUNDS = 5
FIT = "fit of the compensation"
RECORDING = "recording of the teacher"
LOOKING = ("semantic", "caption_semantic", "caption_text")  # losses of every few steps


def steps_of_equal_cost(
    examples: TrainingSet,
    student: UNet2DConditionModel,
    name: str,
    components: tuple[str, ...],
    target: float,
) -> int:
    """Return how many steps cost the same as those of BK-SDM's recipe at the target; the fit before them counts,
    too."""
    if name == UNTRAINED:
        return 0
    length = length_of(name, target)
    seconds = length * costs_of_steps(examples, target)["bk-sdm, joint"]
    costs = costs_of_steps(examples, planned_speedup(name, target))
    seconds -= costs[FIT] if "compensation" in components else 0.0
    seconds -= costs[RECORDING] if RECORDED in components else 0.0
    kinds = _kinds_of_step(name, stages_of(student, components, length))
    return round(seconds / sum(costs[kind] * share for kind, (_, share) in kinds.items()))


def costs_of_steps(examples: TrainingSet, target: float) -> dict[str, float]:
    """Return the seconds of each kind of step (`_kinds_of_step`) on the CPU, measured in turns with all others, and of
    what is done once before them."""
    path = SETTLED / f"seconds-a-step-{target:g}.json"
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    pipeline = asdm.load_pipeline("demo")
    calls: dict[str, Callable[[], Any]] = {}
    once: dict[str, float] = {}
    plan = plan_of(pipeline, target)
    for name, components in variants(target).items():
        if name == base_name(name):
            student = student_of(pipeline.unet, plan, components)
            stages, given = stages_of(student, components, 1000), examples
            if RECORDED in components:
                folder, once[RECORDING] = recorded(pipeline, stages)
                given = prepare(pipeline, folder, folder, recorded=True)
            for kind, (stage, _) in _kinds_of_step(name, stages).items():
                calls[kind] = _step_of(pipeline, student, given, stage)
    times = measure_interleaved(calls, rounds=COST_ROUNDS, warmup=1)
    student = student_of(pipeline.unet, plan, COMPONENTS)
    once[FIT] = round(seconds_of(lambda: asdm.fit_compensation(pipeline, student, data="demo")), 1)
    found = {kind: round(times[kind].ms / 1000, 4) for kind in calls} | once
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def _kinds_of_step(name: str, stages: list[Stage]) -> dict[str, tuple[Stage, float]]:
    """Return the steps of a recipe that cost differently, by scope and whether the semantic loss is looked at: a
    stage of that kind, and the kind's share of the steps."""
    steps, looks = sum(stage.steps for stage in stages), 1 / SEMANTICS.every
    found: dict[str, tuple[Stage, float]] = {}
    for stage in stages:
        plain = stage.model_copy(update={"losses": stage.losses.model_copy(update=dict.fromkeys(LOOKING, 0.0))})
        looking = stage.scope == "joint" and any(getattr(stage.losses, loss) for loss in LOOKING)
        for suffix, each, part in (("", plain, 1 - looks * looking), (", semantic", stage, looks * looking)):
            if part:
                kind = f"{base_name(name)}, {stage.scope}{suffix}"
                share = found[kind][1] if kind in found else 0.0
                found[kind] = (each, share + part * stage.steps / steps)
    return found


def _step_of(
    pipeline: DiffusionPipeline, student: UNet2DConditionModel, examples: TrainingSet, stage: Stage
) -> Callable[[], None]:
    """Return a training step of the stage: forward, backward, optimiser."""
    task = make_task(pipeline, student, examples, stage)
    wanted = set(task.trained())
    indices = ShuffledBatches(len(examples), stage.batch_size, 0)(0)
    accelerator = make_accelerator(pipeline.device, stage.mixed_precision)

    def step() -> None:
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(name in wanted)
        optimizer = make_optimizer(task.trained(), stage.optimizer, 1e-9, (0.9, 0.99), 0.0, {})
        with torch.enable_grad(), accelerator.autocast():
            loss = task((indices, 0), torch.Generator().manual_seed(0))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
