"""Schedulers by short names, made from a pipeline's own so that they sample what its denoiser predicts."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from diffusers.schedulers import KarrasDiffusionSchedulers

from asdm import checks
from asdm.choices import SCHEDULERS
from asdm.errors import AsdmError, one_line
from asdm.pipelines.noise_schedules import predicts_samples, takes_zero_snr

_OF_LATENTS = {"clip_sample": False, "set_alpha_to_one": False}  # where diffusers' defaults are those of pixels
_CLASSES = {choice.class_name for choice in SCHEDULERS.values()} | {each.name for each in KarrasDiffusionSchedulers}


def require_scheduler(name: str) -> None:
    """
    Raises:
        AsdmError: no scheduler has this short name or class name.
    """
    checks.text("scheduler", name)
    if name.lower() not in SCHEDULERS and name not in _CLASSES:
        near = difflib.get_close_matches(name, [*SCHEDULERS, *_CLASSES], n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise AsdmError(
            f"scheduler={one_line(name, 80)}: must be one of {', '.join(SCHEDULERS)}, or a class of diffusers for "
            f"Stable Diffusion{hint}"
        )


def scheduler_named(name: str, current: Any) -> Any:
    """Make the scheduler of a short name or class, with the noise schedule and prediction type of `current`.

    Raises:
        AsdmError: there is none, it needs another package, or it cannot sample what the denoiser predicts.
    """
    require_scheduler(name)
    choice = SCHEDULERS.get(name.lower())
    kind: Any = getattr(diffusers, name if choice is None else choice.class_name)
    config = current.config
    _require_same_process(name, kind, config)
    known = inspect.signature(kind).parameters
    changes = {field: config.get(field, value) for field, value in _OF_LATENTS.items() if field in known}
    try:
        return kind.from_config(config, **changes | ({} if choice is None else choice.config))
    except ImportError as error:
        raise AsdmError(f"scheduler={name}: {one_line(error)}") from None
    except (ValueError, NotImplementedError, TypeError) as error:
        raise AsdmError(f"scheduler={name}: does not go with this model's schedule ({one_line(error)})") from None


def _require_same_process(name: str, kind: type[SchedulerMixin], config: Any) -> None:
    """Refuse a class that would ignore how the denoiser was trained, or the images' seeds."""
    if kind.__name__ == "DPMSolverSDEScheduler":  # one source of noise for a batch, from torch's global generator
        raise AsdmError(f"scheduler={name}: its noise does not follow the seeds; use dpmpp-2m-sde")
    if config.get("rescale_betas_zero_snr") and not takes_zero_snr(kind):
        raise AsdmError(f"scheduler={name}: cannot end at zero SNR, as this model's schedule does; use ddim or euler")
    if config.get("prediction_type") == "sample" and not predicts_samples(kind):
        raise AsdmError(f"scheduler={name}: takes no predictions of the image, as this model's; use ddim or dpmpp-2m")
    is_flow = str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("use_flow_sigmas")
    if is_flow:
        raise AsdmError(f"scheduler={name}: this model was trained by flow matching; leave the scheduler out")
    if str(config.get("_class_name", "")).startswith("EDM"):
        raise AsdmError(f"scheduler={name}: this model has EDM's noise levels; leave the scheduler out")


def scheduler_label(scheduler: Any) -> str:
    """Return what A1111's `parameters` call a scheduler; its class where they have no name."""
    name, config = type(scheduler).__name__, scheduler.config
    for choice in SCHEDULERS.values():
        fixed = {key: value for key, value in choice.config.items() if key in ("use_karras_sigmas", "algorithm_type")}
        if choice.class_name == name and all((config.get(key) or False) == value for key, value in fixed.items()):
            return choice.label
    return name
