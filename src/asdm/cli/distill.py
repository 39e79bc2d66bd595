"""`asdm distill`: train a student beside its teacher, or estimate what that takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import asdm
from asdm.cli import loading
from asdm.cli.estimates import YesOption, announce
from asdm.cli.options import (
    DATA,
    NAME,
    POSITIVE,
    CaptionsOption,
    ConfigOption,
    DeviceOption,
    DistillRecipeOption,
    ModelArgument,
    PredictionTypeOption,
    SeedOption,
    training_steps,
)
from asdm.cli.output import is_main_process, print_skipped, say, say_path, show
from asdm.cli.progress import reporting
from asdm.cli.tables import duration, estimate_tables
from asdm.errors import AsdmError

if TYPE_CHECKING:
    from asdm.distillation.stages import Stage


def distill(
    teacher: ModelArgument,
    student: Annotated[
        str,
        typer.Argument(
            help="A folder that `asdm prune`, `compress` or `distill` wrote, or the teacher itself.", callback=NAME
        ),
    ],
    data: Annotated[str, typer.Option("--data", help=DATA, callback=NAME)],
    out: Annotated[Path, typer.Option(help="The folder to write the distilled pipeline to.")],
    steps: Annotated[int | None, typer.Option(help="Training steps, 1000 by default.", min=1, max=10**9)] = None,
    recipe: DistillRecipeOption = "joint",
    captions: CaptionsOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages with their time and memory; train nothing.")
    ] = False,
    device_tflops: Annotated[
        float | None,
        typer.Option(
            help="In a dry run: estimate for a device with this sustained speed in TFLOP/s instead of this one.",
            min=0.001,
            callback=POSITIVE,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="In a dry run: number of devices that share each batch.", min=1, max=10**6)
    ] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="In a dry run: the devices also share the trained parameters (FSDP).")
    ] = False,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    yes: YesOption = False,
) -> None:
    """Train a student to predict what its teacher predicts, or to sample in a few steps; run again to resume."""
    from asdm.data.sources import require_usable
    from asdm.devices import fastest_device
    from asdm.distillation.pipelines import distill_pipeline
    from asdm.distillation.recipes import recipe_stages, with_captions
    from asdm.families import denoiser_of
    from asdm.files import require_ours
    from asdm.pipelines.compatibility import require_same_prediction

    length = training_steps(steps, recipe)
    if not dry_run and (device_tflops is not None or processes > 1 or fsdp):
        raise AsdmError(
            "--device-tflops, --processes and --fsdp only describe what to estimate: add --dry-run, or start several "
            "processes by accelerate launch"
        )
    require_ours(out, "pipeline", [teacher, student])
    require_usable(data)
    learning = loading.load_model(student, "cpu", prediction_type=prediction_type)
    denoiser = denoiser_of(learning)
    stages = recipe_stages(recipe, denoiser, length)
    if captions is not None:
        stages = with_captions(stages, captions)
    is_live = any(stage.teacher == "live" for stage in stages)
    # Without a teacher that runs, a stage brings to the device what it trains.
    teaching = loading.load_model(teacher, device if is_live else "cpu", prediction_type=prediction_type, config=config)
    require_same_prediction(teaching, learning, (teacher, student))
    denoiser.to(teaching.device)  # the student's other components are only saved
    if dry_run:
        _print_estimate(teaching, denoiser, stages, teraflops=device_tflops, processes=processes, sharded=fsdp)
        return
    training = out.with_name(f"{out.name}.training")
    if is_main_process():
        _announce(teaching, denoiser, stages, data, training, yes)
    with reporting(resumable=True) as report:
        examples = distill_pipeline(
            teaching,
            learning,
            data,
            training,
            stages=stages,
            device=device or fastest_device(),
            seed=seed,
            progress=lambda row: report("distil", int(row["done"]), int(row["total"]), f"loss {row['loss']:.3f}"),
        )
    if is_main_process():
        asdm.save_pipeline(learning, out, {"teacher": teacher})
        print_skipped(examples.skipped)
        say_path(f"written to {out}; log and checkpoints in {training}")


def _announce(teacher: Any, student: Any, stages: Sequence[Stage], data: str, folder: Path, yes: bool) -> None:
    """Print how long the training will take with the processes of this launch."""
    from asdm.estimates.forecast import training
    from asdm.estimates.machine import MachineSpeed

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = training(teacher, student, stages, data=data, folder=folder, processes=processes)
    announce(MachineSpeed(teacher).times(steps), yes=yes)


def _print_estimate(
    teacher: Any, student: Any, stages: Sequence[Stage], *, teraflops: float | None, processes: int, sharded: bool
) -> None:
    from asdm.distillation.estimate import estimate
    from asdm.distillation.recipes import as_yaml

    rows = estimate(teacher, student, stages, teraflops=teraflops, processes=processes, sharded=sharded)
    for table in estimate_tables(rows, processes):
        show(table)
    where = "on this machine" if teraflops is None else f"at {teraflops:g} TFLOP/s a device"
    say(
        f"about {duration(sum(row.seconds for row in rows))} in total {where}, without the communication between "
        "devices; memory without that of kernels and libraries. The recipe as a file:\n"
    )
    say_path(as_yaml(list(stages)))
