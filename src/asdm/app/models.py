"""The loaded models of the page: few at a time, the last used ones."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from diffusers import DiffusionPipeline

from asdm.app.settings import AppSettings
from asdm.devices import fastest_device
from asdm.errors import AsdmError
from asdm.pipelines.loading import load_pipeline

KEPT = 3  # a teacher, a student and one more


class ModelLibrary:
    """Pipelines by name. Its user holds the workbench's lock."""

    def __init__(self, settings: AppSettings, device: str | None = None):
        self.settings, self.device = settings, device or fastest_device()
        self._loaded: OrderedDict[str, tuple[int, DiffusionPipeline]] = OrderedDict()

    def load(self, name: str | None) -> DiffusionPipeline:
        """Return a pipeline, loaded now or earlier. One whose files have changed since is loaded again.

        Raises:
            AsdmError: no model is chosen, the page does not offer it, or it cannot be loaded.
        """
        if not name:
            raise AsdmError(f"model: none is chosen; choose one, such as {self.settings.models[0]}")
        self.settings.require_model(name)
        changed, known = changed_ns(Path(name)), self._loaded.get(name)
        if known is None or known[0] != changed:
            self._loaded.pop(name, None)
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
            self._loaded[name] = known = (changed, load_pipeline(name, device=self.device))
        self._loaded.move_to_end(name)
        return known[1]


def changed_ns(place: Path) -> int:
    """Return when a model's file, or a file of its folder and of the folders in it, last changed, in nanoseconds; 0 for
    a name that is none of this machine's files."""
    try:
        return max((file.stat().st_mtime_ns for file in (place, *place.glob("*"), *place.glob("*/*"))), default=0)
    except (OSError, ValueError):  # none, one that was just replaced, or a name that no file can have
        return 0
