"""`asdm plan`: the edits that fit a budget, as a file to read and to edit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import asdm
from asdm.choices import Router
from asdm.cli import loading
from asdm.cli.estimates import YesOption, announce
from asdm.cli.options import (
    MODEL,
    NAME,
    SHARE_OR_COUNT,
    CompensateOption,
    ConfigOption,
    DataOption,
    DeviceOption,
    MacsOption,
    ParamsOption,
    PlanFile,
    PortableOption,
    PredictionTypeOption,
    PresetOption,
    RefineOption,
    SeedOption,
    SpeedupOption,
)
from asdm.cli.output import say, say_path, warn_if_busy, warn_of_skipped
from asdm.cli.progress import reporting
from asdm.errors import AsdmError

if TYPE_CHECKING:
    from asdm.sensitivity.profile import RedundancyMap
    from asdm.student.plan import PruningPlan


def plan(
    source: Annotated[
        str | None,
        typer.Argument(
            help=f"A profile that `asdm analyze` wrote, or a model: {MODEL}.", callback=NAME, show_default=False
        ),
    ] = None,
    speedup: SpeedupOption = None,
    params: ParamsOption = None,
    macs: MacsOption = None,
    preset: PresetOption = None,
    portable: PortableOption = False,
    compensate: CompensateOption = None,
    experts: Annotated[
        float | None,
        typer.Option(
            help="Expert kernels (CLME-CondConv): convolutions that remain also mix the kernels of removed ones. The "
            "value limits the added parameters: a fraction of the original's (0.05), or a number (5e6).",
            callback=SHARE_OR_COUNT,
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        Router | None,
        typer.Option(
            help="What the expert kernels' mixture depends on; the convolution's input by default.", show_default=False
        ),
    ] = None,
    refine: RefineOption = None,
    remeasure: Annotated[
        Path | None,
        typer.Option(help="Only measure this plan's speed-up, and write it into the plan.", show_default=False),
    ] = None,
    data: DataOption = None,
    out: PlanFile = None,
    prediction_type: PredictionTypeOption = None,
    config: ConfigOption = None,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    yes: YesOption = False,
) -> None:
    """Choose the edits of least total sensitivity that fit a budget; a speed-up is measured on --device."""
    from asdm.families import denoiser_of
    from asdm.planning.budget import require_budget
    from asdm.planning.full_plan import full_plan, require_plannable

    if remeasure is not None:
        others = (speedup, params, macs, preset, compensate, experts, router, refine, data, out)
        if portable or any(value is not None for value in others):
            raise AsdmError("--remeasure: measures a plan as it is, and writes into its file; leave out other options")
        _remeasure(remeasure, source, device, prediction_type=prediction_type, config=config)
        return
    if source is None:
        raise AsdmError("name a profile that `asdm analyze` wrote, or a model")
    require_budget(speedup, params, macs, preset)
    _require_effect(source, preset, refine, experts, router, data)
    if compensate is None and source.startswith("random:"):
        compensate = "none"
    claims: dict[str, Any] = {"prediction_type": prediction_type, "config": config}
    settings: dict[str, Any] = {"compensate": compensate, "data": data, "seed": seed}
    planned = settings
    if portable:
        _require_portable(preset, compensate, experts, refine)
        settings = settings | {"compensate": "none"}  # units are tried plainly; projections that fold come on top
    pipeline = None
    if source.endswith(".json"):
        redundancy = _saved_profile(source, refine, claims)
    elif preset is not None and not refine:
        redundancy = _profile_for_preset(source, preset, experts, claims)
    else:
        warn_of_skipped(data)
        pipeline = loading.load_model(source, device, **claims)
        require_plannable(denoiser_of(pipeline), preset=preset, portable=portable, refine=refine or 0, experts=experts)
        budget = {"speedup": speedup, "params": params, "macs": macs, "preset": preset}
        _announce(pipeline, yes, budget, refine or 0, **settings)
        redundancy = _measured_profile(pipeline, params, macs, preset, **settings)
    _require_fitted(redundancy, preset, compensate)
    with reporting() as report:
        made = full_plan(
            redundancy,
            pipeline,
            budget={"speedup": speedup, "params": params, "macs": macs, "preset": preset},
            portable=portable,
            refine=refine or 0,
            experts=experts,
            router=router or "input",
            device=device,
            progress=lambda title, *rest: say(rest[-1]) if title == "plan" else report(title, *rest),
            **planned,
        )
    out = out or Path("plan.json")
    made.save(out)
    for edit in made.edits:
        say(f"  {edit}")
    say(_summary(made))
    say_path(f"written to {out}")


def _announce(
    pipeline: Any, yes: bool, budget: dict[str, Any], refine: int, *, compensate: Any, data: str | None, seed: int
) -> None:
    """Print how long the analysis and the plan will take."""
    from asdm.estimates import steps
    from asdm.estimates.forecast import Forecast

    kind: Any = compensate or "linear"
    forecast = Forecast(pipeline, budget, kind)
    sensitivity: Any = None if budget["preset"] is None else "taylor"
    analysis = steps.analysis(
        pipeline, forecast.architecture, data=data, sensitivity=sensitivity, compensate=compensate
    )
    given: dict[str, Any] = {"compensate": kind, "refine": refine, "data": data, "call_ms": forecast.call_ms}
    planned = steps.plan(pipeline, forecast.architecture, budget=budget, expected=forecast.plan, **given)
    announce(forecast.times([analysis, planned]), yes=yes)


def _require_portable(preset: str | None, compensate: str | None, experts: float | None, refine: int | None) -> None:
    given = {"--preset": preset, "--compensate": compensate, "--experts": experts, "--refine": refine}
    for name, value in given.items():
        if value not in (None, "none", 0):
            raise AsdmError(f"{name} {value}: does not go with --portable; leave one of them out")


def _require_effect(
    source: str, preset: str | None, refine: int | None, experts: float | None, router: str | None, data: str | None
) -> None:
    """Raise an AsdmError for an option that the others leave without an effect."""
    if router is not None and experts is None:
        raise AsdmError(f"--router {router}: is of expert kernels; give --experts too, or leave it out")
    if data is not None and source.endswith(".json"):
        raise AsdmError(f"--data {data}: a profile is measured already; name the model instead, or leave it out")
    if data is not None and preset is not None and not refine:
        raise AsdmError(f"--data {data}: a preset needs no analysis; give --refine too, or leave it out")


def _require_fitted(redundancy: RedundancyMap, preset: str | None, compensate: str | None) -> None:
    """Raise an AsdmError for a compensation where nothing is fitted."""
    if preset is None or compensate in (None, "none"):
        return
    if redundancy.family.preset(preset, redundancy.units).edit is not None:
        raise AsdmError(f"--compensate {compensate}: {preset} drops whole layers, and nothing is fitted; leave it out")


def _saved_profile(path: str, refine: int | None, claims: dict[str, Any]) -> RedundancyMap:
    if refine:
        raise AsdmError(f"--refine {refine}: a profile has no weights to try the plan with; name the model instead")
    if any(claims.values()):
        raise AsdmError(f"{path}: a profile; --prediction-type and --config describe a model: leave them out")
    return asdm.RedundancyMap.load(path)


def _profile_for_preset(source: str, preset: str, experts: float | None, claims: dict[str, Any]) -> RedundancyMap:
    """Return the units alone, without weights or measurements: a preset's edits are fixed."""
    from asdm.pipelines.shapes import denoiser_without_weights
    from asdm.planning.full_plan import require_plannable
    from asdm.sensitivity.analysis import structure_map

    denoiser = denoiser_without_weights(source, **claims)
    require_plannable(denoiser, preset=preset, experts=experts)
    return structure_map(denoiser, source)


def _measured_profile(
    pipeline: Any, params: float | None, macs: float | None, preset: str | None, **settings: Any
) -> RedundancyMap:
    from asdm.families import denoiser_of
    from asdm.planning.budget import require_budget_of

    require_budget_of(denoiser_of(pipeline), params, macs)
    warn_if_busy()
    with reporting() as report:
        return asdm.analyze(
            pipeline,
            sensitivity=None if preset is None else "taylor",  # the quick one: in a preset it chooses nothing
            progress=lambda done, total, name: report("analyse", done, total, name),
            **settings,
        )


def _remeasure(path: Path, model: str | None, device: str | None, **claims: Any) -> None:
    """Measure a plan's speed-up on the model that it names, or on another of the same architecture."""
    from asdm.families import denoiser_of

    made = asdm.PruningPlan.load(path)
    model = model or (None if made.metrics is None else made.metrics.model)
    if model is None:
        raise AsdmError(f"{path}: does not name its model; name the model before --remeasure")
    warn_if_busy()
    made = asdm.remeasure_plan(made, denoiser_of(loading.load_model(model, device, **claims)))
    made.save(path)
    assert made.metrics is not None and made.metrics.measured_ratio is not None
    target = made.metrics.target.get("speedup", 0.0)
    short = f", short of the requested {target:g}x" if made.metrics.measured_ratio.high < target else ""
    say(f"{_summary(made)}{short}")
    say_path(f"written to {path}")


def _summary(plan: PruningPlan) -> str:
    from asdm.families.registry import family_named

    metrics, parts = plan.metrics, [f"{len(plan.edits)} edit{'s' if len(plan.edits) != 1 else ''}"]
    if metrics is not None:
        basis = " by MACs" if metrics.speedup_basis == "macs" else ""
        parts.append(
            f"{family_named(plan.base.class_name).label} predicted to be {metrics.predicted_speedup:.2f}x faster{basis}"
        )
        if metrics.measured_ratio is not None:
            parts[-1] += f", measured {metrics.measured_ratio}"
        if metrics.predicted_sensitivity is not None:
            parts.append(f"sensitivity {metrics.predicted_sensitivity:.4f} as the sum over the edits")
            if metrics.measured_sensitivity:
                parts[-1] += f", {metrics.measured_sensitivity:.4f} measured for all edits together"
    return "; ".join(parts)
