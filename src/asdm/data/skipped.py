"""Which of a source's files will be skipped, found before any work begins."""

from __future__ import annotations

from pathlib import Path

from asdm.data.prepared import is_prepared
from asdm.data.sources import open_data, open_source, require_usable


def skipped_files(data: str | Path) -> dict[str, str]:
    """Return the files that cannot be used, with reasons; none of a remote or a prepared source, which is not read in
    whole.

    Raises:
        AsdmError: nothing in the source can be used.
    """
    if is_prepared(data) or open_source(data).remote:
        require_usable(data)
        return {}
    return open_data(data, "all").skipped
