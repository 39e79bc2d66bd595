"""Names of pipelines and data sets that packages bring along, such as "demo".

Any package adds a name by an entry point, a function that returns a folder:

    [project.entry-points."asdm.pipelines"]
    mine = "my_package:pipeline_folder"
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal

from asdm.errors import AsdmError, one_line

Group = Literal["asdm.pipelines", "asdm.datasets"]
PIPELINES: Group = "asdm.pipelines"
DATASETS: Group = "asdm.datasets"
# The embedded pipeline is a package of its own, as it is twenty times as large as this one.
_OWN = (
    EntryPoint("demo", "asdm_demo:pipeline_folder", PIPELINES),
    EntryPoint("demo", "asdm_demo:images_folder", DATASETS),
)


def registered_names(group: Group) -> list[str]:
    """Return all names of a group, this package's own first."""
    return list(dict.fromkeys(entry.name for entry in _entries(group)))


def registered_folder(name: str, group: Group) -> Path | None:
    """Return the folder of a registered name; None where no package registers it.

    Raises:
        AsdmError: the package that registers it cannot be imported.
    """
    entry = next((entry for entry in _entries(group) if entry.name == name), None)
    if entry is None:
        return None
    try:
        return Path(entry.load()())
    except (ImportError, AttributeError) as error:
        if entry in _OWN:
            raise AsdmError(
                f"{name}: the embedded pipeline is not installed ({one_line(error)}); pip install -e packages/demo "
                "in your checkout, or install the wheel of asdm-demo"
            ) from None
        raise AsdmError(f"{name}: registered as {entry.value}, which cannot be imported ({one_line(error)})") from None


def _entries(group: Group) -> Iterator[EntryPoint]:
    yield from (entry for entry in _OWN if entry.group == group)
    yield from entry_points(group=group)
