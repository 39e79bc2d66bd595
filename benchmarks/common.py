"""What the benchmarks share: where results go, and the plan that removes what most UNets can spare."""

from __future__ import annotations

import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

import asdm
from asdm.errors import AsdmError
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.families import family_of
from asdm.files import write_text
from asdm.measure.machine import device_name
from asdm.student.plan import PruningPlan

RESULTS = Path(__file__).parent.parent / "docs" / "results"
console = Console()


def run(app: typer.Typer) -> None:
    """Run a script's commands; a mistake, or a package that is not installed, is told in one line."""
    try:
        app()
    except AsdmError as error:
        console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None


def machine(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return the date and what it was measured with."""
    name = device_name(device)
    place = f"{torch.get_num_threads()} threads" if name == "cpu" else name
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, torch {torch.__version__}, {place}",
    }


def finish(name: str, rows: list[dict[str, Any]], device: torch.device | str = "cpu", **settings: Any) -> None:
    """Print the rows of one run as a table and write them to the results, with its date, machine and settings."""
    write_rows(name, rows, **machine(device), **settings)


def earlier_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows in the results; each says by what it was measured, also where one run made all of them."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {"rows": []}
    rows = found.pop("rows")
    return [{**row, **found} for row in rows]


def write_rows(name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Print rows as a table and write them to the results, with what holds for all of them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS / f"{name}.json", json.dumps({**about, "rows": rows}, indent=1) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(title=", ".join([name, *(f"{key} {value}" for key, value in about.items())]))
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)


def held_out_set(count: int) -> EvaluationSet:
    """Return prompts of the embedded pipeline that no training saw and that have one right answer."""
    return next(each for each in evaluation_sets("demo", None, count, 0) if each.split == "held_out")


def without_second_layers(unet: UNet2DConditionModel) -> PruningPlan:
    """Return a plan that removes the second resnet and attention of every stage."""
    names = [unit.name for unit in family_of(unet).units(unet) if unit.name.endswith((".resnets.1", ".attentions.1"))]
    return PruningPlan.for_unet(unet, [asdm.Remove(unit=name) for name in names if not name.startswith("mid_block")])
