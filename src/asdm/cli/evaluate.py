"""`asdm evaluate`: speed and quality of a teacher and its students."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm.choices import IMAGE_TO_IMAGE_SAMPLES
from asdm.cli import loading
from asdm.cli.options import (
    GUIDANCE,
    MODEL,
    NAME,
    ConfigOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ImageToImageOption,
    PredictionTypeOption,
    ResultsFile,
    SeedOption,
    StrengthOption,
)
from asdm.cli.output import print_evaluation, say, warn_if_busy, warn_of_skipped
from asdm.cli.progress import reporting


def evaluate(
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
    out: ResultsFile = Path("evaluation.json"),
    images: Annotated[Path | None, typer.Option(help="The folder to save images to.", show_default=False)] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Measure speed and quality of a teacher and its students in one run."""
    from asdm.evaluation.image_folders import distinct_names
    from asdm.pipelines.clip import load_clip

    warn_of_skipped(data)
    claims: list[dict[str, Any]] = [{"prediction_type": prediction_type, "config": config}, *({} for _ in models[1:])]
    pipelines = {
        name: loading.load_model(model, device, dtype, **claim)
        for name, model, claim in zip(distinct_names(models), models, claims, strict=True)
    }
    warn_if_busy()
    with reporting() as report:
        evaluation = asdm.evaluate(
            pipelines,
            data=data,
            samples=samples,
            image_to_image=image_to_image,
            strength=strength,
            steps=steps,
            guidance_scale=guidance,
            seed=seed,
            rounds=rounds,
            quality=samples > 0,
            clip=load_clip(next(iter(pipelines.values()))),
            images_folder=images,
            progress=lambda title, done, total: report(f"images: {title}", done, total),
        )
    print_evaluation(evaluation)  # before it is saved, should that fail
    evaluation.save(out)
    say(f"written to {out}")
