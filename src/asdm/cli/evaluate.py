"""`asdm evaluate`: speed and quality of a teacher and its students, or their quality by a published protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES, ImageLayout, ProtocolName
from asdm.cli import loading
from asdm.cli.evaluate_protocol import by_protocol, for_scorer, require_options
from asdm.cli.options import (
    GUIDANCE,
    MODEL,
    NAME,
    SIDE,
    TEXT,
    ConfigOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ImageToImageOption,
    PredictionTypeOption,
    SeedOption,
    StrengthOption,
    not_a_folder,
    require_effect,
    require_folder,
)
from asdm.cli.output import print_evaluation, say_path, warn_if_busy, warn_of_skipped
from asdm.cli.progress import reporting

_PROTOCOL, _SCORER = "With --protocol", "With --layout"


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str], typer.Argument(help=f"The teacher, then students: {MODEL}.", callback=NAME, show_default=False)
    ],
    data: DataOption = None,
    samples: Annotated[int, typer.Option(help="Images per split; 0 measures speed only.", min=0, max=10**6)] = 128,
    image_to_image: ImageToImageOption = IMAGE_TO_IMAGE_SAMPLES,
    strength: StrengthOption = None,
    steps: Annotated[int, typer.Option(help="Sampling steps, except of few-step models.", min=1, max=10_000)] = 25,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale.", callback=GUIDANCE, show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of the denoiser call.", min=1, max=10_000)] = 10,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write the results to, by default evaluation.json, with --protocol in its folder.",
            callback=not_a_folder,
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="The folder to save images to; with --protocol the folder of real images to compare with.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        ProtocolName | None,
        typer.Option(
            help="Measure quality as published: coco30k as BK-SDM; demo the same on the embedded images.",
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="The prompts: COCO's captions_val2014.json, a .csv, .jsonl or .parquet, or one prompt a line.",
            callback=NAME,
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="The first prompts alone; also with --layout.",
            min=1,
            max=10**6,
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="all, or some of fid, fd, is, clip, kid, cmmd, fd-dinov2, lpips, ssim, pickscore, hpsv2, with commas "
            "between them; NAME=WHERE takes a network from a folder or a Hub id. By default the protocol's own.",
            callback=TEXT,
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="A folder with the networks' weights, where they cannot be downloaded.",
            callback=NAME,
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the sampled images in pixels, by default the model's own; also with --layout.",
            min=8,
            max=8192,
            callback=SIDE,
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images at a time, by default 32 for small images, else 1; also with --layout.",
            min=1,
            max=10_000,
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="The folder of images, features and results, by default evaluation-PROTOCOL or evaluation-LAYOUT. The "
            "same command resumes there.",
            callback=NAME,
            show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    layout: Annotated[
        ImageLayout | None,
        typer.Option(
            help="Generate the images that GenEval's or DPG-Bench's own scorer reads.",
            show_default=False,
            rich_help_panel=_SCORER,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="The benchmark's prompts: evaluation_metadata.jsonl; dpg_bench.csv or a folder of ID.txt.",
            callback=NAME,
            show_default=False,
            rich_help_panel=_SCORER,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Measure speed and quality of a teacher and its students in one run; or quality by a published protocol.

    Several processes share a protocol's work: accelerate launch -m asdm evaluate MODEL STUDENT --protocol coco30k.
    """
    require_options(context, protocol, layout)
    if protocol is None and layout is None:
        require_effect(context, ("data", "images") if samples == 0 else (), "with --samples 0, without images")
        require_effect(context, ("strength",) if image_to_image == 0 else (), "with --image-to-image 0")
        require_folder(images)
    warn_of_skipped(data)
    shared: dict[str, Any] = {"limit": limit, "size": size, "seed": seed, "batch_size": batch_size}
    load = _loader(models, device, dtype, prediction_type=prediction_type, config=config)
    if layout is not None:
        place = folder or Path(f"evaluation-{layout}")
        return for_scorer(load, layout, prompts, place, steps=steps, guidance_scale=guidance, **shared)
    if protocol is not None:
        given = {"images": images, "captions": captions, "metrics": metrics, "weights": weights}
        place = folder or Path(f"evaluation-{protocol}")
        return by_protocol(load, protocol, place, out, steps=steps, guidance_scale=guidance, **given, **shared)
    _measure(
        load(),
        out or Path("evaluation.json"),
        data=data,
        samples=samples,
        image_to_image=image_to_image,
        strength=strength,
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        rounds=rounds,
        quality=samples > 0,
        images_folder=images,
    )


def _loader(models: list[str], device: str | None, dtype: str, **claims: Any) -> Any:
    """Return a function that loads the models, by name; the claims are about the first."""

    def load() -> dict[str, Any]:
        from asdm.evaluation.image_folders import distinct_names

        of_all: list[dict[str, Any]] = [claims, *({} for _ in models[1:])]
        return {
            name: loading.load_model(model, device, dtype, **claim)
            for name, model, claim in zip(distinct_names(models), models, of_all, strict=True)
        }

    return load


def _measure(pipelines: dict[str, Any], out: Path, **settings: Any) -> None:
    """Measure speed and quality, save and print them."""
    from asdm.pipelines.clip import load_clip

    warn_if_busy()

    def left() -> str:
        images = settings["images_folder"]
        kept = images is not None and images.is_dir()
        return f"no results were written; finished images are in {images}" if kept else "nothing was written"

    with reporting(otherwise=left) as report:
        evaluation = asdm.evaluate(
            pipelines,
            clip=load_clip(next(iter(pipelines.values()))),
            progress=lambda title, done, total: report(f"images: {title}", done, total),
            **settings,
        )
    evaluation.save(out)
    print_evaluation(evaluation)
    say_path(f"written to {out}")
