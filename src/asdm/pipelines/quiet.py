"""Loading and saving without the libraries' progress bars and advice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and advice of the libraries while a pipeline is loaded or saved."""
    levels = [(log, log.get_verbosity()) for log in (diffusers_logging, transformers_logging)]
    with_bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log, _ in levels:
        log.set_verbosity_error()
    for log in with_bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        for log in with_bars:
            log.enable_progress_bar()
