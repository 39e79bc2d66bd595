"""Writing of files and folders: an interrupted run leaves nothing half-written, and two runs at once mix nothing.

Folders that this tool wrote carry a marker, by which it knows what it may replace.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
from filelock import FileLock, Timeout

from asdm.errors import AsdmError, one_line
from asdm.reading import read_json

MARKER = "asdm.json"  # in a folder that this tool wrote: what it is, and that it may be replaced
PARTIAL, PREVIOUS = "partial", "previous"
LOCK = ".lock"  # in a folder that one run at a time works in


@contextmanager
def replacing_folder(target: Path, keep: Callable[[Path], Any] | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `target` that replaces it when the block ends without error. A link is followed.

    Args:
        keep: gets the written folder, to copy into it what stays of the earlier one, with its modes.

    Raises:
        AsdmError: `target` is something else than a folder.
    """
    target = Path(os.path.realpath(target))
    require_folder_place(target)
    partial, previous = _name_beside(target, PARTIAL), _name_beside(target, PREVIOUS)
    partial.mkdir(parents=True)
    try:
        mode = _mode_of_new(partial / PARTIAL)
        yield partial
        _set_mode(partial.rglob("*"), mode)
        if keep is not None:
            keep(partial)
        if target.exists():
            os.replace(target, previous)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target` that is renamed to it when the block ends without error.

    Raises:
        AsdmError: `target` is something else than a file.
    """
    target = Path(os.path.realpath(target))
    require_file_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _name_beside(target, PARTIAL)
    try:
        mode = _mode_of_new(partial)
        yield partial
        _set_mode([partial], mode)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def require_file_place(path: Path) -> None:
    """Raise an AsdmError where a file cannot be replaced, as there is a folder, a device or a pipe."""
    if path.exists() and not path.is_file():
        raise AsdmError(f"{path}: is {kind_of(path)}; name a file to write")


def require_folder_place(path: Path) -> None:
    """Raise an AsdmError where a folder cannot be replaced, as there is a file, a device or a pipe."""
    if path.exists() and not path.is_dir():
        raise AsdmError(f"{path}: is {kind_of(path)}; name a folder that does not exist yet")


def kind_of(path: Path) -> str:
    """Say what there is at a path, for a message."""
    if path.is_dir():
        return "a folder"
    return "a file" if path.is_file() else "a device or a pipe"


def _mode_of_new(path: Path) -> int:
    """Return the mode that a new file of this name has, by the umask and the folder."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return stat.S_IMODE(mode)


def _set_mode(paths: Iterable[Path], mode: int) -> None:
    """Set the mode of files, whatever wrote them: safetensors writes for the owner alone."""
    for path in paths:
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def require_space(folder: Path, size: int) -> None:
    """Raise an OSError where a folder's disk cannot take a file of so many bytes.

    It says what stopped a library that has raised an error of its own.
    """
    try:
        with TemporaryFile(dir=folder) as probe:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(probe.fileno(), 0, max(size, 1))
            elif shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def write_new(paths: Iterable[Path], write: Callable[[Path], Any]) -> Path:
    """Write a file under the first of these names that is free, and return it. All names are in one folder.

    A reader sees a whole file or none. Processes that write at once take different names.
    """
    names = iter(paths)
    first = next(names)
    first.parent.mkdir(parents=True, exist_ok=True)
    partial = _name_beside(first, PARTIAL)
    try:
        write(partial)
        return next(path for path in chain([first], names) if _take_name(partial, path))
    finally:
        partial.unlink(missing_ok=True)


def _take_name(partial: Path, path: Path) -> bool:
    """Give a file a name that is free; return whether it was."""
    try:
        os.link(partial, path)  # unlike a rename, it never replaces a file
    except FileExistsError:
        return False
    except OSError:  # there are file systems without links
        if path.exists():
            return False
        os.replace(partial, path)
    return True


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until the block or the process ends.

    Of a launch of several processes, only rank 0 takes the lock.

    Raises:
        AsdmError: another run is at work there.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            lock.acquire()
    except Timeout:
        raise AsdmError(f"{folder}: another run is at work there; wait for it, or name another folder") from None
    except (OSError, NotImplementedError):
        pass  # there are file systems without locks
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, never a part. A name that is no UTF-8 is written
    with escapes."""
    with replacing_file(path) as partial:
        partial.write_text(text, "utf-8", errors="backslashreplace")


def _name_beside(target: Path, kind: str) -> Path:
    """Return a temporary name beside `target` that is this process's own.

    What killed processes left is removed. Where one was killed between the two renames, the old folder is put back.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.{kind}"):
        number = left.name.removeprefix(f".{target.name}.").removesuffix(f".{kind}")
        if not number.isdecimal() or (int(number) != os.getpid() and psutil.pid_exists(int(number))):
            continue  # of another target, or of a process at work
        if kind == PREVIOUS and not target.exists():
            os.replace(left, target)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def require_ours(folder: Path, kind: str, inputs: Iterable[str] = ()) -> None:
    """Raise an AsdmError unless `folder` can be replaced: it is empty, absent, or of this kind and this tool's, and
    none of the `inputs`.

    Args:
        kind: as it stands in the folder's `MARKER`: pipeline, prepared, compression, export or
            decoder.
        inputs: what is read beside it; names that are no paths are ignored.
    """
    if any(os.path.isdir(given) and folder.is_dir() and folder.samefile(given) for given in inputs):
        raise AsdmError(f"{folder}: is read, and would be replaced by the output; name another folder")
    require_folder_place(folder)
    if folder.name in ("", ".."):  # it could not be replaced as a whole
        raise AsdmError(f"{folder}: name a folder in it, not itself")
    others = (path for path in folder.glob("*") if path.name != LOCK)
    if folder.is_dir() and any(others) and not (folder / MARKER).is_file():
        raise AsdmError(
            f"{folder}: exists and was not written by asdm (it has no {MARKER}); name another folder or remove it"
        )
    found = read_marker(folder).get("kind", kind)
    if found != kind:
        raise AsdmError(
            f"{folder}: holds what asdm calls {found}, and would be replaced by {kind}; name another folder or remove "
            "it"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings that a run wrote beside its checkpoints.

    Raises:
        AsdmError: they are damaged.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise AsdmError(f"{path}: damaged ({one_line(error)}); use another output folder") from None
    if not isinstance(found, dict):
        raise AsdmError(f"{path}: not the settings of a run; use another output folder")
    return found


def read_marker(folder: Path) -> dict[str, Any]:
    """Read a folder's `MARKER`; empty where there is none, or a damaged one."""
    try:
        about = read_json(folder / MARKER)
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
