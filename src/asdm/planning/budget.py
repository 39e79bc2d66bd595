"""`make_plan`: the least sensitive plan inside one budget. What budgets are allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from asdm import checks
from asdm.choices import CompensationKind
from asdm.errors import AsdmError
from asdm.families import Denoiser, macs_of_call
from asdm.planning.finished import finished
from asdm.planning.portable import portable_plan
from asdm.planning.possible_edits import PossibleEdit, Resource, joint_savings, plan_of, possible_edits
from asdm.planning.presets import PRESETS, preset_plan
from asdm.planning.program import least_sensitive, most_saved
from asdm.planning.speedup import plan_for_speedup
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan

MAX_SPEEDUP = 100


def require_budget(speedup: Any, params: Any, macs: Any, preset: Any) -> None:
    """Check that exactly one budget is given, and that some model could meet it.

    Raises:
        AsdmError: not exactly one of the four is given, or its value is out of range.
    """
    given = {"speedup": speedup, "params": params, "macs": macs, "preset": preset}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise AsdmError(f"give exactly one of speedup, params, macs, preset; got {', '.join(named) or 'none'}")
    if speedup is not None:
        checks.number(above=1)("speedup", speedup)
    elif preset is None:
        checks.share_or_count(named[0], given[named[0]])
    elif preset not in PRESETS:
        raise AsdmError(f"{preset}: no such preset; allowed: {', '.join(PRESETS)}")
    if speedup is not None and speedup > MAX_SPEEDUP:
        raise AsdmError(f"speedup={speedup:g}: out of reach of any model; ask for less, at most {MAX_SPEEDUP}")


def require_budget_of(denoiser: Denoiser, params: float | None, macs: float | None) -> None:
    """Raise an AsdmError for a number of parameters or MACs above the denoiser's own."""
    if params is not None:
        _require_at_most(sum(p.numel() for p in denoiser.parameters()), "params", params)
    if macs is not None and macs > 1:  # a number; counting takes a call
        _require_at_most(macs_of_call(denoiser).below(), "macs", macs)


def _require_at_most(total: float, name: str, remaining: float) -> None:
    if remaining > max(1, total):
        raise AsdmError(f"{name}={remaining:g}: the denoiser has {total:.4g}; ask for fewer, or a share such as 0.6")


@checks.arguments(
    redundancy=checks.a(RedundancyMap, "asdm.analyze makes one"),
    portable=checks.flag,
    compensate=checks.literal(CompensationKind),
    unet=checks.UNET,
    rounds=checks.ROUNDS,
    progress=checks.function,
)
def make_plan(
    redundancy: RedundancyMap,
    *,
    speedup: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    preset: str | None = None,
    portable: bool = False,
    compensate: CompensationKind | None = None,
    unet: Denoiser | None = None,
    device: str | None = None,
    rounds: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> PruningPlan:
    """Choose the edits of least total sensitivity inside one budget; a speed-up is measured.

    The choices are the removal of each unit, and all other edits that the profile has measured.

    Args:
        speedup: how many times faster a denoiser call must be, measured in turns with the original.
        params, macs: what must remain, as a fraction of the original in (0, 1] or as a number of parameters
            or of MACs (attention products counted), at least 10,000.
        preset: in place of a budget "a-sdm" (the paper's 22% less time, for SD 1.5's shape), "a-sdm-fast" (half the
            time), BK-SDM's "bk-base", "bk-small", "bk-tiny", or, for SDXL's shape, "ssd-1b", "vega", "koala-1b",
            "koala-700m".
        portable: choose among the stock UNets that ComfyUI, Forge and diffusers read: whole layers, levels, transformer
            blocks and the mid block go. Fitted is what folds into weights that stay.
        compensate: what to fit in place of the removed branches (`fit_compensation`), by default "linear", or what
            the profile's ablation tried; "none" for plain removal. BK-SDM's presets drop whole layers and fit nothing.
        unet: the denoiser to measure; by default one of the profile's shape and precision with random weights.
        device: where to make it; the CPU by default.
        rounds: the least number of timed rounds per measurement, by default 4 to 10; more follow on a busy machine.
            Where even these are not precise, the plan goes by the profile's latencies or by MACs, with a correction,
            and its `speedup_basis` says so; `remeasure_plan` measures it later.

    Raises:
        AsdmError: not exactly one of the four given, an unknown preset or one for other models, or a budget that even
            removing every unit does not reach; the message says what is reachable.
    """
    require_budget(speedup, params, macs, preset)
    if params is not None:
        _require_at_most(redundancy.parameters, "params", params)
    if macs is not None:
        _require_at_most(redundancy.gmacs * 1e9, "macs", macs)
    fitted = compensate
    compensate = compensate or (redundancy.compensate if redundancy.estimator == "ablation" else "linear")
    if portable:
        require_portable(preset, fitted)
        budget = {"speedup": speedup, "params": params, "macs": macs}
        given = {name: value for name, value in budget.items() if value is not None}
        is_fitted = fitted != "none"
        plan = portable_plan(redundancy, given, unet=unet, fitted=is_fitted, rounds=rounds or 5, note=progress)
        return finished(redundancy, plan)
    choices = possible_edits(redundancy, compensate)
    if preset is not None:
        plan = preset_plan(redundancy, preset, choices)
    elif speedup is not None:
        rounds = rounds or int(np.clip(10_000 / redundancy.latency_ms, 4, 10))
        plan = plan_for_speedup(redundancy, speedup, choices, unet, device, rounds, progress)
    elif params is not None:
        chosen = _within("params", params, redundancy.parameters, choices, "parameters")
        plan = plan_of(redundancy, chosen, {"params": params})
    else:
        assert macs is not None
        chosen = _within("macs", macs, redundancy.gmacs * 1e9, choices, "macs")
        plan = plan_of(redundancy, chosen, {"macs": macs})
    return finished(redundancy, plan, preset)


def require_portable(preset: str | None, compensate: CompensationKind | None) -> None:
    """Raise an AsdmError for what does not go with a portable plan."""
    if preset is not None:
        raise AsdmError(f"preset={preset}: is a plan of its own; give portable a budget: speedup, params or macs")
    if compensate not in (None, "none"):
        raise AsdmError(
            f"compensate={compensate}: a portable student has no place for projections, only for what folds; leave it "
            "out, or give none"
        )


def _within(
    name: str, remaining: float, total: float, choices: list[PossibleEdit], resource: Resource
) -> list[PossibleEdit]:
    """Return the least sensitive edits that leave no more than `remaining` of one resource."""
    kept = remaining if remaining <= 1 else remaining / total
    savings, pairs = [getattr(choice, resource) for choice in choices], joint_savings(choices, resource)
    chosen = least_sensitive(choices, savings, total * (1 - kept), pairs=pairs)
    if chosen is None:
        least = 1 - most_saved(choices, savings, pairs) / total
        raise AsdmError(
            f"{name}={remaining:g}: out of reach; between {least:.3f} and 1 of the original's "
            f"{total:.4g} can remain; ask for more"
        )
    return chosen
