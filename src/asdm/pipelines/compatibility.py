"""Whether two pipelines fit together as teacher and student."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from asdm.errors import AsdmError

_DEFAULTS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def require_same_prediction(teacher: DiffusionPipeline, student: DiffusionPipeline, names: tuple[str, str]) -> None:
    """Refuse a teacher and a student that predict different things; the error has their names, in this order.

    Raises:
        AsdmError: their prediction types differ, or only one schedule ends at zero SNR.
    """
    for field, default in _DEFAULTS.items():
        expected, found = (pipeline.scheduler.config.get(field, default) for pipeline in (teacher, student))
        if found != expected:
            verb = "predicts" if field == "prediction_type" else f"has {field}"
            raise AsdmError(
                f"{names[1]}: {verb} {found}, {names[0]} {expected}: it was not pruned from such a model; name the "
                "one that it was pruned from"
            )
