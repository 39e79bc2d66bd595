"""`asdm doctor`: what is installed, what it runs on, and what an installation lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from asdm.cli.output import say, say_path, show, tell, warn_if_busy
from asdm.cli.tables import extras_table

if TYPE_CHECKING:
    from asdm.measure.installation import Installation


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices and threads, which extras are installed and what each missing one gives, and the speed of
    a one-second check. The exit status is 1 if a required package is missing or too old."""
    from asdm.measure.installation import installation

    found = installation()
    if as_json:
        say_path(found.model_dump_json(indent=1))
    else:
        _print(found)
    for problem in found.problems:
        tell(f"problem: {problem}")
    raise typer.Exit(1 if found.problems else 0)


def _print(found: Installation) -> None:
    shown = [f"{name} {version or 'missing'}" for name, version in found.versions.items()]
    say(", ".join(shown[:5]))
    say(", ".join(shown[5:]))
    say(f"{found.system}, {found.threads} threads on {found.usable_cores} of {found.cores} cores")
    for name, device in found.devices.items():
        memory = "" if device.memory_gb is None else f", {device.memory_gb:.0f} GB"
        is_default = " (default)" if name.partition(":")[0] == found.default_device.partition(":")[0] else ""
        say(f"{name}: {device.name}{memory}{is_default}")
    speeds = ", ".join(f"{what} {gflops:.0f} GFLOP/s" for what, gflops in found.gflops.items())
    say(f"float32 on {found.default_device}: {speeds}")
    warn_if_busy()
    show(extras_table(found))
