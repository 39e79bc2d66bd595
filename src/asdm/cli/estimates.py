"""How long a command will take: printed before it begins, with a question where that is hours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from asdm.cli.output import errors, is_main_process, say, tell

if TYPE_CHECKING:
    from asdm.estimates.work import StepTime

LONG = 2 * 3600.0  # seconds; a command that may take longer asks before it begins
ALIKE = 1.3  # the most and the least of a range, divided, up to which it is printed as one number

YesOption = Annotated[
    bool,
    typer.Option("--yes", "-y", help="Ask nothing, even if this is expected to take more than two hours."),
]


def announce(times: Sequence[StepTime], *, yes: bool) -> None:
    """Print how long each step will take; on a terminal, ask whether to begin if that may be more than two hours.

    Without a terminal the command goes on.

    Raises:
        typer.Exit: the answer is no. The exit status is 1.
    """
    if not times or not is_main_process():
        return
    tell(sentence(times))
    if yes or sum(time.most for time in times) <= LONG or not _can_ask():
        return
    if not typer.confirm("Begin?", default=False, err=True):
        tell("nothing was written")
        raise typer.Exit(1)


def only_print(times: Sequence[StepTime]) -> None:
    """Print the estimate as the command's result, and end the command with exit status 0."""
    say(sentence(times) if times else "nothing is left to do")
    raise typer.Exit


def sentence(times: Sequence[StepTime]) -> str:
    """Return the time in all and of each step."""
    whole = span(sum(time.least for time in times), sum(time.most for time in times))
    steps = ", ".join(f"{time.name} {span(time.least, time.most)}" for time in times)
    of_steps = f": {steps}" if len(times) > 1 else f" ({times[0].name})"
    return f"expected on this machine, as busy as it is now: about {whole}{of_steps}"


def span(least: float, most: float) -> str:
    """Return a range of seconds in words, or one number where its ends are alike."""
    if most <= ALIKE * least:
        return rounded((least + most) / 2)
    low, high = rounded(least), rounded(most)
    if low == high:
        return low
    (number, unit), other = low.split(), high.split()[1]
    return f"{number} to {high}" if unit == other else f"{low} to {high}"


def rounded(seconds: float) -> str:
    """Return seconds to about two digits, in the unit that suits them."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    if seconds < 99.5 * 60:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:,.0f} h"


def _can_ask() -> bool:
    return errors.is_terminal and sys.stdin.isatty()
