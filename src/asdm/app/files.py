"""The files that the page makes: a folder of its own for each result, deleted after a day or when the server ends."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

KEPT_SECONDS = 24 * 3600


def new_folder(root: Path) -> Path:
    """Make a folder in `root` whose name cannot be guessed, and delete those that are older than `KEPT_SECONDS`."""
    root.mkdir(parents=True, exist_ok=True)
    oldest = time.time() - KEPT_SECONDS
    for folder in root.iterdir():
        with suppress(FileNotFoundError):  # another request deleted it
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
    made = root / secrets.token_hex(8)
    made.mkdir()
    return made
