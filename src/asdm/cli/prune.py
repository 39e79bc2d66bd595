"""`asdm prune`: from a plan to a student that is saved as a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm.cli import loading
from asdm.cli.options import ConfigOption, DataOption, DeviceOption, ModelArgument, PredictionTypeOption, SeedOption
from asdm.cli.output import say, say_path, warn_of_skipped
from asdm.cli.progress import reporting


def prune(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="A plan that `asdm plan` wrote, or one written by hand.")],
    out: Annotated[Path, typer.Option(help="The folder to write the pipeline to.")],
    data: DataOption = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    fold: Annotated[
        bool,
        typer.Option(
            "--fold/--no-fold",
            help="Fold the fitted projections into other weights, or keep all as layers of their own, as `asdm "
            "compress` trains them. `asdm distill` folds them after the training.",
        ),
    ] = True,
    seed: SeedOption = 0,
) -> None:
    """Build the student of a plan: inherit the teacher's weights, fit the compensations, save the pipeline."""
    from asdm.compensation.fitting import wants_fit
    from asdm.families import denoiser_of, family_of
    from asdm.files import require_ours

    require_ours(out, "pipeline", [model])
    made = asdm.PruningPlan.load(plan)
    warn_of_skipped(data)
    pipeline = loading.load_model(model, device, prediction_type=prediction_type, config=config)
    teacher = denoiser_of(pipeline)
    student = asdm.build_student(teacher, made)
    fit = None
    if wants_fit(student):
        with reporting() as report:
            fit = asdm.fit_compensation(
                pipeline,
                student,
                data=data,
                seed=seed,
                progress=lambda done, total, name: report("compensate", done, total, name),
            )
    if fold:
        student = asdm.fold_compensation(student, within_blocks=True)
    asdm.save_pipeline(asdm.with_unet(pipeline, student), out, {"teacher": model})
    say_path(
        f"{out}: {family_of(student).label} of {_millions(student):.2f}M parameters, from {_millions(teacher):.2f}M"
    )
    if fit is not None:
        say(
            f"relative squared error of the prediction: {fit.error_before:.4f} pruned, {fit.error_after:.4f} with the "
            "fitted compensations"
        )


def _millions(denoiser: Any) -> float:
    """Return a model's parameters in millions."""
    return sum(p.numel() for p in denoiser.parameters()) / 1e6
