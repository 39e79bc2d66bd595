"""The entry point: errors become one line and an exit status, and other libraries' advice is silenced."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from asdm.cli.app import app
from asdm.cli.output import is_main_process, replace_unencodable, tell
from asdm.errors import AsdmError, AsdmWarning, disk_error, memory_error, one_line, shown


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2."""
    with one_line_errors():
        status = app(standalone_mode=False)
    raise SystemExit(status or 0)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user or the machine caused into one line and exit status 2, or 130 for an interruption. With
    `--debug` on the command line there is a traceback."""
    debug = "--debug" in sys.argv
    replace_unencodable()
    _silence_libraries()
    try:
        yield
    except AsdmError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except typer.Abort:
        _fail("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer refuses an option or argument
            _fail_to_parse(error)
        cause = disk_error(error) or memory_error(error)
        if cause is None and isinstance(error, FileNotFoundError) and error.filename:  # a folder that cannot be made
            cause = f"{error.filename}: {error.strerror}"
        if debug or cause is None:
            raise
        _fail(f"{cause}; existing files are unchanged", 2)


def _silence_libraries() -> None:
    """Keep advice that a user of this tool cannot act on off the terminal, and telemetry of libraries off the network.
    Print our own warnings in one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of ONNX Runtime, which diffusers imports where it is there
    warnings.simplefilter("ignore", FutureWarning)  # one library's about another
    warnings.filterwarnings("ignore", module="huggingface_hub")  # about arguments that other libraries give it
    default_showwarning = warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any) -> None:
        if not issubclass(category, AsdmWarning):
            default_showwarning(message, category, *place)
        elif is_main_process():
            tell(f"note: {message}")

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.simplefilter("always", AsdmWarning)


def _fail_to_parse(error: Any) -> NoReturn:
    """Print in one line why typer refuses the command line; without any argument, print the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        raise SystemExit(error.exit_code)
    command = getattr(getattr(error, "ctx", None), "command_path", "asdm")
    given = error.__cause__.errors()[0]["input"] if hasattr(error.__cause__, "errors") else None
    value = f" (given: {shown(given)})" if given is not None else ""
    _fail(f"{one_line(error.format_message(), 300).rstrip('.')}{value}; see {command} --help", 2)


def _fail(message: str, status: int) -> NoReturn:
    tell(f"error: {message}")
    raise SystemExit(status)
