"""Incubation as data: a list of stages, each a length, a pace and a weighting of the losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from asdm.diffusion.conditioning import TimestepDensity
from asdm.errors import AsdmError
from asdm.records import Record, first_fault
from asdm.training.loop import BatchSlice, LoopSettings
from asdm.training.optimizers import OptimizerName


class LossWeights(Record):
    """Weights of the loss terms: the denoising task, the teacher's output and its blocks' features; what the teacher's
    x0 estimate means, and what the caption means (semantic-aware supervision)."""

    task: float = Field(1.0, ge=0)
    output: float = Field(1.0, ge=0)
    feature: float = Field(1.0, ge=0)
    semantic: float = Field(0.0, ge=0)
    semantic_text: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _something_is_learnt(self) -> LossWeights:
        if not any(self.model_dump().values()):
            raise ValueError("all weights are zero, so nothing would be learnt; raise one")
        return self


class Semantics(Record):
    """By which encoder semantic-aware supervision compares x0 estimates (`asdm.distillation.semantics`).

    "unet", "clip", or a vision model of transformers by name, with the VAE or a tiny decoder by name; at every k-th
    step.
    """

    encoder: str = "unet"
    decoder: str | None = None
    every: int = Field(1, ge=1)


class Consistency(Record):
    """Latent consistency distillation (`asdm.distillation.consistency`): in how many steps the teacher's solver goes
    from noise to image, and the distance of the two estimates, pseudo-Huber or squared.

    With `teacher_steps` the target is no estimate of the student's, but what the solver comes to in so many steps, from
    wherever it starts (arXiv 2101.02388, Sec. 3, from all time steps). With `student_steps` only those time steps are
    trained that its sampler visits in so many steps.
    """

    solver_steps: int = Field(50, ge=1)
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = Field(0.001, gt=0)
    teacher_steps: int = Field(0, ge=0)
    student_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _students_are_among_solvers(self) -> Consistency:
        if self.student_steps > self.solver_steps:
            raise ValueError(
                f"student_steps={self.student_steps}: more than solver_steps={self.solver_steps}; give as many at most"
            )
        return self


class Stage(Record):
    """One stage of a distillation: how long, how fast, what is trained, and on which losses.

    `scope` "incubate" trains each edited block of the UNet by itself, on the features that the teacher feeds it and
    expects behind it; "joint" trains the whole, or, with `assembled`, the student's blocks of these names inside the
    otherwise frozen teacher; "consistency" teaches it to sample in a few steps, by `consistency` instead of the losses.
    `trained` narrows what moves: the layers beside a cut, or the routers of CondConv banks.
    `caption_mixing` is the share of captions whose embeddings are another caption's from a random token on (inferred):
    the late tokens of a caption have read all of it, and a student that learns images by them knows no new combination.
    `relative` divides task, output and feature losses by the teacher's power. In the feature loss blocks count by the
    area of their features, or, with `features_by` "block", all alike (inferred): a pruned student's small, deep maps
    differ most from the teacher's, and the output depends on them least. `timesteps` "angle" draws them evenly on the
    path of a v-prediction's sampler, little noise more often than "uniform" (inferred); `min_timestep_fraction` leaves
    out those below this part of the schedule, for a student that draws above it alone (`asdm.switch_unets`).
    `guidance_scale` makes the output loss one of guided predictions, conditional and unconditional branch; in a
    consistency stage it is the scale that the student takes over, by default the teacher's usual one. Networks that
    embed the scale (LCM's) are told this one, or else scales from 3 to 15, and have no second branch. `min_snr_gamma`
    weighs time steps (Min-SNR).
    `batch_size` is that of a step, of all processes together, taken in `accumulation` rounds; `checkpointing` computes
    the student's activations again in the backward pass, for less memory. `caption_dropout` is the share of captions
    that are left out, for guidance. `learning_rate` rises in `warmup_steps` and then follows `schedule`; `weight_decay`
    is of matrices alone; the student becomes the average of its weights that `ema_decay` keeps, unless that is 0. A
    checkpoint is written each `checkpoint_every` steps. `mixed_precision` "auto" is the device's fastest.
    """

    name: str = Field(min_length=1, max_length=60, pattern=r"^[^/\\\x00]+$")  # of a folder
    steps: int = Field(ge=0, le=10**9)
    batch_size: int = Field(8, ge=1, le=10**6)
    accumulation: int = Field(1, ge=1)
    checkpointing: bool = False
    optimizer: OptimizerName = "adamw"
    learning_rate: float = Field(5e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    caption_dropout: float = Field(0.1, ge=0, le=1)
    caption_mixing: float = Field(0.0, ge=0, le=1)
    checkpoint_every: int = Field(100, ge=1)
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    losses: LossWeights = LossWeights()
    scope: Literal["joint", "incubate", "consistency"] = "joint"
    assembled: list[str] | None = None
    trained: Literal["all", "neighbours", "routers"] = "all"
    relative: bool = True
    features_by: Literal["area", "block"] = "area"
    timesteps: TimestepDensity = "uniform"
    min_timestep_fraction: float = Field(0.0, ge=0, lt=1)
    guidance_scale: float | None = Field(None, gt=0)
    min_snr_gamma: float | None = Field(None, gt=0)
    semantics: Semantics = Semantics()
    consistency: Consistency = Consistency()

    @model_validator(mode="after")
    def _assembled_is_joint(self) -> Stage:
        if self.assembled is not None and self.scope != "joint":
            raise ValueError("assembled goes with scope joint; blocks are incubated each by itself")
        return self

    @model_validator(mode="after")
    def _every_step_learns(self) -> Stage:
        losses = self.losses
        if self.semantics.every > 1 and not (losses.task or losses.output or losses.feature):
            raise ValueError("semantics at every k-th step alone leave the others nothing to learn; weigh another loss")
        return self

    @model_validator(mode="after")
    def _rounds_are_equal(self) -> Stage:
        BatchSlice(0, self.accumulation).of(self.batch_size)
        return self

    def loop(self, seed: int) -> LoopSettings:
        return LoopSettings(
            steps=self.steps,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            ema_decay=self.ema_decay,
            checkpoint_every=self.checkpoint_every,
            accumulation=self.accumulation,
            seed=seed,
        )


def parse_stages(content: object) -> list[Stage]:
    """Stages from plain data.

    Raises:
        AsdmError: not a list of stages, or a field that is unknown or out of range.
    """
    if not isinstance(content, list) or not content:
        raise AsdmError('not a list of stages; for example [{"name": "joint", "steps": 1000}]')
    try:
        stages = [Stage.model_validate(row) for row in content]
    except ValidationError as error:
        raise AsdmError(f"not a stage: {first_fault(error)}") from None
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise AsdmError(f"stages share a name: {', '.join(names)}; give each its own")
    return stages
