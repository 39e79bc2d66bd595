"""`asdm app`: the page in a browser. The file is named otherwise, as `app.py` has the application."""

from __future__ import annotations

import signal
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from asdm.cli.options import MODEL, NAME
from asdm.cli.output import say, tell
from asdm.errors import AsdmError, needs_extra


def app(
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=1, max=65535)] = 7860,
    model: Annotated[
        list[str] | None,
        typer.Option(help=f"A model that the page offers, several times for several: {MODEL}.", callback=NAME),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="The folder whose benchmarks, reports and trainings the page shows.")
    ] = Path(),
    max_side: Annotated[int, typer.Option(help="The largest side of an image in pixels.", min=8, max=8192)] = 1024,
    max_steps: Annotated[int, typer.Option(help="The most steps of sampling.", min=1, max=1000)] = 100,
) -> None:
    """Serve a page for the browser: compare two models, make a plan by hand, look at the evidence.

    Without --host only this machine reaches the page. With another address anyone who reaches it may use it, with the
    models of --model alone.
    """
    if not folder.is_dir():
        raise AsdmError(f"{folder}: no such folder")
    with needs_extra("web", "asdm app"):
        import_module("gradio")
        import_module("plotly")
    from asdm.app.page import serve
    from asdm.app.settings import AppSettings, Limits

    settings = AppSettings(
        host=host,
        port=port,
        models=list(dict.fromkeys(model or ["demo"])),
        folder=folder.resolve(),
        limits=Limits(side=max_side, steps=max_steps),
    )
    if not settings.is_loopback:
        tell(f"note: the page is open to all who reach {host}; it has no passwords")
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{port}/ (Ctrl-C ends it)")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of service managers and containers
    try:
        serve(settings)
    except OSError as error:
        raise AsdmError(f"port {port}: cannot be used on {host} ({error}); name another --port or --host") from None
