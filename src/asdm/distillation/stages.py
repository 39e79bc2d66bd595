"""A distillation as data: a list of stages, each a length, hyperparameters and a weighting of the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from asdm.diffusion.parameterization import TimestepSampling
from asdm.distillation.losses import FeatureWeighting, loss_terms
from asdm.errors import AsdmError
from asdm.old_names import renamed_stage
from asdm.records import FieldError, Record, first_fault
from asdm.training.loop import LoopSettings
from asdm.training.optimizers import OptimizerName
from asdm.training.task import BatchSlice


class LossWeights(Record):
    """Weights of the loss terms by name: one for each of `asdm.distillation.losses.loss_terms`, by default the term's
    own.

    "task" is the denoising loss, "output" compares with the teacher's prediction, "feature" with its blocks' features;
    "semantic" compares the x_0 estimate's meaning with the teacher's, "semantic_text" with the caption's.
    "caption_output", "caption_semantic" and "caption_text" compare the same on captions that have no image.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0)]]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> float: ...

    @model_validator(mode="before")
    @classmethod
    def _every_term_has_a_weight(cls, weights: Any) -> Any:
        if not isinstance(weights, Mapping):
            return weights
        defaults = {term.name: term.weight for term in loss_terms()}
        for name, value in weights.items():
            if name not in defaults:
                raise FieldError(name, f": no such loss; they are {', '.join(defaults)}")
            if isinstance(value, bool):
                raise FieldError(name, f"={value}: must not be true or false")
        return {**defaults, **weights}

    @model_validator(mode="after")
    def _something_is_learnt(self) -> LossWeights:
        if not any(self.model_dump().values()):
            raise ValueError("all weights are zero, so nothing would be learnt; raise one")
        return self

    def any_reads(self, *kinds: str) -> bool:
        """Return whether a term with a weight reads one of these: "prediction", "features", "semantics", "captions",
        "caption_semantics"."""
        weights = self.model_dump()
        return any(weights.get(term.name) for term in loss_terms() if term.reads in kinds)


class Semantics(Record):
    """How semantic-aware supervision compares x_0 estimates (`asdm.distillation.semantics`)."""

    encoder: str = Field(
        "unet",
        description="unet: the teacher's own denoiser. clip: the CLIP model beside the pipeline. Or a vision model of "
        "transformers by name, or a registered encoder.",
    )
    decoder: str | None = Field(
        None, description="A tiny decoder by name, for encoders that read images; by default the pipeline's VAE."
    )
    every: int = Field(1, ge=1, description="The semantic and the caption losses are computed at every k-th step.")


class CaptionOnly(Record):
    """Captions that have no image, for the losses whose names begin with "caption_" (`asdm.distillation.caption_only`).

    They are off where none of these losses has a weight.
    """

    file: str | None = Field(
        None, description="A .txt file, one caption a line; by default splices of two of the data's captions."
    )
    share: float = Field(
        0.25, gt=0, le=1, description="Captions in a step, relative to the batch; the nearest of 1, 1/2, 1/3, .."
    )
    sampling_steps: int = Field(
        4,
        ge=0,
        le=1000,
        description="Steps of the teacher's guided solver from pure noise to the latents that are compared, two calls "
        "each. 0: the comparison is at pure noise, at the end of the schedule.",
    )


class Consistency(Record):
    """Latent consistency distillation (`asdm.distillation.consistency`)."""

    solver_steps: int = Field(50, ge=1, description="Steps of the teacher's solver from noise to image.")
    loss: Literal["huber", "l2"] = Field("huber", description="Distance of the two estimates: pseudo-Huber or squared.")
    huber_c: float = Field(0.001, gt=0, description="The pseudo-Huber distance is quadratic below this.")
    teacher_steps: int = Field(
        0,
        ge=0,
        description="If set, the target is not an estimate of the student's: it is what the solver reaches in so many "
        "steps, from any time step (arXiv 2101.02388, Sec. 3).",
    )
    student_steps: int = Field(
        0, ge=0, description="If set, only the time steps are trained that the sampler visits in so many steps."
    )

    @model_validator(mode="after")
    def _students_are_among_solvers(self) -> Consistency:
        if self.student_steps > self.solver_steps:
            most = f"more than solver_steps={self.solver_steps}; give as many at most"
            raise FieldError("student_steps", f"={self.student_steps}: {most}")
        return self


class Stage(Record):
    """One stage of a distillation: how long, how fast, what is trained, and on which losses."""

    name: str = Field(
        min_length=1,
        max_length=60,
        pattern=r"^[^/\\\x00]+$",
        description="Part of the name of the stage's folder.",
    )
    steps: int = Field(ge=0, le=10**9, description="Steps of the optimiser.")
    batch_size: int = Field(8, ge=1, le=10**6, description="Images in a step, of all processes together.")
    accumulation: int = Field(1, ge=1, description="Rounds in which a step's batch is computed, for less memory.")
    checkpointing: bool = Field(
        False, description="Compute the student's activations again in the backward pass, for less memory."
    )
    optimizer: OptimizerName = Field("adamw", description="adamw, adamw8bit (moments of 8 bits) or muon.")
    learning_rate: float = Field(5e-5, gt=0, description="The peak, reached after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps in which the learning rate rises.")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="The learning rate after the warm-up: constant, or falling to zero."
    )
    weight_decay: float = Field(0.01, ge=0, description="Decay of matrices and kernels; vectors do not decay.")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="The student becomes the average of its weights with this decay; 0: the last."
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="Share of captions that are left out, for guidance.")
    caption_mixing: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of captions whose embeddings are another caption's from a random token on (inferred): the "
        "late tokens of a caption have read all of it, and a student that learns images by them does not learn new "
        "combinations.",
    )
    checkpoint_every: int = Field(100, ge=1, description="Steps from one checkpoint to the next.")
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = Field(
        "no", description="Precision of the computation; auto is the device's fastest."
    )
    losses: LossWeights = Field(
        LossWeights(),
        description="Weights of the loss terms by name: task, output and feature, each 1 by default; semantic,"
        " semantic_text, caption_output, caption_semantic and caption_text, 0 by default.",
    )
    scope: Literal["joint", "incubate", "consistency"] = Field(
        "joint",
        description="joint: the whole student. incubate: each edited block by itself, on the features that the teacher "
        "feeds it and expects behind it. consistency: sampling in a few steps, by `consistency` instead of the losses.",
    )
    student_blocks: list[str] | None = Field(
        None,
        description="With scope joint: train the student's blocks of these names inside the frozen teacher. With scope "
        "incubate: incubate these blocks alone.",
    )
    trained: Literal["all", "routers", "lora"] = Field(
        "all",
        description="What is trained: everything, or the routers of expert kernels. lora: low-rank changes of all "
        "convolutions and linear layers, and the routers; the weights themselves are frozen, in the precision of the "
        "computation, and the changes are added to them at the end (arXiv 2106.09685).",
    )
    lora_rank: int = Field(16, ge=1, le=4096, description="Rank of the changes that `trained: lora` learns.")
    teacher: Literal["live", "recorded"] = Field(
        "live",
        description="live: the teacher runs at each step. recorded: what it answered on fixed draws is read from the "
        "prepared data (`asdm prepare-data --teacher-features`), and only what is trained is on the device.",
    )
    relative: bool = Field(
        True, description="Divide task, output and feature losses by the mean square of what they compare with."
    )
    feature_weighting: FeatureWeighting = Field(
        "spatial",
        description="spatial: a block counts by the area of its features. block: all alike (inferred): the small, deep "
        "features of a pruned student differ most from the teacher's, and the output depends on them least.",
    )
    timestep_sampling: TimestepSampling = Field(
        "uniform",
        description="uniform, or uniform_angle: evenly on the path of a v-prediction's sampler, which has more steps "
        "at low noise (inferred).",
    )
    min_timestep_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Leave out time steps below this fraction of the schedule, for a student that samples above it "
        "alone (`asdm.switch_unets`).",
    )
    guidance_scale: float | None = Field(
        None,
        gt=0,
        description="The output loss compares guided predictions at this scale. With scope consistency, the scale that "
        "the student takes over; by default the teacher's usual one. Denoisers that embed the scale (LCM's) read it, "
        "by default scales from 3 to 15, and need no second branch.",
    )
    min_snr_gamma: float | None = Field(None, gt=0, description="Weigh time steps by Min-SNR with this gamma.")
    semantics: Semantics = Field(Semantics(), description="How the semantic losses compare.")
    caption_only: CaptionOnly = Field(CaptionOnly(), description="Captions without images, for the caption losses.")
    consistency: Consistency = Field(Consistency(), description="Settings of scope consistency.")

    @model_validator(mode="after")
    def _student_blocks_have_a_scope(self) -> Stage:
        if self.student_blocks is not None and self.scope == "consistency":
            raise ValueError("student_blocks goes with scope joint or incubate; leave it out")
        if self.student_blocks is not None and self.scope == "joint" and self.trained == "lora":
            raise ValueError("trained=lora changes the student's layers, not the teacher's; leave student_blocks out")
        return self

    @model_validator(mode="after")
    def _recorded_answers_suffice(self) -> Stage:
        if self.teacher == "live":
            return self
        has_semantics = self.losses.any_reads("semantics", "captions", "caption_semantics")
        needs = {
            "scope=consistency": self.scope == "consistency",
            "student_blocks with scope joint": self.student_blocks is not None and self.scope == "joint",
            f"guidance_scale={self.guidance_scale}": self.guidance_scale is not None,
            "a semantic loss": self.scope == "joint" and has_semantics,
        }
        for what, is_needed in needs.items():
            if is_needed:
                raise ValueError(f"teacher=recorded: {what} needs the teacher itself; choose teacher live")
        return self

    @model_validator(mode="after")
    def _every_step_learns(self) -> Stage:
        if self.semantics.every > 1 and not self.losses.any_reads("prediction", "features"):
            raise ValueError("semantics at every k-th step alone leave the others nothing to learn; weigh another loss")
        return self

    @model_validator(mode="after")
    def _rounds_are_equal(self) -> Stage:
        BatchSlice(0, self.accumulation).of(self.batch_size)
        return self

    @property
    def blocks_in_teacher(self) -> list[str] | None:
        """The student's blocks that are trained inside the teacher; None where the whole student is."""
        return self.student_blocks if self.scope == "joint" else None

    @property
    def leaves_weights_unused(self) -> bool:
        """Whether there are steps without a loss on the prediction, in which the last layers have no gradient."""
        reads_predictions = self.losses.any_reads("prediction")
        has_meaning = self.losses.any_reads("semantics", "captions", "caption_semantics") and self.semantics.every == 1
        return self.scope == "joint" and not reads_predictions and not has_meaning

    def caption_rows(self, count: int, part: BatchSlice = BatchSlice()) -> list[int]:
        """Return the rows of a part of a batch of `count` that have a caption without an image: every k-th."""
        stride = min(count, max(1, round(1 / self.caption_only.share)))
        return [row for row in range(count)[part.of(count)] if row % stride == 0]

    def loop(self, seed: int) -> LoopSettings:
        """Return the settings of its training loop."""
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
    """Make stages of plain data; names of earlier versions are known.

    Raises:
        AsdmError: not a list of stages, or a field that is unknown or out of range.
    """
    if not isinstance(content, list) or not content:
        raise AsdmError('not a list of stages; for example [{"name": "joint", "steps": 1000}]')
    try:
        stages = [Stage.model_validate(renamed_stage(row) if isinstance(row, Mapping) else row) for row in content]
    except ValidationError as error:
        raise AsdmError(f"not a stage: {first_fault(error)}") from None
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise AsdmError(f"stages share a name: {', '.join(names)}; give each its own")
    return stages
