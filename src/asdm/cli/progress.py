"""Progress of long commands: a bar for each task, or without a terminal a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from asdm.cli.estimates import rounded
from asdm.cli.output import errors, is_main_process, tell

SECONDS_BETWEEN_LINES = 15  # of progress without a terminal


class ProgressReport:
    """Called with a task's title, its done and total units, and a note; shows a bar with the time left for each."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),  # what is left
        )
        self._progress = Progress(*columns, console=errors, expand=True, disable=not is_main_process())
        self._bars: dict[str, TaskID] = {}
        self._last_line = time.monotonic()
        self._started: dict[tuple[str, int], tuple[float, int]] = {}

    def __call__(self, title: str, done: int, total: int, note: str = "") -> None:
        self._log(title, done, total, note)
        if not self._bars:
            self._progress.start()  # not before the first task: it would leave an empty line
        if title not in self._bars:
            self._bars[title] = self._progress.add_task(title, total=total, note=note)
        self._progress.update(self._bars[title], completed=done, total=total, note=note)

    def _log(self, title: str, done: int, total: int, note: str) -> None:
        """Print a line if there is no terminal and the last one is some time ago."""
        # A task that counts anew, to another total, does something else and at another pace.
        started, before = self._started.setdefault((title, total), (time.monotonic(), done))
        if errors.is_terminal or not is_main_process():
            return
        if time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            if before < done < total:
                left = (time.monotonic() - started) / (done - before) * (total - done)
                note = f"{note}, {rounded(left)} left".removeprefix(", ")
            tell(f"{title} {done}/{total} {note}")

    def stop(self) -> None:
        """Leave the bars as they are."""
        if self._bars:
            self._progress.stop()


@contextmanager
def reporting(
    resumable: bool = False, otherwise: str | Callable[[], str] = "nothing was written"
) -> Iterator[ProgressReport]:
    """Yield a report of progress; when the block is interrupted, print how to resume, or `otherwise`."""
    report = ProgressReport()
    try:
        yield report
    except KeyboardInterrupt:
        advice = otherwise() if callable(otherwise) else otherwise
        tell(f"interrupted; {'run the same command again to resume' if resumable else advice}")
        raise typer.Exit(130) from None
    finally:
        report.stop()
