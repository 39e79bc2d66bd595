"""From the page's events to functions: errors become sentences, progress a bar, and each user has a session."""

from __future__ import annotations

import html
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from asdm.app.compare import Progress
from asdm.app.models import ModelLibrary
from asdm.app.settings import AppSettings
from asdm.app.work import CancelledError, Workbench
from asdm.errors import AsdmError, disk_error, memory_error, one_line

P = ParamSpec("P")
R = TypeVar("R")
# A request also starts while an earlier one, which is cancelled, still ends.
COMPUTING: dict[str, Any] = {"concurrency_id": "computing", "concurrency_limit": 1, "trigger_mode": "multiple"}
_log = logging.getLogger(__name__)
_UPLOADS = re.compile(rf"{re.escape(tempfile.gettempdir())}\S*/(?=[^/\s]+)")


@dataclass
class Page:
    """What all tabs share: settings, models, the workbench, and the folder of generated files."""

    settings: AppSettings
    folder: Path
    workbench: Workbench = field(default_factory=Workbench)

    def __post_init__(self) -> None:
        self.library = ModelLibrary(self.settings)


def session_of(request: gr.Request) -> str:
    """Return the name of a user's session."""
    return str(request.session_hash)


def beginning(page: Page, work: str) -> Callable[[gr.Request], str]:
    """Return a handler that cancels a session's earlier request of a kind of work, and returns the id of the ticket of
    a new one."""

    def begin(request: gr.Request) -> str:
        return page.workbench.issue(session_of(request), work).id

    return begin


def ticket_id() -> gr.Textbox:
    """Return a hidden widget that takes a ticket's id from the handler that begins a request to the one that computes:
    the browser sends its value with the request."""
    return gr.Textbox(visible="hidden")


def sentences(handler: Callable[P, R]) -> Callable[P, R]:
    """Show a handler's errors as sentences; what it returns otherwise passes. A cancelled request changes nothing."""

    @wraps(handler)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except AsdmError as error:
            raise _shown(without_paths(str(error))) from None
        except CancelledError:
            gr.Info("Cancelled.")
            return gr.skip()
        except Exception as error:
            if memory_error(error) is not None:
                raise _shown("Out of memory; use a smaller image or another model.") from None
            if (line := disk_error(error)) is not None:
                raise _shown(f"The server's disk: {without_paths(line)}") from None
            _log.exception("a request failed")
            raise _shown(f"A fault of the program: {one_line(error)}") from None

    return call


def _shown(text: str) -> gr.Error:
    return gr.Error(html.escape(text), duration=20, print_exception=False)


def without_paths(text: str) -> str:
    """Return an error's text without the temporary folders of uploads."""
    return _UPLOADS.sub("", text)


def show_notes(notes: list[str]) -> None:
    """Show what warnings said."""
    for note in dict.fromkeys(notes):
        gr.Warning(html.escape(without_paths(note)))


def bar(progress: gr.Progress) -> Progress:
    """Return a function that moves a bar."""
    return lambda part, line: progress(part, desc=line)
