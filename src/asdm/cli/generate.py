"""`asdm generate`: images from prompts, by a teacher or a student."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

import asdm
from asdm import checks
from asdm.cli import loading
from asdm.cli.options import (
    FRACTION,
    GUIDANCE,
    NAME,
    POSITIVE,
    TEXT,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    PredictionTypeOption,
    SeedOption,
)
from asdm.cli.output import say_path
from asdm.cli.progress import reporting
from asdm.errors import AsdmError

STRENGTH = 0.6  # of image-to-image
SWITCH_AT = 0.34  # of the schedule; a student loses most of its quality in the last third


def generate(
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", callback=TEXT, show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write images to.")] = Path("images"),
    image: Annotated[
        Path | None, typer.Option(help="Start from this image (image-to-image).", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where --image is replaced (inpainting).", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help=f"How much --image may change, {STRENGTH:g} by default.",
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
            help="Fraction of the steps with classifier-free guidance; each later step takes half the work.",
            max=1.0,
            callback=POSITIVE,
        ),
    ] = 1.0,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Feature caching: reuse features of earlier steps in most steps. The value is the denoiser's speed-up "
            "(2), or the file of a schedule that `asdm analyze --cache` wrote.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    low_noise_model: Annotated[
        str | None,
        typer.Option(
            help="The original model; its denoiser replaces the student's in the last steps. Memory holds both.",
            callback=NAME,
            show_default=False,
        ),
    ] = None,
    switch_at: Annotated[
        float | None,
        typer.Option(
            help=f"Fraction of the schedule that is left when --low-noise-model takes over, {SWITCH_AT:g} by default.",
            callback=FRACTION,
            show_default=False,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
) -> None:
    """Generate images: text-to-image, image-to-image with --image, inpainting with --mask."""
    from asdm.diffusion.conditioning import image_size, require_size
    from asdm.diffusion.generation import require_steps
    from asdm.diffusion.image_files import generate_files, open_inputs

    if strength is not None and image is None:
        raise AsdmError(f"--strength {strength:g}: has no effect without --image; name one, or leave it out")
    if switch_at is not None and low_noise_model is None:
        raise AsdmError(f"--switch-at {switch_at:g}: has no effect without --low-noise-model; name a model there")
    inputs = open_inputs(image, mask)
    if out.is_file():
        raise AsdmError(f"{out}: a file; name a folder")
    settings = None if cache is None else _cache_settings(cache)
    claims = {"prediction_type": prediction_type, "config": config}
    pipeline = loading.load_model(model, device, dtype, **claims)
    if steps is not None:
        require_steps(pipeline, steps)
    require_size(pipeline, image_size(pipeline) if size is None else size)
    if low_noise_model is not None:
        below = SWITCH_AT if switch_at is None else switch_at
        pipeline = _with_low_noise_model(pipeline, model, low_noise_model, below, dtype, **claims)
    with _caching(pipeline, settings), reporting(otherwise=f"finished images are in {out}") as report:
        paths = generate_files(
            pipeline,
            prompts,
            out,
            inputs=inputs,
            strength=STRENGTH if strength is None else strength,
            size=size,
            steps=steps,
            guidance_scale=guidance,
            cfg_cutoff=cfg_cutoff,
            seed=seed,
            progress=lambda done, total: report("images", done, total),
        )
    for path in paths:
        say_path(str(path))


def _cache_settings(text: str) -> dict[str, Any]:
    """Return the arguments of `cache_features`: a number is a speed-up, anything else a schedule's file."""
    try:
        speedup = float(text)
    except ValueError:
        return {"schedule": asdm.CacheSchedule.load(text)}
    checks.SPEEDUP("--cache", speedup)
    return {"speedup": speedup}


def _caching(pipeline: Any, settings: dict[str, Any] | None) -> AbstractContextManager[Any]:
    return nullcontext() if settings is None else asdm.cache_features(pipeline, **settings)


def _with_low_noise_model(
    pipeline: Any, model: str, low_noise_model: str, below: float, dtype: str, **claims: Any
) -> Any:
    """Let the original's denoiser take over below a fraction of the schedule; the rest of the original is not moved to
    the device, so memory need not hold it twice."""
    from asdm.families import denoiser_of
    from asdm.pipelines.compatibility import require_same_prediction

    original = loading.load_model(low_noise_model, "cpu", dtype, **claims)
    require_same_prediction(original, pipeline, (low_noise_model, model))
    denoisers = [denoiser_of(pipeline), denoiser_of(original).to(pipeline.device)]
    return asdm.switch_unets(pipeline, denoisers, below=[below])
