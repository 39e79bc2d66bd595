"""A plan from a profile in one call: choose edits, refine them by what they do together, add expert kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from asdm.choices import CompensationKind, Router
from asdm.devices import fastest_device
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_of, family_of
from asdm.pipelines.random_models import random_denoiser
from asdm.planning.budget import make_plan
from asdm.planning.experts import add_cond_conv
from asdm.planning.presets import require_preset
from asdm.planning.refine import refine_plan
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan

Progress = Callable[[str, int, int, str], None]


def require_plannable(
    denoiser: Denoiser,
    *,
    preset: str | None = None,
    portable: bool = False,
    refine: int = 0,
    experts: float | None = None,
) -> None:
    """Check what follows from the architecture alone, before anything is measured.

    Raises:
        AsdmError: the denoiser allows no such plan.
    """
    family = family_of(denoiser)
    if preset is not None and require_preset(denoiser, preset).edit is not None:
        given = {"refine": refine or None, "experts": experts}
        for name, value in given.items():
            if value is not None:
                raise AsdmError(f"{name}={value:g}: does not go with {preset}, which drops whole layers; leave it out")
    if portable:
        _require_portable(refine, experts)
        family.portable_shapes(denoiser.config, [unit.name for unit in family.units(denoiser)])
    if experts is not None and not family.conv_channels(denoiser):
        raise AsdmError(f"experts={experts:g}: a {family.label} has no convolutions for expert kernels; leave it out")


def _require_portable(refine: int, experts: float | None) -> None:
    if refine or experts is not None:
        raise AsdmError("portable: refinement and expert kernels make students that no program reads; leave them out")


def full_plan(
    redundancy: RedundancyMap,
    pipeline: DiffusionPipeline | None = None,
    *,
    budget: Mapping[str, Any],
    compensate: CompensationKind | None = None,
    portable: bool = False,
    refine: int = 0,
    experts: float | None = None,
    router: Router = "input",
    data: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruningPlan:
    """Make a plan, refine it, and add expert kernels.

    Args:
        pipeline: the profile's model, to measure with and to refine on; without it, random weights are measured.
        budget: one of speedup, params, macs and preset, as for `make_plan`.
        portable: as for `make_plan`; refinement and expert kernels do not go with it.
        refine: rounds of `refine_plan`; they need the pipeline.
        experts: the parameters that expert kernels may add, as for `add_cond_conv`; None for no expert kernels.
        data, seed: the calibration of the refinement.
        device: where random weights are measured; the fastest by default.
        progress: called with a title, its done and total, and a note; with "plan" for each measured attempt, and with
            "refine".

    Raises:
        AsdmError: as `make_plan`, `refine_plan` and `add_cond_conv`.
    """
    if refine and pipeline is None:
        raise AsdmError(f"refine={refine}: a profile has no weights to try the plan with; give the pipeline too")
    if portable:
        _require_portable(refine, experts)
    report = progress or (lambda *_: None)
    denoiser = None if pipeline is None else denoiser_of(pipeline)
    attempts: list[str] = []

    def attempted(note: str) -> None:
        attempts.append(note)
        report("plan", len(attempts), len(attempts), note)

    plan = make_plan(
        redundancy,
        **budget,
        portable=portable,
        compensate=compensate,
        unet=denoiser,
        device=device or fastest_device(),
        progress=attempted,
    )
    if refine and pipeline is not None:
        plan = refine_plan(
            pipeline,
            redundancy,
            plan,
            data=data,
            rounds=refine,
            seed=seed,
            progress=lambda done, total, note: report("refine", done, total, note),
        )
    if experts is not None:
        if denoiser is None:
            denoiser = random_denoiser(redundancy.family, redundancy.unet_config)
        plan = add_cond_conv(plan, denoiser, params=experts, router=router)
    return plan
