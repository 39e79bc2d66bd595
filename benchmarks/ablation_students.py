"""A recipe's student: its plan, its edits, the stages that train it, and the pipeline that it draws in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ablation_recipes import (
    BY_CLIP,
    EARLY,
    EXPERTS,
    ON_CAPTIONS,
    RECORDED,
    SETTLED,
    SWITCHED_BELOW,
    SWITCHING,
    WORK,
)
from diffusers import DiffusionPipeline, UNet2DConditionModel
from filelock import FileLock

import asdm
from asdm.benchmark.techniques import outer_self_attentions
from asdm.compensation.folding import fold_projections
from asdm.data.sources import open_data
from asdm.distillation.recipes import (
    CAPTION_MIXING,
    SEMANTIC_WEIGHT,
    SEMANTICS,
    WEIGHTS,
    default_hyperparameters,
    incubation_stages,
    with_captions,
)
from asdm.distillation.stages import LossWeights, Stage
from asdm.distillation.training_set import prepare
from asdm.edits import GriAttention, Remove
from asdm.files import write_text
from asdm.measure.latency import seconds_of
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan

MARGIN = 1.02  # for what expert kernels, GRI and projections cost: the plan is that much faster than the target
REFINE_ROUNDS = 4
EXPERT_PARAMETERS = 0.005  # of the teacher's parameters
DRAWS = 8192  # that are recorded


def plan_of(pipeline: DiffusionPipeline, target: float) -> PruningPlan:
    """Return the plan of a speed-up: removals of units alone, refined. GRI is a component here, and not the planner's
    choice."""
    path = SETTLED / f"plan-{target:g}.json"
    if not path.is_file():
        known = WORK / "redundancy.json"
        if not known.is_file():
            asdm.analyze(pipeline, data="demo", compensate="linear").save(known)
        redundancy = RedundancyMap.load(known).model_copy(update={"others": []})
        made = asdm.make_plan(redundancy, speedup=MARGIN * target, unet=pipeline.unet)
        SETTLED.mkdir(parents=True, exist_ok=True)
        asdm.refine_plan(pipeline, redundancy, made, data="demo", rounds=REFINE_ROUNDS).save(path)
    return PruningPlan.load(path)


def student_of(unet: UNet2DConditionModel, plan: PruningPlan, components: tuple[str, ...]) -> UNet2DConditionModel:
    """Return the student of the plan's removals, and of what the components add to them."""
    kind = "linear" if "compensation" in components else "none"
    removals = [Remove(unit=edit.unit, compensate=kind) for edit in plan.edits if isinstance(edit, Remove)]
    edits: list[Any] = list(removals)
    if "gri" in components:
        gone = [edit.unit for edit in removals]
        outer = outer_self_attentions(unet)
        kept = [name for name in outer if not any(name == unit or name.startswith(f"{unit}.") for unit in gone)]
        edits += [GriAttention(unit=name, regions=2, pool=2, weighted=True) for name in kept]
    full = PruningPlan.for_unet(unet, edits)
    for router in (router for name, router in EXPERTS.items() if name in components):
        full = asdm.add_cond_conv(full, unet, params=EXPERT_PARAMETERS, router=router)
    return build_student(unet, full)


def folded_student_of(
    unet: UNet2DConditionModel, plan: PruningPlan, components: tuple[str, ...]
) -> UNet2DConditionModel:
    """Return the untrained student in the shape that `train` leaves it in."""
    student = student_of(unet, plan, components)
    fold_projections(student)
    return student


def stages_of(student: UNet2DConditionModel, components: tuple[str, ...], steps: int) -> list[Stage]:
    """Return the stages of so many steps in all that train a student by its components."""
    weights = WEIGHTS if "normalised" in components else LossWeights()
    changes: dict[str, Any] = {
        "relative": "normalised" in components,
        "feature_weighting": "spatial" if "normalised" in components else "block",
        "timestep_sampling": "uniform_angle" if "normalised" in components else "uniform",
        "min_timestep_fraction": SWITCHED_BELOW if EARLY in components else 0.0,
        "caption_mixing": CAPTION_MIXING if "splice" in components else 0.0,
        "optimizer": "muon" if "muon" in components else "adamw",
        "losses": weights.model_copy(update={"semantic": SEMANTIC_WEIGHT if "sas" in components else 0.0}),
        "semantics": SEMANTICS,
        "teacher": "recorded" if RECORDED in components else "live",
    }
    if "incubation" in components:
        stages = incubation_stages(student, steps)
    else:
        stages = [Stage(name="joint", **default_hyperparameters(student, steps))]
    stages = [stage.model_copy(update=changes) for stage in stages]
    if ON_CAPTIONS in components or BY_CLIP in components:
        stages = with_captions(stages, _captions())
    return [_by_clip(stage) for stage in stages] if BY_CLIP in components else stages


def _by_clip(stage: Stage) -> Stage:
    """Return a stage whose captions without images are also compared with what the student's x_0 estimates show, by
    the CLIP beside the pipeline."""
    losses = stage.losses.model_copy(update={"caption_text": SEMANTIC_WEIGHT})
    return stage.model_copy(update={"losses": losses, "semantics": SEMANTICS.model_copy(update={"encoder": "clip"})})


def _captions() -> Path:
    """Write and return a file of captions to supervise without images: all but those that the judge looks at."""
    path = WORK / "captions.txt"
    examples = [each for each in open_data("demo", "all").examples if not each.held_out or each.held_out_kind]
    write_text(path, "".join(f"{each.caption}\n" for each in examples))
    return path


def recorded(pipeline: DiffusionPipeline, stages: list[Stage]) -> tuple[Path, float]:
    """Return a folder of prepared data with the teacher's predictions, and how many seconds it took to record them."""
    folder, timed = WORK / "recorded", WORK / "recorded.json"
    with FileLock(WORK / "recorded.lock"):
        if not timed.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            prepare(pipeline, "demo", folder)
            seconds = seconds_of(lambda: asdm.record_teacher(pipeline, folder, stages=stages, draws=DRAWS))
            write_text(timed, json.dumps(round(seconds, 1)))
    return folder, json.loads(timed.read_text("utf-8"))


def train(
    pipeline: DiffusionPipeline,
    student: UNet2DConditionModel,
    components: tuple[str, ...],
    steps: int,
    seed: int,
    folder: Path,
) -> None:
    """Fit a student's projections, train it, and fold the projections."""
    if "compensation" in components:
        asdm.fit_compensation(pipeline, student, data="demo", seed=seed)
    if steps:
        stages = stages_of(student, components, steps)
        data = recorded(pipeline, stages)[0] if RECORDED in components else WORK / "prepared"
        asdm.distill(pipeline, student, data, folder, stages=stages, seed=seed)
    asdm.fold_compensation(student)


def drawing_pipeline(pipeline: DiffusionPipeline, student: UNet2DConditionModel, name: str) -> DiffusionPipeline:
    """Return what draws a recipe's images: the student, or the student and then the original."""
    if not name.endswith(SWITCHING):
        return asdm.with_unet(pipeline, student)
    return asdm.switch_unets(pipeline, [student, pipeline.unet], below=[SWITCHED_BELOW])
