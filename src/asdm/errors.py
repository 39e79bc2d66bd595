"""The one error that a user's input can cause, and those that the machine causes; everything else that is raised is a
fault of ours."""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 4000  # characters of a message
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EIO,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.ENODEV, errno.ESTALE,
)  # fmt: skip
# safetensors reports these by its own exception
_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "Read-only file system", "File too large")
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "Unable to allocate", "not enough memory")
_DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # turn the rest of a line around


def printable(text: str) -> str:
    """Return a text as one line that a terminal prints and does not obey: control characters are escaped.

    Messages quote names from files, which a stranger may have written.
    """
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}..."
    if text.isprintable():
        return text
    return "".join(_escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    controls = unicodedata.category(letter) in ("Cc", "Zl", "Zp") or letter in _DIRECTIONS
    return letter.encode("unicode_escape").decode() if controls else letter


class AsdmError(ValueError):
    """A problem with what the user gave: names the offending value, what is allowed and the remedy.

    The command line prints it as one line and exits with status 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class NoSuchPartError(AsdmError, AttributeError):
    """A part that a denoiser has and its stand-in has not; `hasattr` returns False for it."""


class AsdmWarning(UserWarning):
    """What was assumed where the user's files do not say it, and how to say it; one line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


def one_line(error: object, length: int = 160) -> str:
    """Return what an error of another's says, for a message of ours."""
    return (" ".join(str(error).split()) or type(error).__name__)[:length]


def shown(value: object) -> str:
    """Return a value as a message of ours shows it: in one line, and not all of a long one."""
    return one_line(repr(value), 80)


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Import in the block what an extra brings; where it is missing, say which one."""
    try:
        yield
    except ImportError as error:
        raise AsdmError(
            f"{what}: {error.name or error} is not installed; install it with pip install 'asdm-diffusion[{extra}]'"
        ) from None


def disk_error(error: Exception) -> str | None:
    """Return a line about an error that the disk or a path caused; None for any other error."""
    if isinstance(error, OSError) and (isinstance(error, PermissionError) or error.errno in _DISK_ERRORS):
        return f"{error.filename or 'output'}: {error.strerror}"
    return one_line(error) if any(words in str(error) for words in _DISK_WORDS) else None


def memory_error(error: Exception) -> str | None:
    """Return a line about an error that too little memory caused, the device's or the machine's; None for any other
    error."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_WORDS):
        return f"out of memory ({one_line(error)}): use smaller images, a smaller batch or another device"
    return None
