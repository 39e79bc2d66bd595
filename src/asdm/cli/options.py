"""Options and arguments that several commands share, with their help; a command's own stand in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from asdm import checks
from asdm.choices import IMAGE_TO_IMAGE_STRENGTH, CompensationKind, Dtype, PredictionType, Sensitivity
from asdm.errors import AsdmError
from asdm.files import kind_of, require_file_place

# The API's errors say the same; importing it for --help would take seconds.
MODEL = (
    "demo, a Hub id, a folder, a .safetensors file, or random:sd15 | random:sd15-inpainting | random:sd21 | random:sdxl"
)
DATA = (
    "Captioned images: a folder (name.txt beside each, or metadata.jsonl, .csv or .parquet), WebDataset shards (.tar), "
    "hf:DATASET, a .txt file of captions, what prepare-data wrote, or demo."
)
DEFAULT_STEPS = 1000  # of training


# -- checks ------------------------------------------------------------------------------------------------


def require(check: checks.Check) -> Callable[..., Any]:
    """Make a callback that refuses what the check refuses, by the option's or argument's name."""

    def callback(param: typer.CallbackParam, value: Any) -> Any:
        name = max(param.opts, key=len) if param.opts[0].startswith("-") else str(param.name).upper()
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None:
                check(name, one)
        return value

    return callback


def not_a_folder(path: Path | None) -> Path | None:
    """Refuse a folder, a device or a pipe where a file will be written, before the work begins."""
    if path is not None:
        require_file_place(path)
    return path


def require_folder(path: Path | None) -> None:
    """Refuse what is no folder, or a place within it, where a folder will be written, before the work begins."""
    for place in () if path is None else (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise AsdmError(f"{path}: {'' if place == path else f'{place} '}is {kind_of(place)}; name a folder")


def require_effect(context: typer.Context, names: Iterable[str], where: str) -> None:
    """
    Args:
        names: of options in the function, which have no effect `where` the command is.

    Raises:
        AsdmError: one of them is on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":  # typer brings its own copy of click, by version
            option = f"--{name.replace('_', '-')}"
            raise AsdmError(f"{option} {context.params[name]}: has no effect {where}; leave it out")


def training_steps(steps: int | None, recipe: str) -> int:
    """Return the number of training steps; `--steps` is refused beside a recipe's file."""
    from asdm.distillation.recipes import RECIPES

    if steps is not None and recipe not in RECIPES and Path(recipe).is_file():
        raise AsdmError(f"--steps {steps}: {recipe} is a file, whose stages have their own; leave --steps out")
    return DEFAULT_STEPS if steps is None else steps


NAME = require(checks.path)
TEXT = require(checks.text)
GUIDANCE = require(checks.GUIDANCE)
SIDE = require(checks.multiple_of(8, 8192))  # pixels
CONTROL_SCALE = require(checks.number(0, 10))
SPEEDUP = require(checks.SPEEDUP)
POSITIVE = require(checks.number(above=0))
SHARE_OR_COUNT = require(checks.share_or_count)
FRACTION = require(checks.number(above=0, below=1))


# -- models and data ---------------------------------------------------------------------------------------

ModelArgument = Annotated[str, typer.Argument(help=f"The model: {MODEL}.", callback=NAME, show_default=False)]
DataOption = Annotated[str | None, typer.Option("--data", help=DATA, callback=NAME, show_default=False)]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or mps; by default the fastest available.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option("--dtype", help="Precision of the computation; float16 and bfloat16 are for GPUs."),
]
PredictionTypeOption = Annotated[
    PredictionType | None,
    typer.Option(
        "--prediction-type",
        help="What the model predicts, if the checkpoint does not say it or is wrong.",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="The model's configuration, if the checkpoint's is missing or wrong: a pipeline's folder or Hub id, a "
        "scheduler_config.json, or a .yaml of the original code.",
        show_default=False,
    ),
]
DecoderOption = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        help="A tiny decoder in the place of the VAE: a folder that distill-decoder wrote, the Hub id of an "
        "AutoencoderTiny, or demo.",
        callback=NAME,
        show_default=False,
    ),
]
ImageToImageOption = Annotated[
    int,
    typer.Option(
        "--image-to-image",
        help="Images per split that start from an image, --samples at most; 0 leaves image-to-image out.",
        min=0,
        max=10**6,
    ),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(
        "--strength",
        help=f"How much image-to-image may change in the evaluation, {IMAGE_TO_IMAGE_STRENGTH:g} by default.",
        min=0.01,
        max=1.0,
        callback=POSITIVE,
        show_default=False,
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", help="Seed of all random numbers.", min=0, max=checks.LARGEST_FIRST_SEED)
]


# -- files that commands write -----------------------------------------------------------------------------

ProfileFile = Annotated[
    Path | None,
    typer.Option(
        help="The profile to write, by default redundancy.json; with --cache the schedule, by default "
        "cache_schedule.json in MODEL's folder.",
        callback=not_a_folder,
        show_default=False,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(help="The plan to write; plan.json by default.", callback=not_a_folder, show_default=False),
]


# -- the budget and how it is planned ----------------------------------------------------------------------

SpeedupOption = Annotated[
    float | None,
    typer.Option("--speedup", help="Measured speed-up of a denoiser call, such as 1.5.", callback=SPEEDUP),
]
ParamsOption = Annotated[
    float | None,
    typer.Option(
        "--params",
        help="Parameters that remain: a fraction of the original's (0.6), or a number (5e6).",
        callback=SHARE_OR_COUNT,
    ),
]
MacsOption = Annotated[
    float | None,
    typer.Option(
        "--macs",
        help="MACs that remain: a fraction of the original's (0.6), or a number (5e9).",
        callback=SHARE_OR_COUNT,
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="A preset instead of a budget: a-sdm (mild), a-sdm-fast (2x at SD 1.5's size), BK-SDM's bk-base, "
        "bk-small, bk-tiny, or for SDXL ssd-1b, vega, koala-1b, koala-700m.",
    ),
]
SensitivityOption = Annotated[
    Sensitivity | None,
    typer.Option(
        help="Remove each unit and compare the predictions (ablation, the default), or estimate all sensitivities from "
        "a few backward passes (taylor, the default for random weights).",
        show_default=False,
    ),
]
PortableOption = Annotated[
    bool,
    typer.Option(
        "--portable",
        help="Choose only students that are stock UNets and that ComfyUI, Forge and diffusers read: whole layers, "
        "transformer blocks and the mid block go.",
    ),
]
CompensateOption = Annotated[
    CompensationKind | None,
    typer.Option(
        "--compensate",
        help="Projection that is fitted in place of each removed branch; by default linear, none for random weights, "
        "and for a profile by ablation the kind that it was measured with.",
        show_default=False,
    ),
]
RefineOption = Annotated[
    int | None,
    typer.Option(
        help="Rounds of refinement: each measures what the plan's edits do together and exchanges some of them (2 by "
        "default in compress).",
        min=0,
        max=1000,
        show_default=False,
    ),
]


# -- recipes of a distillation -----------------------------------------------------------------------------

RecipeOption = Annotated[
    str,
    typer.Option(
        help="joint, bk-sdm, incubation, small-gpu (with the teacher's features on disk), or a YAML file with a list "
        "of stages (then without --steps)."
    ),
]
CaptionsOption = Annotated[
    str | None,
    typer.Option(
        "--captions",
        help="Captions without images, for which the student is to mean what its teacher means: a .txt file, one a "
        "line, or spliced (splices of two of DATA's captions).",
        callback=NAME,
        show_default=False,
    ),
]
DistillRecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="joint, bk-sdm, incubation, small-gpu (with the teacher's features on disk), lcm (samples in 4 steps), "
        "or a YAML file with a list of stages (then without --steps).",
    ),
]
