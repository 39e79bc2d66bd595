"""The loaded models of the page: few at a time, the last used ones."""

from __future__ import annotations

from collections import OrderedDict

from diffusers import DiffusionPipeline

from asdm.app.settings import AppSettings
from asdm.devices import fastest_device
from asdm.pipelines.loading import load_pipeline

KEPT = 3  # a teacher, a student and one more


class ModelLibrary:
    """Pipelines by name. Its user holds the workbench's lock."""

    def __init__(self, settings: AppSettings, device: str | None = None):
        self.settings, self.device = settings, device or fastest_device()
        self._loaded: OrderedDict[str, DiffusionPipeline] = OrderedDict()

    def load(self, name: str) -> DiffusionPipeline:
        """Return a pipeline, loaded now or earlier.

        Raises:
            AsdmError: the page does not offer the model, or it cannot be loaded.
        """
        self.settings.require_model(name)
        if name not in self._loaded:
            while len(self._loaded) >= KEPT:
                self._loaded.popitem(last=False)
            self._loaded[name] = load_pipeline(name, device=self.device)
        self._loaded.move_to_end(name)
        return self._loaded[name]
