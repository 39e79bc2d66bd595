"""The main job, `compress`: its arguments, its steps in a row, and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from asdm import checks
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES, CompensationKind, Dtype, PredictionType, Sensitivity
from asdm.compression.settings import KIND, Settings, claim_folder, make_settings, require_same_settings
from asdm.compression.steps import STEPS, Job, Progress, expected_work, stages_of
from asdm.data.prepared import digest_of
from asdm.data.sources import require_usable
from asdm.diffusion.generation import require_steps, require_strength
from asdm.distillation.distill import require_stages
from asdm.distillation.stages import Stage
from asdm.errors import AsdmError
from asdm.estimates.work import StepTime
from asdm.evaluation.metrics import Judge
from asdm.evaluation.report import headline_of
from asdm.evaluation.results import Evaluation
from asdm.families import denoiser_of
from asdm.files import require_ours
from asdm.pipelines.clip import clip_folder, load_clip_tokenizer
from asdm.pipelines.decoders import with_decoder
from asdm.pipelines.loading import load_pipeline
from asdm.planning.budget import require_budget_of
from asdm.planning.full_plan import require_plannable
from asdm.student.plan import PruningPlan

Estimated = Callable[[Sequence[StepTime]], None]
REPORT, PLAN, EVALUATION = "report.html", "plan.json", "evaluation.json"  # a folder with these is finished


@dataclass(frozen=True)
class Compression:
    """What `compress` made: a folder that loads as a pipeline, its results, and one sentence about them."""

    folder: Path
    report: Path
    headline: str
    plan: PruningPlan
    evaluation: Evaluation
    skipped: dict[str, str]


@checks.arguments(
    model=checks.path,
    out=checks.path,
    sensitivity=checks.literal(Sensitivity),
    compensate=checks.literal(CompensationKind),
    refine=checks.whole(0, 1000),
    data=checks.path,
    steps=checks.TRAINING_STEPS,
    recipe=checks.path,
    stages=checks.each(checks.a(Stage)),
    captions=checks.path,
    samples=checks.whole(0, 10**6),
    image_to_image=checks.whole(0, 10**6),
    strength=checks.number(above=0, high=1),
    decoder=checks.path,
    save_decoder=checks.flag,
    portable=checks.flag,
    sampling_steps=checks.STEPS,
    dtype=checks.literal(Dtype),
    seed=checks.SEED,
    progress=checks.function,
    estimated=checks.function,
)
def compress(
    model: str,
    out: str | Path,
    *,
    speedup: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    preset: str | None = None,
    portable: bool = False,
    sensitivity: Sensitivity | None = None,
    compensate: CompensationKind | None = None,
    refine: int | None = None,
    data: str | Path | None = None,
    steps: int = 1000,
    recipe: str = "joint",
    stages: Sequence[Stage] | None = None,
    captions: str | Path | None = None,
    samples: int = 128,
    image_to_image: int = IMAGE_TO_IMAGE_SAMPLES,
    strength: float | None = None,
    sampling_steps: int = 25,
    decoder: str | Path | None = None,
    save_decoder: bool = False,
    prediction_type: PredictionType | None = None,
    config: str | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    seed: int = 0,
    progress: Progress | None = None,
    estimated: Estimated | None = None,
) -> Compression:
    """Make a smaller and faster pipeline of `model` in the folder `out`; called again, resume.

    Args:
        model: as for `load_pipeline`.
        speedup, params, macs, preset: the budget, as for `make_plan`; exactly one.
        portable: choose a student that is a stock UNet and that ComfyUI, Forge and diffusers read, as for `make_plan`.
        sensitivity: how sensitivities are measured, as for `analyze`; for a preset, whose edits do not depend on them,
            estimated by default.
        compensate: what is fitted in place of removed branches, as for `make_plan`; by default "none" for random
            weights.
        refine: rounds of `refine_plan`; by default none for a preset, a portable student and random weights.
        data: captioned images to calibrate, train and evaluate on, from any source that `--data` takes.
        steps: training steps; 0 prunes only, and then needs no data.
        recipe: of the distillation: "joint", "bk-sdm", "incubation", "small-gpu", or a YAML file.
        stages: the distillation in detail, instead of `steps` and `recipe`.
        captions: captions without images for the distillation, as for `distill`.
        samples, sampling_steps: of the evaluation: images per split, 0 for speed only; and sampling steps.
        image_to_image, strength: of the evaluation's image-to-image, as for `evaluate`; 0 images leave it out.
        decoder: a tiny decoder, as for `with_decoder`: the result is measured with it, too.
        save_decoder: save the result with the tiny decoder in the place of the VAE.
        prediction_type, config: what the model is, whatever its checkpoint says, as for `load_pipeline`.
        device: where to work; the CPU by default.
        dtype: what the teacher computes in, and what the result is measured and saved in. A student is trained in
            float32 all the same; a stage's `mixed_precision` says what it computes in.
        progress: called with a title, its done and total, and a note.
        estimated: called with how long each step that is left will take on this machine, from a quick measurement,
            before anything is written. An exception that it raises ends the compression. Without it nothing is
            measured.

    Raises:
        AsdmError: whatever the steps raise; or `out` is not ours, or was made with other settings.
    """
    out = Path(out)
    _require_one_process()
    training: dict[str, Any] = {"data": data, "steps": steps, "recipe": recipe, "stages": stages, "captions": captions}
    evaluation: dict[str, Any] = {"samples": samples, "image_to_image": image_to_image, "strength": strength}
    evaluation |= {"decoder": decoder, "save_decoder": save_decoder}
    others: dict[str, Any] = {"prediction_type": prediction_type, "config": config, "dtype": dtype, "seed": seed}
    settings = make_settings(
        model,
        {"speedup": speedup, "params": params, "macs": macs, "preset": preset},
        portable=portable,
        sensitivity=sensitivity,
        compensate=compensate,
        refine=refine,
        **training,
        sampling_steps=sampling_steps,
        **evaluation,
        **others,
    )
    require_ours(out, KIND)
    if all((out / name).is_file() for name in (REPORT, PLAN, EVALUATION)):
        if estimated is not None:
            estimated([])
        return _finished(out, settings)
    return _run(out, settings, device, progress, estimated)


def _require_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AsdmError("compress works in one process; launch prepare-data and distill in several")


def _run(
    out: Path, settings: Settings, device: str | None, progress: Progress | None, estimated: Estimated | None
) -> Compression:
    """Return all steps in a row; those that are done are loaded."""
    teacher = _checked_teacher(settings, device)
    weights = digest_of(denoiser_of(teacher))
    job = Job(settings, out, teacher, progress or (lambda *_: None))
    if estimated is not None:
        require_same_settings(out, settings, weights)
        forecast, works = expected_work(job)
        estimated(forecast.times(works))
        del forecast
    claim_folder(out, settings, weights)
    for step in STEPS:
        step.perform(job)
    return Compression(out, out / REPORT, job.headline, job.plan, job.evaluation, job.skipped)


def _finished(out: Path, settings: Settings) -> Compression:
    """Return what an earlier run made."""
    claim_folder(out, settings)
    plan, evaluation = PruningPlan.load(out / PLAN), Evaluation.load(out / EVALUATION)
    headline = headline_of(evaluation, settings.budget["speedup"], settings.result_row)
    return Compression(out, out / REPORT, headline, plan, evaluation, {})


def _checked_teacher(settings: Settings, device: str | None) -> DiffusionPipeline:
    """Load the teacher, and refuse before any work what a later step would refuse."""
    if settings.data is not None:
        require_usable(settings.data)
    pipeline = load_pipeline(settings.model, dtype=settings.torch_dtype, device=device, **settings.claims)
    if settings.data is not None:
        stages = [stage for stage in stages_of(settings, denoiser_of(pipeline)) if stage.steps]
        require_stages(pipeline, stages, settings.data)
    if settings.decoder is not None:
        with_decoder(pipeline, settings.decoder)
    require_budget_of(denoiser_of(pipeline), settings.budget["params"], settings.budget["macs"])
    planned = {"preset": settings.budget["preset"], "portable": settings.portable, "refine": settings.refine}
    require_plannable(denoiser_of(pipeline), **planned)
    require_steps(pipeline, settings.sampling_steps)
    if settings.strength is not None:
        require_strength(settings.strength, settings.sampling_steps)
    if settings.samples > 0 and not settings.is_random:
        Judge()  # whose package may not be installed
        folder = clip_folder(pipeline)
        if folder is not None:
            load_clip_tokenizer(folder, pipeline)
    return pipeline
