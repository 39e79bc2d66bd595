"""What must not happen while a stranger's file is read: another exception than AsdmError, more than one line, a hang, a
file written elsewhere, code run, the network, or much memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asdm import AsdmError

MAX_SECONDS = 10  # of one input
MAX_MEGABYTES = 1024  # that one input may add
_LIMIT = 4 * 2**30  # bytes of address space that one input may add, so that a bomb harms no other process
_LONGEST = 4100  # characters of a message
_OF_MEMORY = ("can't allocate", "Unable to allocate", "not enough memory", "out of memory")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGING = {  # which of an event's arguments are paths that are changed
    "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,),
}  # fmt: skip
_RUNNING = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
)

_folder: Path | None = None  # what is watched now
_seen: list[str] = []


class Fault(Exception):
    """What must not happen has happened."""


class _Hang(BaseException):
    pass


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _folder is None:
        return
    if event == "open":
        path, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool((flags or 0) & _WRITING)
        if writes and not _is_allowed(path):
            _seen.append(f"wrote {path!r}")
    elif event in _CHANGING and not all(_is_allowed(args[place]) for place in _CHANGING[event]):
        _seen.append(f"{event} {args!r}")
    elif event in _RUNNING:
        _seen.append(f"{event} {args!r}"[:300])
    elif event == "exec" and str(getattr(args[0], "co_filename", "")).startswith(str(_folder)):
        _seen.append(f"ran {args[0].co_filename}")


def _is_allowed(path: Any) -> bool:
    if isinstance(path, int):
        return True
    text = os.path.abspath(os.fsdecode(path))
    return text.startswith(str(_folder)) or "__pycache__" in text or text == os.devnull


sys.addaudithook(_audit)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Stop what takes too long, by the processor's time and by the clock, and what takes too much memory."""

    def stop(*_: Any) -> None:
        raise _Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handlers = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") * 1024 + _LIMIT, hard))
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 30 * MAX_SECONDS)  # others compute on this machine too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), handlers, strict=True):
            signal.signal(number, handler)


def _status(field: str) -> int:
    """Return a number of kilobytes of this process."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{field}:"))


def attempt(read: Callable[[], Any], folder: Path) -> bool:
    """Read an input that lies in `folder`; return whether it was accepted.

    Raises:
        Fault: it was neither accepted nor refused as it should be.
    """
    global _folder
    _seen.clear()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins again
    before, refusal = _status("VmRSS"), None
    try:
        with _bounded():
            _folder = folder
            try:
                read()
            finally:
                _folder = None
    except AsdmError as error:
        refusal = str(error)
    except _Hang:
        raise Fault(f"more than {MAX_SECONDS} s") from None
    if refusal is not None and ("\n" in refusal or not refusal.strip() or len(refusal) > _LONGEST):
        raise Fault(f"not one line: {refusal[:300]!r}")
    if refusal is not None and any(words in refusal for words in _OF_MEMORY):
        raise Fault(f"memory: {refusal[:300]!r}")
    if _seen:
        raise Fault("; ".join(_seen[:3]))
    grown = (_status("VmHWM") - before) / 1024
    if grown > MAX_MEGABYTES:
        raise Fault(f"{grown:.0f} MB")
    return refusal is None
