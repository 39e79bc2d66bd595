"""Options that several commands share, with their help; what is left to the commands is theirs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from asdm import checks
from asdm.edits.base import CompensationKind
from asdm.errors import AsdmError

# As MODEL_HELP and DATA_HELP, which are not imported for --help: torch and diffusers take seconds.
MODEL = (
    "demo, a Hub id, a folder, a .safetensors file, or random:sd15 | random:sd15-inpainting | random:sd21 | random:sdxl"
)
DATA = (
    "Captioned images: a folder (name.txt beside each, or metadata.jsonl, .csv or .parquet), WebDataset shards (.tar), "
    "hf:DATASET, a .txt file of captions, what prepare-data wrote, or demo."
)


def require(check: checks.Check) -> Callable[..., Any]:
    """A callback for an option or argument that refuses what the check refuses, by the name that the user knows."""

    def callback(param: typer.CallbackParam, value: Any) -> Any:
        name = max(param.opts, key=len) if param.opts[0].startswith("-") else str(param.name).upper()
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None:
                check(name, one)
        return value

    return callback


def not_a_folder(path: Path | None) -> Path | None:
    """Told before the work, not after it."""
    if path is not None and path.is_dir():
        raise AsdmError(f"{path}: is a folder; name a file to write")
    return path


MapFile = Annotated[
    Path | None,
    typer.Option(
        help="Where to write the map, by default redundancy.json; with --cache the schedule, by default "
        "cache_schedule.json in MODEL's folder.",
        callback=not_a_folder,
        show_default=False,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(help="Where to write the plan; plan.json by default.", callback=not_a_folder, show_default=False),
]
FiguresFile = Annotated[Path, typer.Option(help="Where to write the figures.", callback=not_a_folder)]
NAME = require(checks.path)
TEXT = require(checks.text)
GUIDANCE = require(checks.GUIDANCE)
SPEEDUP = require(checks.SPEEDUP)
POSITIVE = require(checks.number(above=0))
PART = require(checks.number(above=0, below=1))
ModelArgument = Annotated[str, typer.Argument(help=f"The model: {MODEL}.", callback=NAME, show_default=False)]
DataOption = Annotated[str | None, typer.Option("--data", help=DATA, callback=NAME, show_default=False)]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; by default the fastest there is.")
]
DtypeOption = Annotated[
    Literal["float32", "float16", "bfloat16"],
    typer.Option("--dtype", help="Precision to run in; float16 and bfloat16 are for GPUs."),
]
PredictionTypeOption = Annotated[
    Literal["epsilon", "v_prediction", "sample"] | None,
    typer.Option(
        "--prediction-type",
        help="What the model's UNet predicts, where the checkpoint says it wrongly or not at all.",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="The model's configuration, where the checkpoint's is wrong or absent: a pipeline's folder or Hub id, a "
        "scheduler_config.json, or a .yaml of the original code.",
        show_default=False,
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0, max=2**32 - 1)]
SpeedupOption = Annotated[
    float | None,
    typer.Option("--speedup", help="How many times faster the UNet must be, measured.", callback=SPEEDUP),
]
ParamsOption = Annotated[
    float | None,
    typer.Option(
        "--params",
        help="Parameters that may remain: a fraction of the original's (0.6), or a number.",
        callback=POSITIVE,
    ),
]
MacsOption = Annotated[
    float | None,
    typer.Option(
        "--macs", help="MACs that may remain: a fraction of the original's (0.6), or a number.", callback=POSITIVE
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Instead of a budget: a-sdm (mild), a-sdm-fast (2x at SD 1.5's size), or BK-SDM's bk-base, bk-small, "
        "bk-tiny.",
    ),
]
RecipeOption = Annotated[
    str, typer.Option(help="joint, bk-sdm, incubation, or a YAML file with a list of stages (then without --steps).")
]
DistillRecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="joint, bk-sdm, incubation, lcm (samples in 4 steps), or a YAML file with a list of stages (then without "
        "--steps).",
    ),
]
RepairOption = Annotated[
    int | None,
    typer.Option(
        help="Rounds of improvement: what the plan's edits do together is measured, and some are exchanged (2 by "
        "default in compress).",
        min=0,
        max=1000,
        show_default=False,
    ),
]
SensitivityOption = Annotated[
    Literal["ablation", "taylor"] | None,
    typer.Option(
        help="Remove each unit and compare (ablation, the default), or estimate all of them from a few backward passes "
        "(taylor, the default for random weights).",
        show_default=False,
    ),
]
CompensateOption = Annotated[
    CompensationKind | None,
    typer.Option(
        "--compensate",
        help="What is fitted in the place of removed branches; by default linear, none for random weights, and for a "
        "map by ablation what it was made with.",
    ),
]
