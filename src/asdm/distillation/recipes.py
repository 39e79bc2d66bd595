"""Recipes: lists of stages by name or from a file, with hyperparameters that suit the student's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from asdm.distillation.caption_only import read_captions
from asdm.distillation.incubation import groups_of, incubated_blocks
from asdm.distillation.stages import Consistency, LossWeights, Semantics, Stage, parse_stages
from asdm.errors import AsdmError, one_line
from asdm.families import Denoiser, family_of
from asdm.reading import parse_yaml

SMALL_MODEL_PARAMETERS = 50_000_000
SEMANTIC_WEIGHT = 0.3
SEMANTICS = Semantics(every=4)
CAPTION_MIXING = 0.7
SPLICED = "spliced"  # captions without images: splices of the data's
# The blocks' features weigh most and the denoising task least: its target does not know that a caption was mixed.
WEIGHTS = LossWeights(task=0.3, output=1.0, feature=10.0)
INCUBATING = 0.05  # of the steps, and as many train groups in the teacher: a block alone learns soon what it can
SHORTEST_ASSEMBLY = 40
SMALL_GPU_RANK = 64


def _is_small(student: Denoiser) -> bool:
    return sum(p.numel() for p in student.parameters()) <= SMALL_MODEL_PARAMETERS


def _batches(student: Denoiser) -> dict[str, Any]:
    """Fields that say what a batch consists of. Time steps by angle suit v-prediction, and the small UNet learns better
    by them; most large ones predict epsilon, whose errors near pure noise weigh more than they look."""
    sampling = "uniform_angle" if _is_small(student) else "uniform"
    return {"caption_mixing": CAPTION_MIXING, "timestep_sampling": sampling}


def default_hyperparameters(student: Denoiser, steps: int) -> dict[str, Any]:
    """Fields of a stage of so many steps: BK-SDM's hyperparameters (arXiv 2305.15798, Sec. 4.1), or higher learning
    rates for denoisers of up to 50M parameters."""
    if not _is_small(student):
        return {"steps": steps, "batch_size": 8, "learning_rate": 5e-5, "mixed_precision": "auto"}
    return {
        "steps": steps,
        "batch_size": 32,
        "optimizer": "muon",
        "learning_rate": 4e-4,
        "warmup_steps": min(20, steps // 4),
        "schedule": "cosine",
        "ema_decay": 0.99,
        "checkpoint_every": 50,
        "mixed_precision": "auto",
    }


def joint_stages(student: Denoiser, steps: int) -> list[Stage]:
    """Return the whole student at once, on the task, the teacher's output and features, each relative to the mean
    square of what it is compared with."""
    return [Stage(name="joint", losses=WEIGHTS, **_batches(student), **default_hyperparameters(student, steps))]


def bk_sdm_stages(student: Denoiser, steps: int) -> list[Stage]:
    """Return the recipe that BK-SDM made common (arXiv 2305.15798, Sec. 3.2): the same losses, plain, all of weight
    1, all blocks alike."""
    return [Stage(name="bk-sdm", relative=False, feature_weighting="block", **default_hyperparameters(student, steps))]


def incubation_stages(student: Denoiser, steps: int) -> list[Stage]:
    """Progressive incubation (inferred): the edited blocks each alone inside the teacher, then put in its place one
    after another with a short distillation, then the whole with semantic-aware supervision.

    A twentieth of the steps incubate and as many train groups in the teacher, unless that leaves a group less than
    `SHORTEST_ASSEMBLY`, in which no optimiser makes progress; the rest is joint. A semantic loss costs a second call of
    the teacher, which every fourth step can afford.
    """
    groups, batches = groups_of(student), _batches(student)
    stages = []
    if incubated_blocks(student):
        shared = batches | default_hyperparameters(student, round(INCUBATING * steps))
        stages.append(Stage(name="incubate", scope="incubate", **shared))
    each = round(INCUBATING * steps / max(1, len(groups) - 1))
    touched = {name for group in groups for name in group}
    blocks = [name for name in family_of(student).blocks(student) if name not in touched]
    for number, group in enumerate(groups[:-1], start=1):  # with the last, it is the whole
        blocks = [*blocks, *group]
        if each >= SHORTEST_ASSEMBLY:
            shared = batches | default_hyperparameters(student, each)
            stages.append(Stage(name=f"assemble-{number}", student_blocks=list(blocks), losses=WEIGHTS, **shared))
    left = steps - sum(stage.steps for stage in stages)
    joint = {"losses": WEIGHTS.model_copy(update={"semantic": SEMANTIC_WEIGHT}), "semantics": SEMANTICS}
    return [*stages, Stage(name="joint", **joint, **batches, **default_hyperparameters(student, left))]


def small_gpu_stages(student: Denoiser, steps: int) -> list[Stage]:
    """Return the joint distillation for a GPU of 8 GB (SD 1.5's size) or 16 GB (SDXL's): the teacher's answers are read
    from disk, and large students learn low-rank changes, one image at a time, with their activations computed again."""
    shared = {"teacher": "recorded", "losses": WEIGHTS, **_batches(student), **default_hyperparameters(student, steps)}
    if not _is_small(student):
        lora = {"trained": "lora", "lora_rank": SMALL_GPU_RANK, "learning_rate": 2e-4}
        shared |= {**lora, "accumulation": shared["batch_size"], "checkpointing": True, "ema_decay": 0.99}
    return [Stage(name="small-gpu", **shared)]


def lcm_stages(student: Denoiser, steps: int) -> list[Stage]:
    """Return a few-step student by latent consistency distillation, at the learning rate of LCM (arXiv 2310.04378,
    Sec. 5); a small denoiser, whose teacher is cheap to call, learns what its solver reaches, at the time steps of
    four-step sampling (inferred). Samples have no guidance, hence no caption is dropped."""
    if _is_small(student):
        few = Consistency(teacher_steps=6, student_steps=4)
        changes: dict[str, Any] = {"learning_rate": 2e-4, "consistency": few}
    else:
        changes = {"optimizer": "adamw", "learning_rate": 8e-6}
    changes = default_hyperparameters(student, steps) | changes | {"caption_dropout": 0.0}
    return [Stage(name="lcm", scope="consistency", **changes)]


RECIPES: dict[str, Callable[[Denoiser, int], list[Stage]]] = {
    "joint": joint_stages,
    "bk-sdm": bk_sdm_stages,
    "incubation": incubation_stages,
    "small-gpu": small_gpu_stages,
    "lcm": lcm_stages,
}


def recipe_stages(recipe: str | Path, student: Denoiser, steps: int) -> list[Stage]:
    """Return the stages of a recipe: one of `RECIPES` by name, with so many steps in all, or a YAML or JSON file with a
    list of stages.

    Raises:
        AsdmError: no such recipe or file, or one that is not a list of stages.
    """
    return RECIPES[str(recipe)](student, steps) if str(recipe) in RECIPES else read_stages(recipe)


def require_recipe(recipe: str) -> str:
    """Return a recipe's name.

    Raises:
        AsdmError: no such recipe or file, or one that is not a list of stages.
    """
    if recipe not in RECIPES:
        read_stages(recipe)
    return recipe


def with_captions(stages: Sequence[Stage], captions: str | Path) -> list[Stage]:
    """Return stages whose joint ones also compare what x_0 estimates mean on captions that have no image, at every
    fourth step: semantic-aware supervision where nothing else can supervise (inferred). Stages with losses on such
    captions keep their own settings and get the captions alone.

    Args:
        captions: "spliced", for splices of the data's captions, or a .txt file, one caption a line.

    Raises:
        AsdmError: no such file, no stage is a joint one, or a joint one reads the teacher's answers from disk.
    """
    if str(captions) != SPLICED:
        read_captions(captions)
    if not any(stage.scope == "joint" for stage in stages):
        raise AsdmError(f"captions={captions}: these stages have no losses on captions; use one of scope joint")
    file = None if str(captions) == SPLICED else str(captions)
    return [_on_captions(stage, file) if stage.scope == "joint" else stage for stage in stages]


def _on_captions(stage: Stage, file: str | None) -> Stage:
    changes: dict[str, Any] = {"caption_only": stage.caption_only.model_copy(update={"file": file})}
    if not stage.losses.any_reads("captions", "caption_semantics"):
        changes["losses"] = LossWeights(**stage.losses.model_dump() | {"caption_semantic": SEMANTIC_WEIGHT})
        if not stage.losses.any_reads("semantics"):
            changes["semantics"] = stage.semantics.model_copy(update={"every": SEMANTICS.every})
    return Stage(**stage.model_dump() | changes)


def read_stages(recipe: str | Path) -> list[Stage]:
    """Return the stages in a recipe's file.

    Raises:
        AsdmError: no such file, or one that is not a list of stages.
    """
    path = Path(recipe)
    if not path.is_file():
        raise AsdmError(f"{recipe}: no such recipe; it is {', '.join(RECIPES)} or a YAML file with a list of stages")
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AsdmError(f"{path}: not a list of stages in YAML: {one_line(error)}; correct it") from None
    return parse_stages(content)


def as_yaml(stages: list[Stage]) -> str:
    """Return a recipe's file, with all fields, to be changed by hand."""
    return yaml.safe_dump([stage.model_dump(exclude_none=True) for stage in stages], sort_keys=False)
