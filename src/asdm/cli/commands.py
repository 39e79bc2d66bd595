"""The command line: parse, call the API, print. Nothing imports this."""

from __future__ import annotations

import errno
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asdm import checks
from asdm.cli.options import (
    DATA,
    GUIDANCE,
    MODEL,
    NAME,
    PART,
    POSITIVE,
    SPEEDUP,
    TEXT,
    CompensateOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    DistillRecipeOption,
    DtypeOption,
    FiguresFile,
    MacsOption,
    MapFile,
    ModelArgument,
    ParamsOption,
    PlanFile,
    PredictionTypeOption,
    PresetOption,
    RecipeOption,
    RepairOption,
    SeedOption,
    SensitivityOption,
    SpeedupOption,
    not_a_folder,
)
from asdm.edits.base import compensated
from asdm.errors import AsdmError, AsdmWarning, one_line

if TYPE_CHECKING:
    from asdm.evaluation.comparison import Evaluation
    from asdm.sensitivity.profile import RedundancyMap
    from asdm.student.plan import PruningPlan

app = typer.Typer(
    name="asdm",
    help="Make a Stable Diffusion pipeline smaller and faster, and prove what it gained and what it lost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
errors = Console(stderr=True)
STRENGTH = 0.6  # of image-to-image
SWITCH_AT = 0.34  # of the schedule; most of what a student loses is lost in the last third
SAVED_TOGETHER = 8  # images that `generate` draws before it saves them
SECONDS_BETWEEN_LINES = 15  # of progress, where no bar can be drawn


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2."""
    debug = "--debug" in sys.argv
    _quiet_libraries()
    try:
        status = app(standalone_mode=False)
    except AsdmError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except typer.Abort:
        _fail("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # an option or argument that typer refuses
            _refuse(error)
        told = _about_the_disk(error) or _about_the_memory(error)
        if debug or told is None:
            raise
        _fail(f"{told}; nothing that was there before is lost", 2)
    raise SystemExit(status or 0)


@app.callback()
def options(
    threads: Annotated[int | None, typer.Option(help="CPU threads to use; all by default.", min=1, max=1024)] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


@app.command()
def analyze(
    model: ModelArgument,
    data: DataOption = None,
    out: MapFile = None,
    cache: Annotated[
        float | None,
        typer.Option(
            help="Instead find when which features can be inherited between sampling steps, so that the UNet is this "
            "many times faster.",
            min=1,
            callback=SPEEDUP,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps, for --cache.", min=4, max=10_000)] = 25,
    plot: Annotated[
        Path | None, typer.Option(help="Where to draw it (PNG).", callback=not_a_folder, show_default=False)
    ] = None,
    sensitivity: SensitivityOption = None,
    compensate: CompensateOption = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            help="At how many time steps; by default 4, or 2 for large models.", min=1, max=1000, show_default=False
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Images or prompts to calibrate on.", min=1, max=10**6, show_default=False)
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Find what each unit of the UNet costs, and how far the prediction moves without it."""
    if cache is not None:
        if plot or sensitivity or compensate or timesteps:
            raise AsdmError(
                "--cache: looks at sampling steps, not at units; leave out --plot, --sensitivity, --compensate and "
                "--timesteps"
            )
        pipeline = _load(model, device, prediction_type=prediction_type, config=config)
        _calibrate_inheritance(pipeline, model, cache, out, data=data, steps=steps, samples=samples, seed=seed)
        return
    import asdm
    from asdm.evaluation.plots import redundancy_plot
    from asdm.evaluation.report import save_figure

    _look_at(data)
    pipeline = _load(model, device, prediction_type=prediction_type, config=config)
    _warn_if_busy()
    with _progress() as report:
        redundancy = asdm.analyze(
            pipeline,
            data=data,
            sensitivity=sensitivity,
            compensate=compensate,
            timesteps=timesteps,
            samples=samples,
            seed=seed,
            progress=lambda done, total, name: report("analyse", done, total, name),
        )
    out = out or Path("redundancy.json")
    _print_map(redundancy)  # before it is saved, should that fail
    redundancy.save(out)
    console.print(f"written to {out}", highlight=False)
    if plot is not None:
        save_figure(redundancy_plot(redundancy), plot)
        console.print(f"drawn in {plot}", highlight=False)


@app.command()
def plan(
    source: Annotated[
        str | None,
        typer.Argument(
            help=f"A map that `asdm analyze` wrote, or a model: {MODEL}.", callback=NAME, show_default=False
        ),
    ] = None,
    speedup: SpeedupOption = None,
    params: ParamsOption = None,
    macs: MacsOption = None,
    preset: PresetOption = None,
    compensate: CompensateOption = None,
    experts: Annotated[
        float | None,
        typer.Option(
            help="Let kept convolutions inherit removed ones as experts (CLME-CondConv), up to this part of the "
            "parameters, or this number of them.",
            callback=POSITIVE,
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        Literal["input", "input+time", "time"], typer.Option(help="What decides the experts' mixture.")
    ] = "input",
    refine: RepairOption = None,
    remeasure: Annotated[
        Path | None,
        typer.Option(help="Instead measure this plan's speed-up now, and write it into the plan.", show_default=False),
    ] = None,
    data: DataOption = None,
    out: PlanFile = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Choose the removals of least total sensitivity inside a budget; a speed-up is measured, on --device."""
    import asdm
    from asdm.planning.program import require_budget, require_params

    if remeasure is not None:
        if out is not None or any(value is not None for value in (speedup, params, macs, preset, experts, refine)):
            raise AsdmError("--remeasure: measures a plan as it is, and writes into its file; leave out other options")
        _remeasure(remeasure, source, device)
        return
    if source is None:
        raise AsdmError("name a map that `asdm analyze` wrote, or a model")
    out = out or Path("plan.json")
    require_budget(speedup, params, macs, preset)
    if compensate is None and source.startswith("random:"):
        compensate = "none"
    unet = None
    if source.endswith(".json"):
        if refine:
            raise AsdmError(f"--refine {refine}: a map has no weights to look at the plan with; name the model instead")
        if prediction_type or config:
            raise AsdmError(f"{source}: a map; --prediction-type and --config say what a model is: leave them out")
        redundancy = asdm.RedundancyMap.load(source)
    elif preset is not None and not refine:
        from asdm.pipelines.shapes import unet_without_weights
        from asdm.sensitivity.profile import structure_map

        redundancy = structure_map(unet_without_weights(source), source)  # which fixes a preset's edits
    else:
        _look_at(data)
        pipeline = _load(source, device, prediction_type=prediction_type, config=config)
        unet = pipeline.unet
        require_params(unet, params)
        _warn_if_busy()
        with _progress() as report:
            redundancy = asdm.analyze(
                pipeline,
                data=data,
                sensitivity=None if preset is None else "taylor",  # which chooses nothing in a preset
                compensate=compensate,
                seed=seed,
                progress=lambda done, total, name: report("analyse", done, total, name),
            )
    made = asdm.make_plan(
        redundancy,
        speedup=speedup,
        params=params,
        macs=macs,
        preset=preset,
        compensate=compensate,
        unet=unet,
        device=device or _fastest_device(),
        progress=lambda note: console.print(note, highlight=False),
    )
    if refine:
        with _progress() as report:
            made = asdm.refine_plan(
                pipeline,
                redundancy,
                made,
                data=data,
                rounds=refine,
                seed=seed,
                progress=lambda done, total, note: report("refine", done, total, note),
            )
    if experts is not None:
        if unet is None:
            from asdm.pipelines.random_models import random_unet

            unet = random_unet(redundancy.unet_config)
        made = asdm.add_cond_conv(made, unet, params=experts, router=router)
    made.save(out)
    for edit in made.edits:
        console.print(f"  {edit}", highlight=False)
    console.print(f"{_about_plan(made)}; written to {out}", highlight=False)


def _about_plan(plan: PruningPlan) -> str:
    figures, parts = plan.figures, [f"{len(plan.edits)} edits"]
    if figures is not None:
        by = " by its MACs" if figures.speedup_basis == "macs" else ""
        parts.append(f"UNet {figures.predicted_speedup:.2f}x faster as predicted{by}")
        if figures.measured_ratio is not None:
            parts[-1] += f", {figures.measured_ratio} as measured"
        if figures.predicted_sensitivity is not None:
            parts.append(f"sensitivity {figures.predicted_sensitivity:.4f} as the sum of its edits'")
            if figures.measured_sensitivity:
                parts[-1] += f", {figures.measured_sensitivity:.4f} as measured of all together"
    return "; ".join(parts)


def _remeasure(path: Path, model: str | None, device: str | None) -> None:
    """Measure a plan's speed-up on the model that it names, or another of the same architecture."""
    import asdm

    made = asdm.PruningPlan.load(path)
    model = model or (None if made.figures is None else made.figures.model)
    if model is None:
        raise AsdmError(f"{path}: does not say for which model it is; name the model before --remeasure")
    _warn_if_busy()
    made = asdm.remeasure_plan(made, _load(model, device).unet)
    made.save(path)
    assert made.figures is not None and made.figures.measured_ratio is not None
    target = made.figures.target.get("speedup", 0.0)
    short = f", short of the {target:g}x requested" if made.figures.measured_ratio.high < target else ""
    console.print(f"{_about_plan(made)}{short}; written to {path}", highlight=False)


def _warn_if_busy() -> None:
    """Say that other processes need the cores, before anything is measured."""
    from asdm.measure.load import look_at_load

    line = look_at_load()
    if line is not None:
        errors.print(line, highlight=False, soft_wrap=True)


@app.command()
def prune(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(help="A plan that `asdm plan` wrote, or one made by hand.")],
    out: Annotated[Path, typer.Option(help="The folder to write the pipeline to.")],
    data: DataOption = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Build the student that a plan describes: inherit the weights, fit the compensations, save the pipeline."""
    import asdm
    from asdm.files import require_ours

    require_ours(out, "pipeline")
    made = asdm.PruningPlan.load(plan)
    _look_at(data)
    pipeline = _load(model, device, prediction_type=prediction_type, config=config)
    student = asdm.build_student(pipeline.unet, made)
    fitted = None
    if compensated(made.edits):
        with _progress() as report:
            fitted = asdm.fit_compensation(
                pipeline,
                student,
                data=data,
                seed=seed,
                progress=lambda done, total, name: report("compensate", done, total, name),
            )
    asdm.save_pipeline(asdm.with_unet(pipeline, student), out, {"teacher": model})
    before, after = (sum(p.numel() for p in unet.parameters()) / 1e6 for unet in (pipeline.unet, student))
    console.print(f"{out}: UNet of {after:.2f}M parameters, from {before:.2f}M", highlight=False)
    if fitted is not None:
        console.print(
            f"relative squared error of the prediction: {fitted.error_before:.4f} pruned, "
            f"{fitted.error_after:.4f} with the fitted compensations",
            highlight=False,
        )


@app.command("prepare-data")
def prepare_data(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help=DATA, callback=NAME, show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write shards to.")],
    batch_size: Annotated[int, typer.Option(help="Images encoded at a time.", min=1, max=10**6)] = 16,
    steps: Annotated[
        int, typer.Option(help="Sampling steps, where MODEL draws images to captions.", min=1, max=10_000)
    ] = 25,
    ignore_missing_shards: Annotated[
        bool,
        typer.Option(
            "--ignore-missing-shards", help="Go without shards that cannot be loaded, or with what came of them."
        ),
    ] = False,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Compute the latents and prompt embeddings of DATA once, for `distill --data`; run again to resume."""
    import asdm
    from asdm.data.prepared import require_usable
    from asdm.files import require_ours

    require_ours(out, "prepared")
    require_usable(data)
    with _progress(resumable=True) as report:
        prepared = asdm.prepare_data(
            _load(model, device, prediction_type=prediction_type, config=config),
            data,
            out,
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            ignore_missing_shards=ignore_missing_shards,
            progress=lambda done, total: report("prepare", done, total, "pieces"),
        )
    if _is_main_process():
        _print_skipped(prepared.skipped)
        console.print(f"{len(prepared)} samples in {out}", highlight=False, soft_wrap=True)


@app.command()
def distill(
    teacher: ModelArgument,
    student: Annotated[
        str,
        typer.Argument(
            help="A folder that `asdm prune`, `compress` or `distill` wrote, or the teacher again.", callback=NAME
        ),
    ],
    data: Annotated[str, typer.Option("--data", help=DATA, callback=NAME)],
    out: Annotated[Path, typer.Option(help="The folder to write the distilled pipeline to.")],
    steps: Annotated[int | None, typer.Option(help="Training steps, 1000 by default.", min=1, max=10**9)] = None,
    recipe: DistillRecipeOption = "joint",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages with their time and memory; train nothing.")
    ] = False,
    device_tflops: Annotated[
        float | None,
        typer.Option(
            help="In a dry run: for a device that sustains so many TFLOP/s, instead of this one.",
            min=0.001,
            callback=POSITIVE,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="In a dry run: how many devices share each batch.", min=1, max=10**6)
    ] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="In a dry run: they share what is trained, too.")] = False,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Train a student to do as its teacher does, or what it does in a few steps; run again to resume."""
    import asdm
    from asdm.data.prepared import require_usable
    from asdm.distillation.recipes import recipe_stages
    from asdm.files import require_ours

    length = _training_steps(steps, recipe)
    if not dry_run and (device_tflops is not None or processes > 1 or fsdp):
        raise AsdmError(
            "--device-tflops, --processes and --fsdp only say what to estimate: add --dry-run, or start several "
            "processes by accelerate launch"
        )
    require_ours(out, "pipeline")
    require_usable(data)
    teaching = _load(teacher, device, prediction_type=prediction_type, config=config)
    learning = _load(student, "cpu", prediction_type=prediction_type)
    _require_same_prediction(student, learning, teacher, teaching)
    learning.unet.to(teaching.device)  # its other parts are only saved
    chosen = recipe_stages(recipe, learning.unet, length)
    if dry_run:
        _print_estimate(teaching, learning.unet, chosen, teraflops=device_tflops, processes=processes, sharded=fsdp)
        return
    training = out.with_name(f"{out.name}.training")
    with _progress(resumable=True) as report:
        examples = asdm.distill(
            teaching,
            learning.unet,
            data,
            training,
            stages=chosen,
            seed=seed,
            progress=lambda row: report("distil", int(row["done"]), int(row["total"]), f"loss {row['loss']:.3f}"),
        )
    if _is_main_process():
        if chosen[-1].scope == "consistency":
            learning.scheduler = asdm.lcm_scheduler(teaching.scheduler.config, chosen[-1].consistency.solver_steps)
        asdm.save_pipeline(learning, out, {"teacher": teacher})
        _print_skipped(examples.skipped)
        console.print(f"written to {out}; log and checkpoints in {training}", highlight=False)


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help=f"The teacher, then students: {MODEL}.", callback=NAME, show_default=False)
    ],
    data: DataOption = None,
    samples: Annotated[int, typer.Option(help="Images per split; 0 measures speed alone.", min=0, max=10**6)] = 128,
    steps: Annotated[int, typer.Option(help="Sampling steps, of all but few-step models.", min=1, max=10_000)] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale.", callback=GUIDANCE, show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of the UNet call.", min=1, max=10_000)] = 10,
    out: FiguresFile = Path("evaluation.json"),
    images: Annotated[Path | None, typer.Option(help="Where to keep the images.", show_default=False)] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Measure speed and quality of a teacher and its students in one run."""
    import asdm
    from asdm.evaluation.comparison import distinct_names
    from asdm.pipelines.clip import load_clip

    _look_at(data)
    said = [{"prediction_type": prediction_type, "config": config}, *({} for _ in models[1:])]
    places = zip(distinct_names(models), models, said, strict=True)
    pipelines = {name: _load(place, device, dtype, **known) for name, place, known in places}
    _warn_if_busy()
    with _progress() as report:
        figures = asdm.evaluate(
            pipelines,
            data=data,
            samples=samples,
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
            rounds=rounds,
            quality=samples > 0,
            clip=load_clip(next(iter(pipelines.values()))),
            images_folder=images,
            progress=lambda title, done, total: report(f"images: {title}", done, total, ""),
        )
    _print_evaluation(figures)  # before they are saved, should that fail
    figures.save(out)
    console.print(f"written to {out}", highlight=False)


@app.command()
def generate(
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", callback=TEXT, show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write images to.")] = Path("images"),
    image: Annotated[
        Path | None, typer.Option(help="Start from this image (image-to-image).", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where --image shall be drawn anew (inpainting).", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help=f"How far from --image to go, {STRENGTH:g} by default.",
            min=0.01,
            max=1.0,
            callback=POSITIVE,
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the images in pixels, to which --image is cropped; by default the model's own.",
            min=1,
            max=8192,
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; by default 25, or 4 for few-step models.", min=1, max=10_000)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale.", callback=GUIDANCE, show_default=False)
    ] = None,
    cfg_cutoff: Annotated[
        float,
        typer.Option(
            help="Part of the steps that are guided; each of the others is half the work.",
            max=1.0,
            callback=POSITIVE,
        ),
    ] = 1.0,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Let most steps reuse features of others: a number, how many times faster the UNet shall be, or "
            "the file of a schedule that `asdm analyze --cache` wrote.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    low_noise_model: Annotated[
        str | None,
        typer.Option(
            help="The original, whose UNet takes over from the student's for the last steps; memory holds both.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    switch_at: Annotated[
        float | None,
        typer.Option(
            help=f"The part of the schedule below which --low-noise-model takes over, {SWITCH_AT:g} by default.",
            callback=PART,
            show_default=False,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Draw images with a teacher or a student: text-to-image, image-to-image with --image, inpainting with --mask."""
    import asdm
    from asdm.diffusion.conditioning import image_size, require_size
    from asdm.diffusion.generation import require_steps
    from asdm.images import cropped, open_image, to_images

    if strength is not None and image is None:
        raise AsdmError(f"--strength {strength:g}: has no effect without --image; name one, or leave it out")
    if switch_at is not None and low_noise_model is None:
        raise AsdmError(f"--switch-at {switch_at:g}: has no effect without --low-noise-model; name a model there")
    start = open_image(image) if image is not None else None
    hole = open_image(mask).convert("L") if mask is not None else None
    if start is not None and hole is not None and start.size != hole.size:
        raise AsdmError(f"{mask}: {hole.size} pixels; it must be of the size of {image}, {start.size}")
    if out.is_file():
        raise AsdmError(f"{out}: a file; name a folder")
    inheritance = None if cache is None else _inheritance(cache)
    pipeline = _load(model, device, dtype, prediction_type=prediction_type, config=config)
    if steps is not None:
        require_steps(pipeline, steps)
    side = image_size(pipeline) if size is None else size
    require_size(pipeline, side)
    if low_noise_model is not None:
        original = _original_unet(
            low_noise_model, model, pipeline, dtype, prediction_type=prediction_type, config=config
        )
        below = SWITCH_AT if switch_at is None else switch_at
        pipeline = asdm.switch_unets(pipeline, [pipeline.unet, original], below=[below])
    inheriting = nullcontext() if inheritance is None else asdm.cache_features(pipeline, **inheritance)
    if start is not None:
        start = cropped(start, side)
    if hole is not None:
        hole = cropped(hole, side)
    paths: list[Path] = []
    with inheriting, _progress(otherwise=f"images that were done are in {out}") as report:
        for first in range(0, len(prompts), SAVED_TOGETHER):
            some = prompts[first : first + SAVED_TOGETHER]
            pixels = asdm.generate(
                pipeline,
                some,
                steps=steps,
                guidance_scale=guidance,
                cfg_cutoff=cfg_cutoff,
                seed=seed + first,
                image=start,
                mask=hole,
                strength=STRENGTH if strength is None else strength,
                size=size if start is None else None,
                progress=lambda done, _, first=first: report("images", first + done, len(prompts), ""),  # type: ignore[misc]
            )
            out.mkdir(parents=True, exist_ok=True)
            for prompt, drawn in zip(some, to_images(pixels), strict=True):
                paths.append(_free_name(out, prompt))
                drawn.save(paths[-1])
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[Literal["openvino", "onnx"], typer.Option("--to", help="The format of the graphs.")],
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the images in pixels; by default the model's own.", min=1, max=8192, show_default=False
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Weights, and the UNet's convolutions, in 8 bits.")] = False,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="With --int8: only the weights.")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"With --int8, what the ranges of 8 bits are taken from. {DATA}", callback=NAME, show_default=False
        ),
    ] = None,
    cache: Annotated[
        int | None,
        typer.Option(
            help="Also the UNet in two graphs, of which the inner one can be inherited (cache_features); so many of "
            "the last layers are in the outer one.",
            min=1,
            max=100,
            show_default=False,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
) -> None:
    """Write a teacher or a student as OpenVINO or ONNX graphs, in a folder that optimum loads."""
    import asdm
    from asdm.files import require_ours

    if weights_only and not int8:
        raise AsdmError("--weights-only goes with --int8")
    require_ours(out, "export")
    _look_at(data)
    with _progress() as report:
        made = asdm.export(
            _load(model, "cpu", prediction_type=prediction_type, config=config),
            out,
            to,
            size=size,
            int8=("weights" if weights_only else "activations") if int8 else None,
            data=data,
            cache=cache,
            progress=lambda name, done, total: report("export", done, total, name),
        )
    for name, difference in made.differences.items():
        console.print(f"{name}: at most {difference:.2%} off torch's outputs", highlight=False)
    console.print(f"written to {made.folder}", highlight=False, soft_wrap=True)


@app.command()
def compress(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The folder to write everything to.")],
    speedup: SpeedupOption = None,
    params: ParamsOption = None,
    macs: MacsOption = None,
    preset: PresetOption = None,
    sensitivity: SensitivityOption = None,
    compensate: CompensateOption = None,
    refine: RepairOption = None,
    data: DataOption = None,
    steps: Annotated[
        int | None, typer.Option(help="Distillation steps, 1000 by default; 0 prunes only.", min=0, max=10**9)
    ] = None,
    recipe: RecipeOption = "joint",
    samples: Annotated[int, typer.Option(help="Images per split in the evaluation.", min=0, max=10**6)] = 128,
    sampling_steps: Annotated[int, typer.Option(help="Sampling steps in the evaluation.", min=1, max=10_000)] = 25,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> None:
    """Analyse, plan, prune, distil, evaluate and report, in a row; run again to go on."""
    _compress(
        model,
        out,
        speedup=speedup,
        params=params,
        macs=macs,
        preset=preset,
        sensitivity=sensitivity,
        compensate=compensate,
        refine=refine,
        data=data,
        steps=_training_steps(steps, recipe),
        recipe=recipe,
        samples=samples,
        sampling_steps=sampling_steps,
        prediction_type=prediction_type,
        config=config,
        device=device or _fastest_device(),
        seed=seed,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write everything to.")] = Path("asdm-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Distil 1,500 steps, and judge 128 seen and all 102 held-out prompts.")
    ] = False,
) -> None:
    """Compress the embedded Stable Diffusion pipeline 1.5x and show what that gains and loses."""
    length = {"steps": 1500, "samples": 128} if full else {"steps": 320, "samples": 64}
    _compress("demo", out, speedup=1.5, refine=4, data="demo", **length)


@app.command()
def benchmark(
    models: Annotated[
        list[str] | None,
        typer.Argument(help=f"One or more models, demo by default: {MODEL}.", callback=NAME, show_default=False),
    ] = None,
    students: Annotated[
        list[Path] | None,
        typer.Option("--student", help="A student of the first model, alone and in the stack.", show_default=False),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help=f"{DATA}; none for speed alone.", callback=NAME, show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(help="Images per split.", min=2, max=10**6)] = 64,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=4, max=10_000)] = 25,
    rounds: Annotated[int, typer.Option(help="Timed images of each.", min=1, max=10_000)] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only those whose names contain this, or one of several.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write figures and plots to.")] = Path("benchmark"),
    images: Annotated[Path | None, typer.Option(help="Where to keep the images.", show_default=False)] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Ways to make a pipeline faster, ours and our peers', in one run: speed and what it costs in quality.

    Results of other models that are in the folder already stay there.
    """
    from asdm.benchmark.methods import methods, of, preset_students, with_dpm_solver
    from asdm.benchmark.plot import contest_plot
    from asdm.benchmark.run import Benchmark, BenchmarkRun, benchmark_rows
    from asdm.cli.tables import benchmark_table
    from asdm.diffusion.generation import is_few_step
    from asdm.evaluation.comparison import distinct_names, folder_name
    from asdm.evaluation.report import save_figure
    from asdm.measure.limits import machine_limits
    from asdm.measure.load import LoadMeter, busy_line
    from asdm.pipelines.derived import without_safety_checker

    models = models or ["demo"]
    twice = next((place for place in models if models.count(place) > 1), None)
    if twice is not None:
        raise AsdmError(f"{twice}: named twice; name each model once")
    if out.is_file():
        raise AsdmError(f"{out}: a file; name a folder")
    _look_at(data)
    names = distinct_names([str(folder) for folder in students or ()], shortest=True)
    results = out / "benchmark.json"
    made = Benchmark.load(results) if results.exists() else Benchmark()
    limits: dict[str, dict[str, float]] = {}
    for place in models:
        said: dict[str, Any] = {"prediction_type": prediction_type, "config": config} if place == models[0] else {}
        pipeline = without_safety_checker(with_dpm_solver(_load(place, device, dtype, **said)))
        limits = limits or machine_limits(pipeline.device)
        seen = "demo" if data is None and place == "demo" else None if place.startswith("random:") else data
        taught: dict[str, Any] = preset_students(pipeline) if place.startswith("random:") else {}
        few_step: dict[str, Any] = {}
        for name, folder in zip(names, students or (), strict=True) if place == models[0] else ():
            student = _load(str(folder), device, dtype)
            (few_step if is_few_step(student) else taught)[name] = of(student.unet)
        on_cpu = pipeline.device.type == "cpu"
        entries = methods(steps, taught, few_step=few_step, data=seen, graphs=on_cpu)
        if only:
            entries = [e for e in entries if e.group == "original" or any(part in e.name for part in only)]
        _warn_if_busy()
        meter = LoadMeter()
        with _progress(otherwise=f"models that were done before are in {results}") as report:

            def advanced(title: str, done: int, total: int, place: str = place) -> None:
                report(f"{title}, {place}", done, total, "")

            found = benchmark_rows(
                pipeline,
                entries,
                place=place,
                data=seen,
                samples=samples,
                rounds=rounds,
                seed=seed,
                limits=limits,
                images_folder=images,
                progress=advanced,
            )
        meter.mark()
        others = meter.other_cores()
        run = BenchmarkRun.now(device=pipeline.device, rounds=rounds, seed=seed, limits=limits, other_cores=others)
        made = made.with_place(place, run, found)
        made.save(results)
        console.print(benchmark_table(found))
        if line := busy_line(others, meter.contention()):
            console.print(f"while this was measured, {line}", highlight=False)
        if seen is not None:
            title = f"{place}, {run.machine}, {run.threads} threads"
            save_figure(contest_plot(found, title), out / f"benchmark_{folder_name(place)}.png")
    for precision, best in limits.items():
        figures = ", ".join(f"{what} {value:.0f}" for what, value in best.items())
        console.print(f"this machine's best in {precision}, GFLOP/s: {figures}", highlight=False)
    console.print(f"written to {out}", highlight=False)


@app.command("demo-build")
def demo_build(
    stage: Annotated[
        str, typer.Argument(help="images, tokenizer, clip, vae, unet, assemble, check; all is all of them but images.")
    ] = "all",
    folder: Annotated[Path, typer.Option(help="Where checkpoints and the result go.")] = Path("runs/demo-build"),
    minutes: Annotated[
        float | None, typer.Option(help="Save and stop after so long.", callback=POSITIVE, show_default=False)
    ] = None,
    warm_start: Annotated[bool, typer.Option("--warm-start", help="Train the embedded UNet further.")] = False,
    noto_font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf, for `images`.", show_default=False)
    ] = None,
    twemoji: Annotated[
        Path | None, typer.Option(help="Twemoji's 64 px PNGs, for `images`.", show_default=False)
    ] = None,
) -> None:
    """Build the embedded pipeline again by its recipe; each stage resumes where it was stopped."""
    from asdm.demo.build import build

    with _progress(resumable=True) as report:
        build(
            stage,
            folder,
            minutes=minutes,
            warm_start=warm_start,
            noto_font=noto_font,
            twemoji_folder=twemoji,
            progress=report,
            say=lambda text: console.print(text, highlight=False),
        )


def _look_at(data: str | None) -> None:
    """Refuse data that cannot be used before the work begins, and name what of it will be passed over."""
    if data is None:
        return
    from asdm.data.prepared import is_prepared, require_usable
    from asdm.data.sources import open_data, open_source

    if is_prepared(data) or open_source(data).remote:
        require_usable(data)
    else:
        _print_skipped(open_data(data, "all").skipped)


def _load(model: str, device: str | None, dtype: str = "float32", **said: Any) -> Any:
    import torch

    import asdm

    return asdm.load_pipeline(model, dtype=getattr(torch, dtype), device=device or _fastest_device(), **said)


def _original_unet(original: str, student: str, drawing: Any, dtype: str, **said: Any) -> Any:
    """Of the original's pipeline its UNet alone, on the student's device; memory need not hold the rest twice."""
    teaching = _load(original, "cpu", dtype, **said)
    _require_same_prediction(student, drawing, original, teaching)
    return teaching.unet.to(drawing.device)


def _require_same_prediction(student: str, learning: Any, original: str, teaching: Any) -> None:
    for field, default in (("prediction_type", "epsilon"), ("rescale_betas_zero_snr", False)):
        kinds = [pipeline.scheduler.config.get(field, default) for pipeline in (learning, teaching)]
        if kinds[0] != kinds[1]:
            says = "predicts" if field == "prediction_type" else f"has {field}"
            raise AsdmError(
                f"{student}: {says} {kinds[0]}, {original} {kinds[1]}: it was not pruned from such a model; name the "
                "one that it was pruned from"
            )


def _training_steps(steps: int | None, recipe: str) -> int:
    from asdm.distillation.recipes import RECIPES

    if steps is not None and recipe not in RECIPES and Path(recipe).is_file():
        raise AsdmError(f"--steps {steps}: {recipe} is a file, whose stages have their own; leave --steps out")
    return 1000 if steps is None else steps


def _fastest_device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _compress(model: str, out: Path, **settings: Any) -> None:
    import asdm

    with _progress(resumable=True) as report:

        def reported(title: str, done: int, total: int, note: str) -> None:
            if (title, done) == ("analyse", 0):
                _warn_if_busy()
            report(title, done, total, note)

        made = asdm.compress(model, out, progress=reported, **settings)
    _print_evaluation(made.evaluation)
    _print_skipped(made.skipped)
    console.print(f"\n[bold]{made.headline}[/bold]", highlight=False)
    console.print(f"pipeline: {made.folder}\nreport:   {made.report}", highlight=False)


@contextmanager
def _progress(resumable: bool = False, otherwise: str = "nothing was written") -> Iterator[Any]:
    """A bar for each title, with time left; yields `report(title, done, total, note)`. When it is interrupted, it says
    how to go on, or `otherwise`."""
    bars: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=errors, disable=not _is_main_process())
    told = time.monotonic()

    def report(title: str, done: int, total: int, note: str) -> None:
        nonlocal told
        silent = errors.is_terminal or not _is_main_process()
        if not silent and time.monotonic() - told > SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            errors.print(f"{title} {done}/{total} {note}", highlight=False, markup=False, soft_wrap=True)
        if not bars:
            progress.start()  # not before: it would leave an empty line
        if title not in bars:
            bars[title] = progress.add_task(title, total=total, note=note)
        progress.update(bars[title], completed=done, total=total, note=note)

    try:
        yield report
    except KeyboardInterrupt:
        advice = "run the same command again to go on from here" if resumable else otherwise
        errors.print(f"interrupted; {advice}", highlight=False)
        raise typer.Exit(130) from None
    finally:
        if bars:
            progress.stop()


def _calibrate_inheritance(pipeline: Any, model: str, speedup: float, out: Path | None, **settings: Any) -> None:
    import asdm
    from asdm.caching.calibration import FILE_NAME

    with _progress() as report:
        schedule = asdm.calibrate_cache(
            pipeline,
            speedup=speedup,
            **settings,
            progress=lambda done, total, name: report("calibrate", done, total, name),
        )
    out = out or (Path(model) if Path(model).is_dir() else Path()) / FILE_NAME
    schedule.save(out)
    console.print(
        f"{len(schedule.computed)} of {schedule.steps} steps compute: {', '.join(map(str, schedule.computed))}; the "
        f"others compute the last {schedule.depth} of the layers and "
        f"{'extrapolate' if schedule.order else 'copy'} what these read. The UNet's speed-up is {schedule.ratio} "
        f"({schedule.whole_ms:.0f} ms a whole call, {schedule.cached_ms:.0f} ms one that inherits); distance of "
        f"the final latents {schedule.distance:.2g}, of copies at as many even steps {schedule.uniform_distance:.2g}",
        highlight=False,
    )
    console.print(f"written to {out}", highlight=False, soft_wrap=True)


def _inheritance(text: str) -> dict[str, Any]:
    """Settings of `cache_features`: a number is a speed-up, all else a file."""
    from asdm import CacheSchedule

    try:
        speedup = float(text)
    except ValueError:
        return {"schedule": CacheSchedule.load(text)}
    checks.SPEEDUP("--cache", speedup)
    return {"speedup": speedup}


def _print_map(redundancy: RedundancyMap) -> None:
    from asdm.cli.tables import map_table

    console.print(map_table(redundancy))
    console.print(
        f"UNet: {redundancy.parameters / 1e6:.1f}M parameters, {redundancy.gmacs:.2f} GMACs with attention products "
        f"({redundancy.gmacs_without_attention:.2f} without), {redundancy.latency_ms:.0f} ms at batch 2 "
        f"({redundancy.dtype}, {redundancy.threads} threads). "
        f"Sensitivity by {redundancy.estimator} took {redundancy.unet_forwards:.0f} UNet calls' time "
        f"(an exact ablation needs {redundancy.necessary_forwards:.0f}), "
        f"{redundancy.seconds:.0f} s in all.",
        highlight=False,
    )


def _print_evaluation(figures: Evaluation) -> None:
    from asdm.cli.tables import quality_table, speed_table

    console.print(speed_table(figures))
    if figures.busy_line is not None:
        console.print(f"while this was measured, {figures.busy_line}", highlight=False)
    if not figures.quality:
        return
    console.print(quality_table(figures))
    console.print(
        "Concept (top-1, top-5), style and KID by EfficientNet-Lite0 features; R@1 by the pipeline's own CLIP; "
        "distance to the first model's images of the same seeds.",
        style="dim",
        highlight=False,
    )


def _print_estimate(teaching: Any, student: Any, stages: Any, **devices: Any) -> None:
    from asdm.cli.tables import duration, estimate_tables
    from asdm.distillation.estimate import estimate
    from asdm.distillation.recipes import as_yaml

    rows = estimate(teaching, student, stages, **devices)
    for table in estimate_tables(rows, devices["processes"]):
        console.print(table)
    tflops = devices["teraflops"]
    where = "on this machine" if tflops is None else f"at {tflops:g} TFLOP/s a device"
    console.print(
        f"in all about {duration(sum(row.seconds for row in rows))} {where}, without what devices exchange, and what "
        "their kernels and libraries hold. The recipe as a file:\n",
        highlight=False,
    )
    console.print(as_yaml(stages), highlight=False, markup=False)


def _print_skipped(skipped: dict[str, str]) -> None:
    if not skipped:
        return
    errors.print(f"{len(skipped)} of the data's files were skipped:", highlight=False)
    for name, reason in list(skipped.items())[:10]:
        line = f"  {name}: {reason}".encode("utf-8", "replace").decode()  # a name that is no text
        errors.print(line, highlight=False, markup=False)
    if len(skipped) > 10:
        errors.print(f"  and {len(skipped) - 10} more", highlight=False)


def _free_name(folder: Path, prompt: str) -> Path:
    stem = "".join(c if c.isalnum() else "_" for c in prompt)[:60].strip("_") or "image"
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path


def _quiet_libraries() -> None:
    """Keep advice that a user of this tool cannot act on off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any) -> None:
        if not issubclass(category, AsdmWarning):
            shown(message, category, *place)
        elif _is_main_process():
            errors.print(f"note: {message}", highlight=False, markup=False, soft_wrap=True)

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.simplefilter("always", AsdmWarning)


_OF_THE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EIO,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def _about_the_disk(error: Exception) -> str | None:
    """What to tell of an error that the disk or a path caused; None for any other."""
    if isinstance(error, OSError) and (isinstance(error, PermissionError) or error.errno in _OF_THE_DISK):
        return f"{error.filename or 'output'}: {error.strerror}"
    # safetensors tells a full disk by an exception of its own
    if any(words in str(error) for words in ("No space left on device", "Disk quota exceeded")):
        return one_line(error)
    return None


def _about_the_memory(error: Exception) -> str | None:
    """What to tell where memory was too small, the device's or the machine's; None for any other error."""
    words = ("out of memory", "can't allocate memory", "Unable to allocate", "not enough memory")
    if isinstance(error, MemoryError) or any(each in str(error) for each in words):
        return (
            f"memory is too small for this ({one_line(error)}): take smaller images, fewer at a time, or another device"
        )
    return None


def _refuse(error: Any) -> NoReturn:
    """What typer says of a command line that it cannot parse, in one line; its help where nothing was named."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(error.exit_code)
    where = getattr(getattr(error, "ctx", None), "command_path", "asdm")
    given = error.__cause__.errors()[0]["input"] if hasattr(error.__cause__, "errors") else None
    value = f" (given: {one_line(repr(given), 80)})" if given is not None else ""
    _fail(f"{one_line(error.format_message(), 300).rstrip('.')}{value}; see {where} --help", 2)


def _fail(message: str, status: int) -> NoReturn:
    message = message.encode("utf-8", "replace").decode()  # a path that is no text
    errors.print(f"error: {message}", highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
