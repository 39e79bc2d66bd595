"""The one error that a user's input can cause; everything else that is raised is a fault of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class AsdmError(ValueError):
    """A problem with what the user gave: names the offending value, what is allowed and the remedy.

    The command line prints it as one line and exits with status 2.
    """


class AsdmWarning(UserWarning):
    """What was assumed where the user's files do not say it, and how to say it; one line."""


def one_line(error: object, length: int = 160) -> str:
    """Return what an error of another's says, for a message of ours."""
    return (" ".join(str(error).split()) or type(error).__name__)[:length]


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Import in the block what an extra brings; where it is missing, say which one."""
    try:
        yield
    except ImportError as error:
        raise AsdmError(
            f"{what}: {error.name or error} is not installed; install it with pip install 'asdm-diffusion[{extra}]'"
        ) from None
