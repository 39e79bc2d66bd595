"""The steps of `compress`, each with one job: what it reads of the earlier ones' results, and what it writes.

A step whose files are there is not run again; its results are read from them. A distillation resumes by itself.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from asdm.choices import Sensitivity
from asdm.compensation.fitting import CompensationReport, fit_compensation, fitted_tensors
from asdm.compensation.folding import fold_compensation
from asdm.compression.settings import Settings
from asdm.digests import short_digest
from asdm.distillation.distill import distill
from asdm.distillation.recipes import recipe_stages, with_captions
from asdm.distillation.stages import Stage
from asdm.estimates import steps as works
from asdm.estimates.forecast import Forecast, training
from asdm.estimates.work import Network, StepWork
from asdm.evaluation.comparison import evaluate
from asdm.evaluation.image_folders import folder_name, image_name, load_distances
from asdm.evaluation.metrics import JUDGE_NAME
from asdm.evaluation.plots import redundancy_plot
from asdm.evaluation.protocol.wins import WIN_SHEET, write_win_sheet
from asdm.evaluation.report import metrics_section, save_figure, write_report
from asdm.evaluation.results import Evaluation
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.evaluation.starting_images import image_to_image_sets
from asdm.families import Denoiser, denoiser_of
from asdm.files import replacing_file, write_text
from asdm.pipelines.clip import load_clip
from asdm.pipelines.decoders import with_decoder
from asdm.pipelines.derived import with_unet
from asdm.pipelines.model_card import model_card
from asdm.pipelines.saving import save_pipeline_into
from asdm.planning.full_plan import full_plan
from asdm.records import read_record
from asdm.sensitivity.analysis import analyze
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan
from asdm.tensor_files import load_tensors
from asdm.training.log import read_log

Progress = Callable[[str, int, int, str], None]


@dataclass
class Job:
    """The settings, the folder, and the results that steps hand to later ones.

    `pipelines`: by the name that they have in the evaluation: the teacher, the student as it was pruned, the distilled
    student if there is a distillation, and the last of these with a tiny decoder if there is one. `logs`: each stage's
    training log. `skipped`: the data's files that could not be used, with reasons.
    """

    settings: Settings
    out: Path
    teacher: DiffusionPipeline
    report: Progress
    redundancy: RedundancyMap = field(init=False)
    plan: PruningPlan = field(init=False)
    student: Denoiser = field(init=False)
    compensation: CompensationReport | None = None
    pipelines: dict[str, DiffusionPipeline] = field(default_factory=dict)
    logs: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    evaluation: Evaluation = field(init=False)
    headline: str = ""

    @property
    def work(self) -> Path:
        """The folder of what only a resumed run and the report read."""
        return self.out / "work"

    @property
    def images(self) -> Path:
        """The folder of the evaluation's images."""
        return self.work / "images"

    @property
    def result(self) -> DiffusionPipeline:
        """The pipeline that the job makes."""
        return list(self.pipelines.values())[self.settings.result_row]

    def reporter(self, title: str) -> Callable[[int, int, str], None]:
        """Return the progress of one task, called with its done and total, and a note."""
        return lambda done, total, note: self.report(title, done, total, note)


class Step(ABC):
    """One part of the job."""

    def files(self, job: Job) -> list[Path]:
        """Return the files that hold the step's results; a step without any is run each time."""
        return []

    def is_done(self, job: Job) -> bool:
        """Return whether the step's results can be read instead of computed."""
        files = self.files(job)
        return bool(files) and all(path.is_file() for path in files)

    @abstractmethod
    def run(self, job: Job) -> None:
        """Compute the results, set them in the job and write them."""

    def load(self, job: Job) -> None:
        """Set the results in the job that an earlier run wrote."""
        raise NotImplementedError

    def work(self, job: Job, forecast: Forecast) -> list[StepWork]:
        """Return what the step computes when it is run; a step of a few seconds has none."""
        return []

    def perform(self, job: Job) -> None:
        """Load the results if the step is done, else run it."""
        if self.is_done(job):
            self.load(job)
        else:
            self.run(job)


class Analyse(Step):
    """Measure the cost and the sensitivity of each unit: `work/redundancy.json`."""

    def files(self, job: Job) -> list[Path]:
        return [job.work / "redundancy.json"]

    def run(self, job: Job) -> None:
        settings = job.settings
        job.redundancy = analyze(
            job.teacher,
            data=settings.data,
            sensitivity=_sensitivity(settings),
            compensate=settings.tried,
            seed=settings.seed,
            progress=job.reporter("analyse"),
        )
        job.redundancy.save(*self.files(job))

    def work(self, job: Job, forecast: Forecast) -> list[StepWork]:
        settings = job.settings
        sensitivity = _sensitivity(settings)
        analysis: dict[str, Any] = {"sensitivity": sensitivity, "compensate": settings.tried}
        return [works.analysis(job.teacher, forecast.architecture, data=settings.data, **analysis)]

    def load(self, job: Job) -> None:
        job.redundancy = RedundancyMap.load(*self.files(job))


class Plan(Step):
    """Choose the edits that fit the budget: `plan.json`."""

    def files(self, job: Job) -> list[Path]:
        return [job.out / "plan.json"]

    def run(self, job: Job) -> None:
        settings = job.settings
        job.plan = full_plan(
            job.redundancy,
            job.teacher,
            budget=settings.budget,
            portable=settings.portable,
            compensate=None if settings.portable and settings.compensate != "none" else settings.compensate,
            refine=settings.refine,
            data=settings.data,
            seed=settings.seed,
            progress=job.report,
        )
        job.plan.save(*self.files(job))

    def work(self, job: Job, forecast: Forecast) -> list[StepWork]:
        settings = job.settings
        planned = works.plan(
            job.teacher,
            forecast.architecture,
            budget=settings.budget,
            expected=forecast.plan,
            compensate=settings.tried,
            refine=settings.refine,
            data=settings.data,
            call_ms=forecast.call_ms,
        )
        return [planned]

    def load(self, job: Job) -> None:
        job.plan = PruningPlan.load(*self.files(job))


class PlotProfile(Step):
    """Plot the profile with the plan's edits: `redundancy.png`."""

    def run(self, job: Job) -> None:
        save_figure(redundancy_plot(job.redundancy, job.plan), job.out / "redundancy.png")


class Prune(Step):
    """Build the student, fitted where the plan compensates: `work/compensation-*`. Its projections fold after the
    training, in which they are layers of their own."""

    def run(self, job: Job) -> None:
        job.student, job.compensation = pruned_student(job)

    def work(self, job: Job, forecast: Forecast) -> list[StepWork]:
        if any(job.work.glob("compensation-*.json")):
            return []
        return [works.fitting(job.teacher, forecast.architecture, forecast.plan, job.settings.data)]


class Distil(Step):
    """Train the student in the recipe's stages: `work/training`, where an interrupted training resumes. Fold it."""

    def run(self, job: Job) -> None:
        settings, folder = job.settings, job.work / "training"
        stages = stages_of(settings, job.student)
        if settings.data is None or not any(stage.steps for stage in stages):
            job.pipelines = {"teacher": job.teacher, "pruned": _folded(job, job.student)}
            return
        examples = distill(
            job.teacher,
            job.student.float(),
            settings.data,
            folder,
            stages=stages,
            seed=settings.seed,
            progress=lambda row: job.report("distil", int(row["done"]), int(row["total"]), _training_note(row)),
        )
        job.skipped = examples.skipped
        job.logs = {
            stage.name: read_log(folder / f"{number:02d}-{stage.name}" / "log.jsonl")
            for number, stage in enumerate(stages)
        }
        pruned, _ = pruned_student(job)  # the student before the training, for the comparison
        job.pipelines = {
            "teacher": job.teacher,
            "pruned": _folded(job, pruned),
            "distilled": _folded(job, job.student),
        }

    def work(self, job: Job, forecast: Forecast) -> list[StepWork]:
        settings = job.settings
        stages = stages_of(settings, forecast.student)
        if settings.data is None or not any(stage.steps for stage in stages):
            return []
        return training(job.teacher, forecast.student, stages, data=settings.data, folder=job.work / "training")


class Decode(Step):
    """Give the last student a tiny decoder, beside the one with the VAE."""

    def run(self, job: Job) -> None:
        if job.settings.decoder is not None:
            name, last = list(job.pipelines.items())[-1]
            job.pipelines[f"{name}, tiny decoder"] = with_decoder(last, job.settings.decoder)


class Save(Step):
    """Write the result's components into the folder, which then loads as a pipeline."""

    def run(self, job: Job) -> None:
        save_pipeline_into(job.result, job.out)


class Evaluate(Step):
    """Measure speed and quality of all pipelines: `evaluation.json`, `work/images`."""

    def run(self, job: Job) -> None:
        settings = job.settings
        job.evaluation = evaluate(
            job.pipelines,
            data=settings.data,
            samples=settings.samples,
            image_to_image=settings.image_to_image,
            strength=settings.strength,
            steps=settings.sampling_steps,
            seed=settings.seed,
            quality=_has_quality(settings),
            clip=None if settings.is_random else load_clip(job.teacher),
            images_folder=job.images,
            progress=lambda title, done, total: job.report(f"images: {title}", done, total, ""),
        )
        job.evaluation.save(job.out / "evaluation.json")

    def work(self, job: Job, forecast: Forecast) -> list[StepWork]:
        settings = job.settings
        stages = stages_of(settings, forecast.student)
        is_trained = settings.data is not None and any(stage.steps for stage in stages)
        networks: list[Network] = ["teacher", "student", "student"] if is_trained else ["teacher", "student"]
        networks += ["student"] if settings.decoder is not None else []
        evaluated = works.evaluation(
            job.teacher,
            networks,
            data=settings.data,
            samples=settings.samples,
            image_to_image=settings.image_to_image,
            strength=settings.strength,
            steps=settings.sampling_steps,
            seed=settings.seed,
            quality=_has_quality(settings),
            call_ms=forecast.call_ms,
        )
        return [evaluated]


class WriteReport(Step):
    """Write the model card, the win sheet and the report: `README.md`, `wins.html`, `report.html`."""

    def run(self, job: Job) -> None:
        settings, evaluation = job.settings, job.evaluation
        card = model_card(job.result, job.out.name, settings.model, metrics_section(evaluation))
        write_text(job.out / "README.md", card)
        sets = evaluation_sets(settings.data, None, settings.samples, settings.seed) if evaluation.quality else []
        from_images = evaluation.image_to_image
        count = min(settings.image_to_image, settings.samples) if from_images is not None and from_images.rows else 0
        starts = image_to_image_sets(settings.data, sets, count, settings.seed)
        _write_win_sheet(job, sets)
        job.headline = write_report(  # the last file, by which a finished folder is known
            job.out / "report.html",
            evaluation=evaluation,
            redundancy=job.redundancy,
            plan=job.plan,
            compensation=job.compensation,
            logs=job.logs,
            sets=sets,
            starts=starts,
            images_folder=job.images,
            target_speedup=settings.budget["speedup"],
            result_row=settings.result_row,
            skipped=job.skipped,
        )


def _write_win_sheet(job: Job, sets: Sequence[EvaluationSet]) -> None:
    """Write `wins.html`: where the result's images differ most and least from the teacher's."""
    names = [row.name for row in job.evaluation.speed]
    teacher, student = names[0], names[job.settings.result_row]
    prompts, files, distances = [], [], []
    for each in sets:
        folders = [job.images / each.split / folder_name(name) for name in (teacher, student)]
        of_set = load_distances(folders[1])
        if of_set is None:
            return
        prompts += each.prompts
        distances += of_set
        files += [(folders[0] / name, folders[1] / name) for name in map(image_name, range(len(of_set)))]
    if prompts:
        measure = f"1 − cosine of {JUDGE_NAME}"
        path = job.out / WIN_SHEET
        write_win_sheet(
            path, prompts=prompts, names=(teacher, student), files=files, measure=measure, distances=distances
        )


STEPS: tuple[Step, ...] = (
    Analyse(),
    Plan(),
    PlotProfile(),
    Prune(),
    Distil(),
    Decode(),
    Save(),
    Evaluate(),
    WriteReport(),
)


def expected_work(job: Job) -> tuple[Forecast, list[StepWork]]:
    """Return what the steps compute that are not done, with the machine's speed."""
    planned = Plan()
    known = PruningPlan.load(*planned.files(job)) if planned.is_done(job) else None
    settings = job.settings
    forecast = Forecast(job.teacher, settings.budget, settings.tried, known)
    return forecast, [work for step in STEPS if not step.is_done(job) for work in step.work(job, forecast)]


def pruned_student(job: Job) -> tuple[Denoiser, CompensationReport | None]:
    """Build the plan's student with its compensations fitted, or as they were fitted before for the same edits."""
    student = build_student(denoiser_of(job.teacher), job.plan)
    if not fitted_tensors(student):
        return student, None
    edits = short_digest(json.dumps(job.plan.model_dump(mode="json")["edits"]))[:8]
    tensors, metrics = (job.work / f"compensation-{edits}.{suffix}" for suffix in ("safetensors", "json"))
    if not metrics.is_file():
        _fit(job, student, tensors, metrics)
    student.load_state_dict(load_tensors(tensors, f"remove it and {metrics}, and run again"), strict=False)
    remedy = f"remove it and {tensors}, and run again"
    return student, read_record(CompensationReport, metrics, "a report of compensation", remedy)


def _folded(job: Job, student: Denoiser) -> DiffusionPipeline:
    """Return the teacher's pipeline with a student, its projections folded, in the precision of the result."""
    return with_unet(job.teacher, fold_compensation(student).to(job.settings.torch_dtype))


def _fit(job: Job, student: Denoiser, tensors: Path, metrics: Path) -> None:
    """Fit the student's compensations and write them; what was measured comes last, as the sign that all is there."""
    settings = job.settings
    fit = fit_compensation(
        job.teacher, student, data=settings.data, seed=settings.seed, progress=job.reporter("compensate")
    )
    with replacing_file(tensors) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in fitted_tensors(student).items()}, partial)
    write_text(metrics, fit.model_dump_json(indent=1) + "\n")


def _sensitivity(settings: Settings) -> Sensitivity | None:
    return settings.sensitivity or ("taylor" if settings.budget["preset"] is not None else None)


def _has_quality(settings: Settings) -> bool:
    return settings.samples > 0 and not settings.is_random


def stages_of(settings: Settings, student: Denoiser) -> Sequence[Stage]:
    """Return the stages of the distillation of a student."""
    if settings.stages is not None:
        stages = settings.stages
    else:
        assert settings.recipe is not None and settings.steps is not None
        stages = recipe_stages(settings.recipe, student, settings.steps)
    return stages if settings.captions is None else with_captions(stages, settings.captions)


def _training_note(row: dict[str, float]) -> str:
    return f"loss {row['loss']:.3f}, {row['seconds']:.2f} s a step"
