"""The page, served by a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asdm.errors import AsdmError

SECONDS_TO_START = 600


@dataclass(frozen=True)
class Served:
    """Where the page is, and the process that serves it."""

    address: str
    pid: int


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Served]:
    """Serve the page of a folder on a free port within the block, and end it as a service manager does.

    Args:
        options: of `asdm app`.

    Raises:
        AsdmError: the server ended by itself, or did not start in time.
    """
    port = free_port()
    command = [sys.executable, "-m", "asdm", "app", "--port", str(port), "--folder", str(folder), *options]
    with tempfile.TemporaryFile("w+") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            _wait_for(port, server)
            yield Served(f"http://127.0.0.1:{port}/", server.pid)
        except AsdmError as error:
            output.seek(0)
            raise AsdmError(f"{error}: {output.read()[-2000:]}") from None
        finally:
            server.terminate()  # a shell's background jobs ignore SIGINT, and so do their children
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[str]) -> None:
    for _ in range(2 * SECONDS_TO_START):
        if server.poll() is not None:
            raise AsdmError(f"asdm app ended with status {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AsdmError(f"asdm app does not listen after {SECONDS_TO_START} s")
