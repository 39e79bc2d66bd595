"""What a job is expected to compute, and how long that takes on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from asdm.benchmark.method import Method
from asdm.benchmark.run import LONGEST_TIMED_IMAGE
from asdm.choices import IMAGE_TO_IMAGE_STRENGTH, CompensationKind
from asdm.data.prepared import is_prepared
from asdm.diffusion.generation import default_guidance
from asdm.distillation.distill import require_fit
from asdm.distillation.estimate import estimate
from asdm.distillation.stages import Stage
from asdm.estimates.architecture import Architecture
from asdm.estimates.machine import PAIR, MachineSpeed
from asdm.estimates.sampling import judged_images, preparation, sampling
from asdm.estimates.work import StepTime, StepWork, Work, total
from asdm.evaluation.image_to_image import image_to_image_fault
from asdm.evaluation.sampling import evaluation_sets
from asdm.evaluation.starting_images import image_to_image_sets
from asdm.families import Denoiser, denoiser_of
from asdm.student.plan import PruningPlan
from asdm.training.checkpoints import checkpoint_step

FASTEST_METHOD = 0.5  # the least that a method takes, as a part of the original's time, on average (inferred)


class Forecast:
    """A pipeline's speed on this machine, its architecture, and a plan of about the size that a budget asks for.

    Args:
        budget: one of speedup, params, macs and preset, as for `make_plan`; None where no plan is made.
        compensate: the projections of the plan.
        plan: the plan, where it is made already.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        budget: Mapping[str, Any] | None = None,
        compensate: CompensationKind = "none",
        plan: PruningPlan | None = None,
    ):
        self.pipeline = pipeline
        self.speed = MachineSpeed(pipeline)
        self.call_ms = 1000 * self.speed.call_seconds("teacher", PAIR)
        self.architecture = Architecture(denoiser_of(pipeline), self.speed.layer_shares())
        self._given, self._budget, self._compensate = plan, budget, compensate
        if plan is not None or budget is not None:
            self.speed.student_share = self.architecture.student_share(self.student)

    @cached_property
    def plan(self) -> PruningPlan:
        """The plan, or one of about its size."""
        if self._given is not None:
            return self._given
        return self.architecture.plan(self._budget or {"macs": 1.0}, self._compensate)

    @cached_property
    def student(self) -> Denoiser:
        """The plan's student, without weights."""
        return self.architecture.student(self.plan)

    def times(self, steps: Sequence[StepWork]) -> list[StepTime]:
        """Return how long steps take."""
        return self.speed.times(steps)


def training(
    teacher: DiffusionPipeline,
    student: Denoiser,
    stages: Sequence[Stage],
    *,
    data: str | Path,
    folder: Path,
    processes: int = 1,
) -> list[StepWork]:
    """Return the work of `distill`: that of preparing the data, and that of the steps that are left in `folder`.

    Args:
        student: it may be without weights.
        processes: how many share each batch.

    Raises:
        AsdmError: teacher and student do not fit, or a stage is not possible with them.
    """
    require_fit(denoiser_of(teacher), student)
    works = []
    if not is_prepared(folder / "prepared") and any(stage.teacher == "live" for stage in stages):
        works.append(StepWork.exactly("prepare data", preparation(teacher, data)))
    left, seconds = 0, 0.0
    for number, row in enumerate(estimate(teacher, student, stages, processes=processes, quick=True)):
        stage = row.stage
        steps = max(0, stage.steps - checkpoint_step(folder / f"{number:02d}-{stage.name}"))
        left += steps
        seconds += row.seconds * steps / stage.steps if stage.steps else 0.0
    works.append(StepWork.exactly(f"distil {left:,} steps", Work(seconds=seconds)))
    return works


def benchmarking(
    pipeline: DiffusionPipeline,
    methods: Sequence[Method],
    *,
    data: str | Path | None,
    samples: int,
    image_to_image: int = 0,
    strength: float = IMAGE_TO_IMAGE_STRENGTH,
    rounds: int,
    seed: int,
    call_ms: float,
) -> list[StepWork]:
    """Return the work of `benchmark_rows`: at most as if every method was as slow as the original, and as many rounds
    followed again as do on a busy machine.

    What a method calibrates or compiles before it is timed comes on top.
    """
    guidance, steps = default_guidance(pipeline), methods[0].steps
    by_parts = call_ms / 1000 * steps > LONGEST_TIMED_IMAGE
    images = total(
        sampling(pipeline, 1, min(method.steps, 4) if by_parts else method.steps, guidance) + Work(decodes=1)
        for method in methods
    )
    timed, timed_again = images * (1 + rounds), images * (1 + 2 * rounds)  # the first warms up
    sets = [] if data is None else evaluation_sets(data, None, samples, seed)
    can_start = image_to_image_fault(pipeline, steps, strength) is None
    starts = image_to_image_sets(data, sets, min(samples, image_to_image) if can_start else 0, seed)
    judged = total(
        judged_images(pipeline, sets, starts, method.steps, guidance, strength=strength) for method in methods
    )
    count = len(methods)
    return [
        StepWork(f"time {count} methods", _part(timed), timed_again),
        StepWork(f"generate images by {count} methods", _part(judged), judged),
    ]


def _part(work: Work) -> Work:
    """Return the work in which each call takes what it does in the fastest methods."""
    forwards = {kind: FASTEST_METHOD * count for kind, count in work.forwards.items()}
    return Work(work.calls, type(work.forwards)(forwards), work.encodes, work.decodes)
