"""The commands: `python -m tools.page screenshots` and `python -m tools.page soak`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from asdm.cli.output import errors, say
from asdm.cli.progress import reporting
from asdm.errors import AsdmError
from tools.page.screenshots import take_screenshots
from tools.page.serving import serving
from tools.page.soak import soak

ROOT = Path(__file__).parent.parent.parent
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command; a user's mistake is one line and exit status 2."""
    try:
        app()
    except AsdmError as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None


@app.command()
def screenshots(
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = ROOT / "docs" / "images",
    results: Annotated[Path, typer.Option(help="The folder of the benchmark.")] = ROOT / "docs" / "results",
    tab: Annotated[list[str] | None, typer.Option(help="compare, plan or evidence; all.", show_default=False)] = None,
    student: Annotated[
        str | None, typer.Option(help="The second model; the embedded one with feature caching.", show_default=False)
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="The embedded pipeline's, by asdm analyze.", show_default=False)
    ] = None,
) -> None:
    """Take the README's pictures of the page."""
    for file in take_screenshots(folder, results, tabs=tab or (), student=student, profile=profile):
        say(f"{file}: {file.stat().st_size // 1000} kB")


@app.command("soak")
def soak_command(
    requests: Annotated[int, typer.Option(help="How many requests.", min=10)] = 300,
    users: Annotated[int, typer.Option(help="At once.", min=1, max=16)] = 4,
    cancelled: Annotated[float, typer.Option(help="Part of the requests that is cancelled.", min=0, max=1)] = 0.1,
) -> None:
    """Send many small requests to the page; its memory must stay flat, and no request may be lost."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as served, reporting() as report:
        result = soak(served, requests, users=users, cancelled=cancelled, progress=partial(report, "requests"))
    say(", ".join(f"{name} {value}" for name, value in result.row().items()))
    result.require_good()


if __name__ == "__main__":
    main()
