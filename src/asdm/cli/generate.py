"""`asdm generate`: images from prompts, by a teacher or a student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import asdm
from asdm import checks
from asdm.choices import IMAGE_STRENGTH, SCHEDULERS
from asdm.cli import loading
from asdm.cli.options import (
    CONTROL_SCALE,
    FRACTION,
    GUIDANCE,
    NAME,
    POSITIVE,
    SIDE,
    TEXT,
    ConfigOption,
    DecoderOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    PredictionTypeOption,
)
from asdm.cli.output import say, say_path
from asdm.cli.progress import reporting
from asdm.errors import AsdmError

if TYPE_CHECKING:
    from asdm.generation.files import ImageFolder
    from asdm.generation.generate import GenerationProgress
    from asdm.generation.request import GenerationRequest

SWITCH_AT = 0.34  # of the schedule; a student loses most of its quality in the last third


def _schedulers(incomplete: str) -> list[str]:
    return [name for name in SCHEDULERS if name.startswith(incomplete)]


def generate(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Prompts; - reads them from standard input, one a line.", callback=TEXT, show_default=False
        ),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            help="A text file with one prompt a line; - is standard input.", callback=NAME, show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write to, or NAME.png for one image.")] = Path("images"),
    negative: Annotated[
        str, typer.Option(help="A negative prompt, for all prompts.", callback=TEXT, show_default=False)
    ] = "",
    weighted: Annotated[
        bool,
        typer.Option(
            "--weighted",
            help="Read weights in prompts: (word), (word:1.3), \\[word]; a backslash makes plain text. Prompts may "
            "have any length then.",
        ),
    ] = False,
    num_images: Annotated[int, typer.Option(help="Images of each prompt.", min=1, max=10_000)] = 1,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the first image; each later one has the next. 0 by default.", min=0, max=checks.LARGEST_SEED
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Seeds of each prompt's images, such as 1,5,8-11.", callback=NAME, show_default=False),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this image (image-to-image).", show_default=False)
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where --image is replaced (inpainting).", show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help=f"How much --image may change, {IMAGE_STRENGTH:g} by default.",
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
            callback=SIDE,
            show_default=False,
        ),
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, with --height.", callback=SIDE)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, with --width.", callback=SIDE)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; by default 25, or 4 for few-step models.", min=1, max=10_000)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help=f"A class of diffusers, or a short name: {', '.join(SCHEDULERS)}. By default the model's own.",
            callback=NAME,
            autocompletion=_schedulers,
            show_default=False,
        ),
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
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA, .safetensors, with :SCALE behind its name where that is not 1. May be repeated.",
            callback=NAME,
            metavar="FILE[:SCALE]",
            show_default=False,
        ),
    ] = None,
    controlnet: Annotated[
        str | None,
        typer.Option(
            help="A ControlNet: a folder of diffusers' format, or a Hub id.", callback=NAME, show_default=False
        ),
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(help="The image that --controlnet reads: edges, a pose.", show_default=False)
    ] = None,
    control_scale: Annotated[
        float | None,
        typer.Option(help="Weight of --controlnet, 1 by default.", callback=CONTROL_SCALE, show_default=False),
    ] = None,
    clip_skip: Annotated[
        int | None,
        typer.Option(
            help="Last layers of the CLIP text encoder to leave out; 1 is what A1111 calls Clip skip 2.",
            min=1,
            max=100,
            show_default=False,
        ),
    ] = None,
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
    decoder: DecoderOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Another model: generate its images from the same noise, and write both beside each other with a "
            "difference map and both times.",
            callback=NAME,
            metavar="TEACHER",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Write contact sheets of all images, too.")] = False,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Generate images: text-to-image, image-to-image with --image, inpainting with --mask.

    Each PNG says how it was made, in the format of A1111 (`parameters`) and as JSON (`asdm`).
    """
    from asdm.generation import files
    from asdm.generation.lora import LoraFile
    from asdm.generation.request import GenerationRequest
    from asdm.images import open_image

    if switch_at is not None and low_noise_model is None:
        raise AsdmError(f"--switch-at {switch_at:g}: has no effect without --low-noise-model; name a model there")
    if lora and low_noise_model is not None:
        raise AsdmError(f"--lora {lora[0]}: does not go with --low-noise-model, which is another model; leave one out")
    if size is not None and (width is not None or height is not None):
        raise AsdmError(f"--size {size}: is both sides; leave it out beside --width and --height")
    if seeds is not None and seed is not None:
        raise AsdmError(f"--seed {seed}: --seeds says it already; leave one of them out")
    opened, hole = files.open_inputs(image, mask)
    request = GenerationRequest(
        prompts=_all_prompts(prompts or [], prompt_file),
        negative=negative,
        weighted=weighted,
        num_images=num_images,
        seed=seed or 0,
        seeds=None if seeds is None else files.parse_seeds(seeds),
        image=opened,
        mask=hole,
        strength=strength,
        width=size or width,
        height=size or height,
        steps=steps,
        scheduler=scheduler,
        guidance_scale=guidance,
        cfg_cutoff=cfg_cutoff,
        loras=[LoraFile.parse(text) for text in lora or []],
        controlnet=controlnet,
        control_image=None if control_image is None else open_image(control_image),
        control_scale=control_scale,
        clip_skip=clip_skip,
        **_cache_settings(cache),
    )
    claims = {"prediction_type": prediction_type, "config": config}
    written = files.ImageFolder(out, request, with_sheet=grid)
    pipeline = loading.load_with_decoder(model, decoder, device, dtype, **claims)
    if low_noise_model is not None:
        below = SWITCH_AT if switch_at is None else switch_at
        pipeline = _with_low_noise_model(pipeline, model, low_noise_model, below, dtype, **claims)
    teacher = None if compare is None else loading.load_model(compare, device, dtype, **claims)
    with reporting(otherwise=f"finished images are in {out}") as report:

        def after_step(now: GenerationProgress) -> None:
            report("steps", *now.image_steps)

        _write(pipeline, teacher, request, written, after_step)
        written.write_last_sheet()
    for path in written.paths:
        say_path(str(path))
    for line in written.lines:
        say(line)


def _all_prompts(prompts: list[str], file: str | None) -> list[str]:
    """Return the prompts of the arguments, those from standard input in their place, and then those of a file."""
    from asdm.generation.files import STANDARD_INPUT, read_prompts

    if [*prompts, file].count(STANDARD_INPUT) > 1:
        raise AsdmError("-: standard input is read once; name it once")
    found = [line for prompt in prompts for line in (read_prompts("-") if prompt == STANDARD_INPUT else [prompt])]
    found += [] if file is None else read_prompts(file)
    if not found:
        raise AsdmError("no prompt: give one behind MODEL, or --prompt-file; see asdm generate --help")
    return found


def _write(
    pipeline: Any,
    teacher: Any | None,
    request: GenerationRequest,
    folder: ImageFolder,
    progress: Callable[[GenerationProgress], None],
) -> None:
    """Generate a request's images, beside the teacher's where there is one, and write each when it is finished."""
    if teacher is None:
        for image in asdm.generate_images(pipeline, request, progress=progress):
            folder.write(image)
    else:
        for comparison in asdm.compare_images(pipeline, teacher, request, progress=progress):
            folder.write_comparison(comparison)


def _cache_settings(text: str | None) -> dict[str, Any]:
    """Return a request's fields for feature caching: a number is a speed-up, anything else a schedule's file."""
    if text is None:
        return {}
    try:
        speedup = float(text)
    except ValueError:
        return {"cache_schedule": text}
    checks.SPEEDUP("--cache", speedup)
    return {"cache_speedup": speedup}


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
