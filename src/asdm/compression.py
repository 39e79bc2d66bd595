"""The main job, all of it in a row: analyse, plan, build, distil, evaluate, report, save; resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from asdm import checks
from asdm.choices import CompensationKind
from asdm.compensation.fitting import CompensationReport, fit_compensation, fitted_tensors
from asdm.data.sources import require_usable
from asdm.diffusion.generation import require_steps
from asdm.distillation.distill import distill
from asdm.distillation.recipes import RECIPES, read_stages, recipe_stages
from asdm.distillation.stages import Stage
from asdm.errors import AsdmError
from asdm.evaluation.comparison import Evaluation, evaluate, evaluation_sets
from asdm.evaluation.metrics import Judge
from asdm.evaluation.plots import redundancy_plot
from asdm.evaluation.report import figures_section, headline_of, save_figure, write_report
from asdm.files import MARKER, replacing_file, require_ours, write_text
from asdm.pipelines.checkpoints import PredictionType
from asdm.pipelines.clip import load_clip
from asdm.pipelines.derived import with_unet
from asdm.pipelines.loading import load_pipeline
from asdm.pipelines.model_card import model_card
from asdm.pipelines.saving import save_pipeline_into
from asdm.planning.program import make_plan, require_budget, require_params
from asdm.planning.refine import ROUNDS, refine_plan
from asdm.sensitivity.profile import RedundancyMap, Sensitivity, analyze
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan
from asdm.training.loop import read_log

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Compression:
    """What `compress` made: a folder that loads as a pipeline, its figures, and one sentence about them."""

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
    samples=checks.whole(0, 10**6),
    sampling_steps=checks.STEPS,
    seed=checks.SEED,
    progress=checks.function,
)
def compress(
    model: str,
    out: str | Path,
    *,
    speedup: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    preset: str | None = None,
    sensitivity: Sensitivity | None = None,
    compensate: CompensationKind | None = None,
    refine: int | None = None,
    data: str | Path | None = None,
    steps: int = 1000,
    recipe: str = "joint",
    stages: Sequence[Stage] | None = None,
    samples: int = 128,
    sampling_steps: int = 25,
    prediction_type: PredictionType | None = None,
    config: str | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Compression:
    """Make a smaller and faster pipeline of `model` in the folder `out`; called again, go on where it was.

    Args:
        model: as for `load_pipeline`.
        speedup, params, macs, preset: the budget, as for `make_plan`; exactly one.
        sensitivity: how it is found what the units are worth, as for `analyze`; for a preset, whose edits it does not
            choose, estimated by default.
        compensate: what to fit in the place of the removed branches, as for `make_plan`; nothing by default where
            the weights are random.
        refine: rounds in which the plan is bettered (`refine_plan`); none by default for a preset, and where the
            weights are random.
        data: images with captions to calibrate, train and evaluate on, as for `open_data`.
        steps: of distillation; 0 prunes only, and then needs no data.
        recipe: of the distillation (`asdm.distillation.recipes`): by name, or a YAML file.
        stages: the distillation in detail, instead of `steps` and `recipe`.
        samples: images per split in the evaluation; 0 measures speed alone.
        prediction_type, config: what the model is, whatever its checkpoint says, as for `load_pipeline`.
        device: where to work; the CPU by default.
        progress: called with a title, the done and total of it, and a note.

    Raises:
        AsdmError: anything that the steps raise, `out` is not ours, or was made with other settings.
    """
    out = Path(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AsdmError("compress works in one process; launch prepare-data and distill in several")
    require_budget(speedup, params, macs, preset)
    if stages is None and recipe not in RECIPES:
        stages = read_stages(recipe)
    if data is None and (steps > 0 or stages):
        raise AsdmError(f"steps={steps} of distillation need data: name a folder of captioned images, or give 0 steps")
    if recipe == "lcm" or any(stage.scope == "consistency" for stage in stages or ()):
        raise AsdmError(
            f"recipe={recipe}: its students sample otherwise than the teacher they are compared with; compress "
            "by another recipe, then run asdm distill --recipe lcm on the result"
        )
    model = str(model)
    is_random = model.startswith("random:")
    compensate = compensate or ("none" if is_random else "linear")
    refine = (0 if is_random or preset is not None else ROUNDS) if refine is None else refine
    settings: dict[str, Any] = {
        "model": model,
        "budget": {"speedup": speedup, "params": params, "macs": macs, "preset": preset},
        "sensitivity": sensitivity,
        "compensate": compensate,
        "refine": refine,
        "data": None if data is None else str(data),
        "steps": steps if stages is None else None,
        "recipe": recipe if stages is None else None,
        "samples": samples,
        "sampling_steps": sampling_steps,
        "stages": None if stages is None else [stage.model_dump() for stage in stages],
        "seed": seed,
    }
    said: dict[str, Any] = {"prediction_type": prediction_type, "config": config if config is None else str(config)}
    settings |= {name: value for name, value in said.items() if value is not None}
    report = progress or (lambda *_: None)
    require_ours(out, "compression")
    if all((out / name).is_file() for name in ("report.html", "plan.json", "evaluation.json")):
        _claim(out, settings)
        plan, evaluation = PruningPlan.load(out / "plan.json"), Evaluation.load(out / "evaluation.json")
        return Compression(out, out / "report.html", headline_of(evaluation, speedup), plan, evaluation, {})
    if data is not None:
        require_usable(data)
    pipeline = load_pipeline(model, device=device, **said)
    require_params(pipeline.unet, params)
    require_steps(pipeline, sampling_steps)
    if samples > 0 and not is_random:
        Judge()  # told now that it is missing, not after the training
    _claim(out, settings)
    work = out / "work"

    sensitivity = sensitivity or (None if preset is None else "taylor")
    redundancy = _analyzed(pipeline, data, sensitivity, compensate, seed, work / "redundancy.json", report)
    plan = _planned(redundancy, settings, pipeline, out / "plan.json", report)
    save_figure(redundancy_plot(redundancy, plan), out / "redundancy.png")

    models = {"teacher": pipeline}
    skipped: dict[str, str] = {}
    logs: dict[str, list[dict[str, float]]] = {}
    student = build_student(pipeline.unet, plan)
    compensation = _compensated(pipeline, student, data, seed, work, report)
    stages = recipe_stages(recipe, student, steps) if stages is None else list(stages)
    if data is not None and any(stage.steps for stage in stages):

        def trained(row: dict[str, float]) -> None:
            note = f"loss {row['loss']:.3f}, {row['seconds']:.2f} s a step"
            report("distil", int(row["done"]), int(row["total"]), note)

        examples = distill(pipeline, student, data, work / "training", stages=stages, seed=seed, progress=trained)
        skipped = examples.skipped
        logs = {
            stage.name: read_log(work / "training" / f"{i:02d}-{stage.name}" / "log.jsonl")
            for i, stage in enumerate(stages)
        }
        pruned = build_student(pipeline.unet, plan)
        _compensated(pipeline, pruned, data, seed, work, report)
        models["pruned"] = with_unet(pipeline, pruned)
        models["distilled"] = with_unet(pipeline, student)
    else:
        models["pruned"] = with_unet(pipeline, student)
    smaller = list(models.values())[-1]
    save_pipeline_into(smaller, out)
    evaluation = evaluate(
        models,
        data=data,
        samples=samples,
        steps=sampling_steps,
        seed=seed,
        quality=samples > 0 and not is_random,
        clip=None if is_random else load_clip(pipeline),
        images_folder=work / "images",
        progress=lambda title, done, total: report(f"images: {title}", done, total, ""),
    )
    evaluation.save(out / "evaluation.json")
    card = model_card(smaller, out.name, model, figures_section(evaluation))
    write_text(out / "README.md", card)
    headline = write_report(
        out / "report.html",
        evaluation=evaluation,
        redundancy=redundancy,
        plan=plan,
        compensation=compensation,
        logs=logs,
        sets=evaluation_sets(data, None, samples, seed) if evaluation.quality else [],
        images_folder=work / "images",
        target_speedup=speedup,
        skipped=skipped,
    )
    return Compression(out, out / "report.html", headline, plan, evaluation, skipped)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Mark the folder as ours and this run's, or find that it is already."""
    marker = out / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text("utf-8")).get("settings")
        if found != settings:
            found = found or {}
            changed = [key for key in {**settings, **found} if found.get(key) != settings.get(key)]
            raise AsdmError(
                f"{out}: made with other settings ({', '.join(changed)}); repeat those, or name another folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps({"kind": "compression", "settings": settings}, indent=1) + "\n")


def _analyzed(
    pipeline: DiffusionPipeline,
    data: str | Path | None,
    sensitivity: Sensitivity | None,
    compensate: CompensationKind,
    seed: int,
    path: Path,
    report: Progress,
) -> RedundancyMap:
    if path.is_file():
        return RedundancyMap.load(path)
    redundancy = analyze(
        pipeline,
        data=data,
        sensitivity=sensitivity,
        compensate=compensate,
        seed=seed,
        progress=lambda done, total, name: report("analyse", done, total, name),
    )
    redundancy.save(path)
    return redundancy


def _planned(
    redundancy: RedundancyMap, settings: dict[str, Any], pipeline: DiffusionPipeline, path: Path, report: Progress
) -> PruningPlan:
    if path.is_file():
        return PruningPlan.load(path)
    attempts = []

    def tried(note: str) -> None:
        attempts.append(note)
        report("plan", len(attempts), len(attempts), note)

    compensate = settings["compensate"]
    plan = make_plan(redundancy, unet=pipeline.unet, compensate=compensate, progress=tried, **settings["budget"])
    if settings["refine"]:
        plan = refine_plan(
            pipeline,
            redundancy,
            plan,
            data=settings["data"],
            rounds=settings["refine"],
            seed=settings["seed"],
            progress=lambda done, total, note: report("refine", done, total, note),
        )
    plan.save(path)
    return plan


def _compensated(
    pipeline: DiffusionPipeline,
    student: UNet2DConditionModel,
    data: str | Path | None,
    seed: int,
    work: Path,
    report: Progress,
) -> CompensationReport | None:
    """Fit the student's compensations, or take up what was fitted before for the same edits."""
    if not fitted_tensors(student):
        return None
    edits = hashlib.sha256(json.dumps(student.config["edits"]).encode()).hexdigest()[:8]
    tensors, figures = (work / f"compensation-{edits}.{suffix}" for suffix in ("safetensors", "json"))
    if not figures.is_file():
        fitted = fit_compensation(
            pipeline,
            student,
            data=data,
            seed=seed,
            progress=lambda done, total, name: report("compensate", done, total, name),
        )
        with replacing_file(tensors) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in fitted_tensors(student).items()}, partial)
        write_text(figures, fitted.model_dump_json(indent=1) + "\n")
    student.load_state_dict(load_file(tensors), strict=False)
    return CompensationReport.model_validate_json(figures.read_text("utf-8"))
