"""Whether two pipelines fit together as teacher and student."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import DiffusionPipeline

from asdm.errors import AsdmError

_DEFAULTS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def require_same_prediction(pipelines: Mapping[str, DiffusionPipeline]) -> None:
    """Refuse a teacher and a student, in this order and by name, that predict different things.

    Raises:
        AsdmError: their prediction types differ, or only one schedule ends at zero SNR.
    """
    (teacher, original), (student, pruned) = pipelines.items()
    for field, default in _DEFAULTS.items():
        expected, found = (pipeline.scheduler.config.get(field, default) for pipeline in (original, pruned))
        if found != expected:
            verb = "predicts" if field == "prediction_type" else f"has {field}"
            raise AsdmError(
                f"{student}: {verb} {found}, {teacher} {expected}: it was not pruned from such a model; name the "
                "one that it was pruned from"
            )
