"""What the tab Plan computes: a model's profile, and an image of a plan's untrained, compensated student."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from asdm.app.compare import Progress
from asdm.app.work import Ticket
from asdm.compensation.fitting import fit_compensation, samples_to_fit, wants_fit
from asdm.compensation.folding import fold_compensation
from asdm.families import denoiser_of
from asdm.pipelines.derived import with_unet
from asdm.sensitivity.analysis import analyze
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan

TRIAL_SAMPLES = 8  # at most, to fit a trial's compensations on: sampling them takes most of its time


def computed_profile(pipeline: DiffusionPipeline, ticket: Ticket, progress: Progress) -> RedundancyMap:
    """Analyse a pipeline.

    Raises:
        CancelledError: the ticket was cancelled.
    """

    def after_unit(done: int, total: int, name: str) -> None:
        ticket.check()
        progress(done / max(total, 1), f"analysing, {done} of {total}: {name}")

    with ticket.guards(denoiser_of(pipeline)):
        return analyze(pipeline, progress=after_unit)


def trial_student(
    pipeline: DiffusionPipeline,
    plan: PruningPlan,
    ticket: Ticket,
    progress: Progress,
    samples: int = TRIAL_SAMPLES,
) -> DiffusionPipeline:
    """Build a plan's student, fit its compensations, and return it as a pipeline.

    Args:
        samples: to fit on, at most; `prune` fits on up to 32.

    Raises:
        AsdmError: a plan for another model.
        CancelledError: the ticket was cancelled.
    """
    student = build_student(denoiser_of(pipeline), plan)
    if wants_fit(student):

        def after_unit(done: int, total: int, name: str) -> None:
            ticket.check()
            progress(done / total, f"fitting compensations, {done} of {total}: {name}")

        progress(0, "generating images to fit compensations on")
        with ticket.guards(denoiser_of(pipeline), student):
            fit_compensation(pipeline, student, samples=min(samples, samples_to_fit(pipeline)), progress=after_unit)
    other = with_unet(pipeline, fold_compensation(student, within_blocks=True))
    other.register_to_config(_name_or_path=f"untrained student of {pipeline.config.get('_name_or_path')}")
    return other
