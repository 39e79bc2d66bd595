"""Incubation as data: a list of stages, each a length, a pace and a weighting of the losses."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from asdm.errors import AsdmError
from asdm.incubation.optimizers import OptimizerName
from asdm.incubation.trainer import LoopSettings


class LossWeights(BaseModel):
    """Weights of the loss terms, which are all relative to the teacher's power."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    task: float = Field(1.0, ge=0)
    output: float = Field(1.0, ge=0)
    feature: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _something_is_learnt(self) -> LossWeights:
        if not any(self.model_dump().values()):
            raise ValueError("all weights are zero, so nothing would be learnt; raise one")
        return self


class Stage(BaseModel):
    """One stage of a distillation: how long, how fast, and on which losses."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    steps: int = Field(ge=0)
    batch_size: int = Field(8, ge=1)
    optimizer: OptimizerName = "adamw"
    learning_rate: float = Field(5e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(0.01, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    caption_dropout: float = Field(0.1, ge=0, le=1)
    checkpoint_every: int = Field(100, ge=1)
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"
    losses: LossWeights = LossWeights()

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
            seed=seed,
        )


def joint_stages(steps: int, batch_size: int = 8, learning_rate: float = 5e-5) -> list[Stage]:
    """The whole student at once on all losses: the recipe that BK-SDM made common."""
    return [Stage(name="joint", steps=steps, batch_size=batch_size, learning_rate=learning_rate)]


def small_model_stages(steps: int) -> list[Stage]:
    """For a UNet of up to about 50M parameters: the same, at a pace that such a model stands."""
    return [
        Stage(
            name="joint",
            steps=steps,
            batch_size=32,
            learning_rate=4e-4,
            warmup_steps=min(20, steps // 4),
            schedule="cosine",
            ema_decay=0.99,
            checkpoint_every=50,
            mixed_precision="auto",
        )
    ]


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
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise AsdmError(f"not a stage: {field}={first.get('input')!r}: {first['msg'].lower()}") from None
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise AsdmError(f"stages share a name: {', '.join(names)}; give each its own")
    return stages
