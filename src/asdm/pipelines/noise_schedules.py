"""The scheduler that a checkpoint is sampled by, made of what it says of itself."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
from diffusers import DDIMScheduler, EDMEulerScheduler, SchedulerMixin

from asdm.errors import AsdmError, one_line
from asdm.pipelines.claims import CheckpointFacts
from asdm.pipelines.headers import Header
from asdm.pipelines.untrusted import require_plausible


def scheduler_for(scheduler: Any, said: CheckpointFacts) -> Any:
    """Make a scheduler that samples as was said, of the same class where that class can.

    Raises:
        AsdmError: a field of its config has a value of which no scheduler can be made.
    """
    if type(scheduler).__name__.startswith("EDM") and not said.scheduler:
        return scheduler.from_config(scheduler.config, **_without_none(prediction_type=said.prediction_type))
    named = said.scheduler.get("_class_name")
    kind: Any = type(scheduler) if named is None else getattr(diffusers, named, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise AsdmError(f"scheduler {named}: not one of diffusers'")
    config = dict(said.scheduler) if named else {**scheduler.config, **said.scheduler}
    changes = _without_none(prediction_type=said.prediction_type, rescale_betas_zero_snr=said.zero_snr)
    if said.zero_snr and not said.scheduler.get("rescale_betas_zero_snr"):
        changes["timestep_spacing"] = "trailing"  # the first step is that of pure noise (arXiv 2305.08891, Sec. 3.3)
    unable = said.zero_snr and not takes_zero_snr(kind)
    if unable or (said.prediction_type == "sample" and not predicts_samples(kind)):
        kind = DDIMScheduler
        changes |= {"clip_sample": False, "set_alpha_to_one": config.get("set_alpha_to_one", False)}
    require_plausible(config, said.source)
    try:
        return kind.from_config(config, **changes)
    except Exception as error:  # of diffusers, any kind
        raise AsdmError(
            f"{said.source}: no {kind.__name__} can be made of it ({type(error).__name__}: {one_line(error, 100)}); "
            "correct it, or remove it"
        ) from None


def edm_scheduler(header: Header) -> Any | None:
    """Return the sampler of a checkpoint with EDM's noise levels (CosXL's marker tensors); None for all others."""
    most, least = header.number("edm_vpred.sigma_max"), header.number("edm_vpred.sigma_min")
    if most is None:
        return None
    least = 0.002 if least is None else least
    if not 0 < least < most < math.inf:
        raise AsdmError(
            f"{header.path}: edm_vpred.sigma_min={least:g} and edm_vpred.sigma_max={most:g}; the first must be "
            "positive and the second larger; download it again"
        )
    return EDMEulerScheduler(
        sigma_min=least,
        sigma_max=most,
        sigma_data=1.0,
        prediction_type="v_prediction",
        sigma_schedule="exponential",
    )


def takes_zero_snr(kind: type) -> bool:
    """Return whether a class of schedulers can end at zero SNR. Others ignore the config's field."""
    return "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters  # type: ignore[misc]


def predicts_samples(kind: type) -> bool:
    """Return whether a class of schedulers takes predictions of the image itself."""
    return not any(name in kind.__name__ for name in ("PNDM", "Euler", "LMS", "Heun", "KDPM2"))


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
