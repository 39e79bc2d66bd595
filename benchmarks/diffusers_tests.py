"""diffusers' own tests of UNets and pipelines, run against students: which fail that pass with the stock class?

    git clone --depth 1 https://github.com/huggingface/diffusers
    python benchmarks/diffusers_tests.py diffusers                     # all kinds of students, all tests
    python benchmarks/diffusers_tests.py diffusers --kind regional --test pipelines/controlnet

Needs the extra `test` and no network: tests that load from the hub fail for the stock class too, and count for neither.
With the packages `parameterized` and `requests_mock` a few more tests run. The status is 1 if a test fails for a
student alone and is not among the exceptions below.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import console
from diffusers_plugin import KIND, OTHER_WEIGHTS, RESULTS, STOCK, STUDENTS

TESTS = [
    "models/unets/test_models_unet_2d_condition.py",
    "pipelines/stable_diffusion/test_stable_diffusion.py",
    "pipelines/stable_diffusion/test_stable_diffusion_img2img.py",
    "pipelines/stable_diffusion/test_stable_diffusion_inpaint.py",
    "pipelines/stable_diffusion/test_stable_diffusion_instruction_pix2pix.py",
    "pipelines/stable_diffusion_adapter/test_stable_diffusion_adapter.py",
    "pipelines/stable_diffusion_xl",
    "pipelines/controlnet",
]


@dataclass(frozen=True)
class Allowed:
    """A test that may fail for a student, and why; `kinds` of students, or all where there are none."""

    test: str  # a regular expression for the end of its name
    reason: str
    kinds: tuple[str, ...] = ()


REGIONAL = ("regional", "all")
ALLOWED = [
    Allowed(
        "test_special_attn_proc",
        "counts the stock UNet's attentions, of which some are gone, and regional ones keep their processor",
        ("removed", "lean", *REGIONAL),
    ),
    Allowed(
        "test_attention_processor_dict",
        "regional attention is the student's architecture, and gives way to no other processor",
        REGIONAL,
    ),
    Allowed(
        "test_fused_qkv_projections",
        "asks each processor for a fused one's name; regional ones keep theirs, and project query, key and value alone",
        REGIONAL,
    ),
    Allowed(
        "test_gradient_checkpointing_is_applied",
        "compares names of classes: no mid block, or a subclass of Transformer2DModel",
        ("lean", *REGIONAL),
    ),
]
Results = dict[str, Any]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    checkout: Annotated[Path, typer.Argument(help="Folder of diffusers' repository.", exists=True, file_okay=False)],
    kind: Annotated[list[str] | None, typer.Option(help=f"Students: {', '.join(STUDENTS)}; by default all.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Files below tests/; by default those of UNets.")] = None,
    pytest: Annotated[str, typer.Option(help="More options for pytest, such as '-k lora'.")] = "",
) -> None:
    """Print the tests that fail for a student and pass for the stock class."""
    unknown = set(kind or ()) - set(STUDENTS)
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: kinds are {', '.join(STUDENTS)}")
    tests, options = test or TESTS, pytest.split()
    stock = run(checkout, STOCK, tests, options)
    if not stock["counts"]:
        raise SystemExit(f"{checkout}: has none of these tests: {', '.join(tests)}")
    passed_over = [*stock["failed"], *stock["skipped"]]
    # A test that fails for other weights compares with numbers of the stock class.
    of_weights = run(checkout, OTHER_WEIGHTS, tests, options, passed_over)["failed"]
    remain = 0
    for each in kind or STUDENTS:
        failed = run(checkout, each, tests, options, passed_over)["failed"]
        reasons = {name: allowed(name, each, problem, of_weights) for name, problem in failed.items()}
        for reason, count in Counter(filter(None, reasons.values())).items():
            say(f"  {count} allowed to fail: {reason}")
        for name in [name for name, reason in reasons.items() if reason is None]:
            say(f"  {name.removeprefix('tests/')}: {failed[name]['error']}: {failed[name]['message']}")
            remain += 1
    say(f"{remain} tests fail for students alone" if remain else "no test fails for a student alone")
    raise SystemExit(remain > 0)


def say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def run(
    checkout: Path, kind: str, tests: list[str], options: list[str], passed_over: list[str] | None = None
) -> Results:
    """Return what pytest found with one class, the tests `passed_over` left out."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        results, arguments = Path(folder) / "results.json", Path(folder) / "arguments"
        lines = [f"tests/{test}" for test in tests] + [f"--deselect={test}" for test in passed_over or ()]
        arguments.write_text("\n".join(lines), "utf-8")
        own = {KIND: kind, RESULTS: str(results), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path_with(here)}
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "diffusers_plugin", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *options, f"@{arguments}"], cwd=checkout, env=os.environ | own, capture_output=True, text=True
        )
        if not results.is_file():
            raise SystemExit(f"pytest did not run in {checkout}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found: Results = json.loads(results.read_text("utf-8"))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found["counts"].items()))
    say(f"{kind}: {counts or 'no tests'}")
    return found


def path_with(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder.resolve()), os.environ.get("PYTHONPATH"))))


def allowed(name: str, kind: str, problem: dict[str, str], of_weights: dict[str, Any]) -> str | None:
    """Why a test may fail; None where it may not."""
    if name in of_weights and problem["error"] == of_weights[name]["error"] == "AssertionError":
        return "compares with numbers that the stock class gave"
    for each in ALLOWED:
        if re.search(f"{each.test}$", name) and (not each.kinds or kind in each.kinds):
            return each.reason
    return None


if __name__ == "__main__":
    app()
