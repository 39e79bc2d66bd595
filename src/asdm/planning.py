"""From a redundancy map and a budget to a pruning plan; and the published presets by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from diffusers import UNet2DConditionModel
from scipy.optimize import Bounds, LinearConstraint, milp

from asdm.errors import AsdmError
from asdm.evaluation.latency import measure_interleaved, speedup, unet_call
from asdm.random_models import random_unet
from asdm.redundancy import RedundancyMap, UnitRecord
from asdm.student.edits import CompensationKind, CondConv, Edit, Remove, Shorten
from asdm.student.plan import PlanBase, PlanFigures, PruningPlan, build_student
from asdm.student.stock import dropped
from asdm.units import conv_channels, goes_with, layers

MEASUREMENT_ATTEMPTS = 6
CLOSE_ENOUGH = 1.04  # a plan this little faster than needed is not improved on
MEASUREMENT_MARGIN = 1.02  # asked of the plan's own measurement, so that a later one holds the target too
# BK-SDM's students (arXiv 2305.15798, Sec. 3.1); how many levels fewer than the original has, in the last field.
PRESETS = {"bk-base": (1, True, 0), "bk-small": (1, False, 0), "bk-tiny": (1, False, 1)}


def make_plan(
    redundancy: RedundancyMap,
    *,
    speedup: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    preset: str | None = None,
    compensate: CompensationKind | None = None,
    unet: UNet2DConditionModel | None = None,
    rounds: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> PruningPlan:
    """The removals of least total sensitivity inside one budget; for `speedup`, the measured one.

    Args:
        speedup: how many times faster the UNet call must be, measured against the original in turns.
        params, macs: what must remain, as a part of the original in (0, 1) or as a number of parameters
            or of MACs (attention products counted).
        preset: "bk-base", "bk-small" or "bk-tiny" instead of a budget.
        compensate: what to fit in the place of the removed branches (`fit_compensation`), by default "linear";
            "none" for plain removal. Presets drop whole layers, in whose place nothing is fitted.
        unet: the UNet to measure; without it one of the same shape with random weights is made.
        rounds: timed rounds per measurement; by default 4 to 20, as many as take half a minute.

    Raises:
        AsdmError: not exactly one of the four given, an unknown preset, or a budget that even removing
            every unit does not reach; the message says what is reachable.
    """
    given = {"speedup": speedup, "params": params, "macs": macs, "preset": preset}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise AsdmError(f"give exactly one of speedup, params, macs, preset; got {', '.join(chosen) or 'none'}")
    compensate = compensate or "linear"
    if preset is not None:
        return _preset(redundancy, preset)
    if speedup is not None:
        rounds = rounds or int(np.clip(15_000 / redundancy.latency_ms, 4, 20))
        return _plan_for_speedup(redundancy, speedup, compensate, unet, rounds, progress)
    if params is not None:
        saved = [unit.parameters - _map_parameters(unit, compensate) for unit in redundancy.units]
        units = _Budget("params", redundancy.parameters, saved).solve(redundancy, params)
        return _plan(redundancy, units, {"params": params}, compensate)
    assert macs is not None
    budget = _Budget(
        "macs",
        redundancy.gmacs * 1e9,
        [unit.gmacs * 1e9 - _map_macs(unit, compensate) for unit in redundancy.units],
    )
    return _plan(redundancy, budget.solve(redundancy, macs), {"macs": macs}, compensate)


def add_banks(
    plan: PruningPlan,
    unet: UNet2DConditionModel,
    *,
    params: float = 0.1,
    router: Literal["input", "input+time", "time"] = "input",
    activation: Literal["softmax", "sigmoid"] = "softmax",
) -> PruningPlan:
    """The plan with CLME-CondConv banks: convolutions that stay inherit those of removed resnets as experts.

    Each removed convolution goes to the nearest kept one, in order of execution, of its kind (`conv1`, `conv2`) and
    its output channels; the nearest pairs first, until the budget is used (inferred).

    Args:
        params: what the experts may add, as a part of the original's parameters or as a number of them.

    Raises:
        AsdmError: the plan is for another model, or no expert fits into the budget.
    """
    plan.require_for(unet)
    order = {name: index for index, name in enumerate(layers(unet))}
    removed = [edit.unit for edit in plan.edits if isinstance(edit, Remove)]
    convs = {name: unet.get_submodule(name) for name in conv_channels(unet)}
    gone = [name for name in convs if goes_with(name, removed)]
    pairs = []
    for source in gone:
        resnet, _, conv = source.rpartition(".")
        fitting = [
            (abs(order[name.rpartition(".")[0]] - order[resnet]), name)
            for name in convs
            if name not in gone and name.endswith(conv) and len(convs[name].weight) == len(convs[source].weight)
        ]
        if fitting:
            distance, name = min(fitting)
            pairs.append((distance, order[resnet], name, source))
    total = sum(p.numel() for p in unet.parameters())
    budget = params * total if params <= 1 else params
    banks: dict[str, list[str]] = {}
    for _, _, name, source in sorted(pairs):
        cost = convs[name].weight.numel() + len(convs[name].weight)
        if cost <= budget:
            banks.setdefault(name, []).append(source)
            budget -= cost
    if not banks:
        raise AsdmError(
            f"params={params:g}: no expert fits; the plan removes {len(gone)} convolutions, "
            f"{len(pairs)} of which a kept one could inherit; allow more, or drop the banks"
        )
    edits = [
        CondConv(unit=name, experts=sources, router=router, activation=activation) for name, sources in banks.items()
    ]
    return _with_edits(plan, [*plan.edits, *edits])


def _map_parameters(unit: UnitRecord, compensate: CompensationKind) -> int:
    """Parameters of the map that is fitted in a removed unit's place."""
    by_channel = {"none": 0, "bias": 1, "diagonal": 2, "linear": unit.channels + 1}[compensate]
    return 0 if unit.has_shortcut else by_channel * unit.channels


def _map_macs(unit: UnitRecord, compensate: CompensationKind) -> int:
    """MACs of that map for one sample."""
    by_channel = {"none": 0, "bias": 0, "diagonal": 1, "linear": unit.channels}[compensate]
    return 0 if unit.has_shortcut else by_channel * unit.channels * unit.positions


def _saved_ms(unit: UnitRecord, compensate: CompensationKind) -> float:
    """What removal saves of a call, the map in its place counted as slow as the unit itself for its MACs."""
    by_mac = unit.latency_ms / (unit.gmacs * 1e9) if unit.gmacs else 0.0
    return unit.latency_ms - min(unit.latency_ms, by_mac * _map_macs(unit, compensate))


@dataclass(frozen=True)
class _Budget:
    """One resource: the original's total, and what each unit's removal saves of it."""

    name: str
    total: float
    savings: Sequence[float]

    def solve(self, redundancy: RedundancyMap, remaining: float) -> list[str]:
        kept = remaining if remaining <= 1 else remaining / self.total
        units = least_sensitive(redundancy.units, self.savings, self.total * (1 - kept))
        if not 0 < kept <= 1 or units is None:
            least = 1 - most_saved(redundancy.units, self.savings) / self.total
            raise AsdmError(
                f"{self.name}={remaining:g}: out of reach; between {least:.3f} and 1 of the original's "
                f"{self.total:.4g} can remain; ask for more"
            )
        return units


def least_sensitive(units: list[UnitRecord], savings: Sequence[float], needed: float) -> list[str] | None:
    """The units whose removal saves at least `needed` at the least total sensitivity; None if none does.

    An integer programme: minimise s.x subject to savings.x >= needed and, as an attention's parts go
    with it, x_part + x_attention <= 1.
    """
    if needed <= 0:
        return []
    row_of = {unit.name: index for index, unit in enumerate(units)}
    exclusive = [(row_of[unit.parent], index) for index, unit in enumerate(units) if unit.parent in row_of]
    rows = np.zeros((1 + len(exclusive), len(units)))
    rows[0] = savings
    for row, (parent, part) in enumerate(exclusive, start=1):
        rows[row, [parent, part]] = 1
    lower = np.array([needed] + [-np.inf] * len(exclusive))
    upper = np.array([np.inf] + [1.0] * len(exclusive))
    scale = max(savings) or 1.0
    rows[0] /= scale
    lower[0] /= scale
    sensitivity = np.array([unit.sensitivity for unit in units])
    solution = milp(
        # a tiny price on each removal: of equally good plans, the one with fewer
        sensitivity + 1e-9,
        integrality=np.ones(len(units)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, lower, upper),
        options={"time_limit": 60, "mip_rel_gap": 1e-4},
    )
    if solution.x is None:
        return None
    return [unit.name for unit, removed in zip(units, solution.x, strict=True) if removed > 0.5]


def most_saved(units: list[UnitRecord], savings: Sequence[float]) -> float:
    """What removing every resnet and attention saves."""
    return sum(saved for unit, saved in zip(units, savings, strict=True) if unit.parent is None)


def _plan_for_speedup(
    redundancy: RedundancyMap,
    target: float,
    compensate: CompensationKind,
    unet: UNet2DConditionModel | None,
    rounds: int,
    progress: Callable[[str], None] | None,
) -> PruningPlan:
    """Plan by the map's latencies, measure the pruned UNet, and ask for more or less until it is just enough."""
    savings = [_saved_ms(unit, compensate) for unit in redundancy.units]
    total = redundancy.latency_ms
    reachable = total / max(total - most_saved(redundancy.units, savings), 1e-9)
    if target <= 1:
        raise AsdmError(f"speedup={target:g}: must be above 1; up to about {reachable:.2f} can be reached")
    original = unet if unet is not None else random_unet(redundancy.unet_config)
    needed = target * MEASUREMENT_MARGIN
    aim, too_little, enough = target, 1.0, np.inf
    best: PruningPlan | None = None
    most = 0.0
    for attempt in range(1, MEASUREMENT_ATTEMPTS + 1):
        units = least_sensitive(redundancy.units, savings, total * (1 - 1 / aim))
        if units is None:
            # More than everything: the aim lies beyond what the map can give.
            enough, aim = aim, (too_little + min(aim, reachable)) / 2
            continue
        plan = _plan(redundancy, units, {"speedup": target}, compensate)
        measured = measured_speedup(original, plan, rounds)
        most = max(most, measured)
        if progress is not None:
            progress(f"attempt {attempt}: {len(units)} removals, {measured:.3f}x measured, {target:g}x asked for")
        if measured >= needed:
            best, enough = _with_measured(plan, measured), aim
            if measured <= needed * CLOSE_ENOUGH:
                break
        else:
            too_little = aim
        guess = aim * needed * (1 + (CLOSE_ENOUGH - 1) / 2) / measured
        aim = guess if too_little < guess < enough else (too_little + min(enough, 2 * too_little)) / 2
    if best is None:
        raise AsdmError(
            f"speedup={target:g}: out of reach; measured {most:.2f}x at most, "
            f"about {reachable:.2f}x if every unit went; ask for less"
        )
    return best


def measured_speedup(unet: UNet2DConditionModel, plan: PruningPlan, rounds: int = 10) -> float:
    """How many times faster a UNet call (batch 2) is with the plan's edits, timed in turns."""
    was_training = unet.training
    unet.eval()
    student = build_student(unet, plan)
    times = measure_interleaved(
        {"original": unet_call(unet), "pruned": unet_call(student)}, rounds=rounds, device=unet.device
    )
    unet.train(was_training)
    return speedup(times["original"], times["pruned"])


def _plan(
    redundancy: RedundancyMap, units: Iterable[str], target: dict[str, float], compensate: CompensationKind
) -> PruningPlan:
    units = list(units)
    removed = [unit for unit in redundancy.units if _counts_as_removed(unit, units)]
    saved = sum(_saved_ms(unit, compensate) for unit in removed)
    return PruningPlan(
        base=PlanBase.of(redundancy.fingerprint),
        edits=[Remove(unit=name, compensate=compensate) for name in units],
        figures=PlanFigures(
            target=target,
            predicted_sensitivity=sum(unit.sensitivity for unit in removed),
            predicted_speedup=redundancy.latency_ms / (redundancy.latency_ms - saved),
        ),
    )


def _counts_as_removed(unit: UnitRecord, removed: list[str]) -> bool:
    """Whether the unit goes, without counting an attention's parts beside the attention."""
    return unit.name in removed or (unit.parent is None and goes_with(unit.name, removed))


def _with_measured(plan: PruningPlan, measured: float) -> PruningPlan:
    assert plan.figures is not None
    figures = plan.figures.model_copy(update={"measured_speedup": measured})
    return plan.model_copy(update={"figures": figures})


def _preset(redundancy: RedundancyMap, preset: str) -> PruningPlan:
    if preset not in PRESETS:
        raise AsdmError(f"{preset}: no such preset; allowed: {', '.join(PRESETS)}")
    layers, mid_block, fewer = PRESETS[preset]
    names = [unit.name for unit in redundancy.units]
    levels = len({unit.stage for unit in redundancy.units if unit.name.startswith("down_blocks.")})
    edit = Shorten(layers_per_block=layers, mid_block=mid_block, levels=levels - fewer if fewer else None)
    return _with_edits(_plan(redundancy, dropped(edit, names), {}, "none"), [edit])


def _with_edits(plan: PruningPlan, edits: Sequence[Edit]) -> PruningPlan:
    return plan.model_copy(update={"edits": list(edits)})
