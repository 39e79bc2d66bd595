"""All readers of strangers' files, by kind: each module adds its own to `READERS`."""

from __future__ import annotations

from fuzzing.readers import app, data, evaluation, models, records, trainings
from fuzzing.readers.base import READERS, Reader, fresh

__all__ = ["READERS", "Reader", "app", "data", "evaluation", "fresh", "models", "records", "trainings"]
