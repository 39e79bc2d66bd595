"""From a redundancy map and a budget to a pruning plan; and the published presets by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from scipy.optimize import Bounds, LinearConstraint, milp

from asdm import checks
from asdm.choices import CompensationKind
from asdm.devices import on_device
from asdm.edits import CondConv, DropLayers, Edit, GriAttention, Remove, UnitEdit, parse_edits
from asdm.errors import AsdmError
from asdm.families.unet_calls import unet_call
from asdm.families.unet_shorter import dropped
from asdm.families.unet_structure import conv_channels, is_covered_by, is_level, layers
from asdm.measure.hooks import preserve_module_state
from asdm.measure.latency import Ratio, measure_interleaved
from asdm.pipelines.random_models import random_unet
from asdm.sensitivity.profile import EditRecord, RedundancyMap, UnitRecord
from asdm.student.build import build_student
from asdm.student.plan import PlanBase, PlanMetrics, PruningPlan, SpeedupBasis

MOST_SPEEDUP = 100  # more is not asked in earnest
MEASUREMENT_ATTEMPTS = 6
PRECISE_ENOUGH = 0.05  # half of a measured speed-up's interval, relative to it, up to which a plan goes by it
CLOSE_ENOUGH = 1.04  # a plan this little faster than needed is not improved on
MEASUREMENT_MARGIN = 1.02  # asked of the plan's own measurement, so that a later one holds the target too
# What a speed-up is multiplied by where it is not measured. Of 16 plans of the embedded UNet, the measured ones were
# 1.00 to 1.03 times those by latencies, and 0.96 to 1.06 times those by MACs.
CORRECTIONS: dict[SpeedupBasis, float] = {"latency": MEASUREMENT_MARGIN, "macs": 1.05}
# BK-SDM's students (arXiv 2305.15798, Sec. 3.1): layers a block, mid block, how many levels fewer.
BK_PRESETS = {"bk-base": (1, True, 0), "bk-small": (1, False, 0), "bk-tiny": (1, False, 1)}
PRESETS = ("a-sdm", "a-sdm-fast", *BK_PRESETS)


def require_budget(speedup: Any, params: Any, macs: Any, preset: Any) -> None:
    """
    Raises:
        AsdmError: not exactly one of the four is given, or it is none that any model could hold.
    """
    given = {"speedup": speedup, "params": params, "macs": macs, "preset": preset}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise AsdmError(f"give exactly one of speedup, params, macs, preset; got {', '.join(named) or 'none'}")
    if preset is None:
        above = 1 if speedup is not None else 0
        checks.number(above=above)(named[0], given[named[0]])
    elif preset not in PRESETS:
        raise AsdmError(f"{preset}: no such preset; allowed: {', '.join(PRESETS)}")
    if speedup is not None and speedup > MOST_SPEEDUP:
        raise AsdmError(f"speedup={speedup:g}: out of reach of any UNet; ask for less, at most {MOST_SPEEDUP}")


def require_params(unet: UNet2DConditionModel, params: float | None) -> None:
    """Raise an AsdmError for a number of parameters that the UNet does not have."""
    total = sum(p.numel() for p in unet.parameters())
    if params is not None and params > total:
        raise AsdmError(f"params={params:g}: the UNet has {total:.4g}; ask for fewer, or for a part such as 0.6")


@checks.arguments(
    redundancy=checks.a(RedundancyMap, "asdm.analyze makes one"),
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
    compensate: CompensationKind | None = None,
    unet: UNet2DConditionModel | None = None,
    device: str | None = None,
    rounds: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> PruningPlan:
    """The edits of least total sensitivity inside one budget; for `speedup`, the measured one.

    Chosen among removals of units and stages and global-regional attention, as far as the map knows them.

    Args:
        speedup: how many times faster the UNet call must be, measured against the original in turns.
        params, macs: what must remain, as a part of the original in (0, 1) or as a number of parameters
            or of MACs (attention products counted).
        preset: instead of a budget "a-sdm" (the paper's 22% less time, for SD 1.5's shape), "a-sdm-fast" (half the
            time), or BK-SDM's "bk-base", "bk-small", "bk-tiny".
        compensate: what to fit in the place of the removed branches (`fit_compensation`), by default "linear", or what
            a map by ablation was made with; "none" for plain removal. BK-SDM's presets drop whole layers, in whose
            place nothing is fitted.
        unet: the UNet to measure; without it one of the map's shape and precision with random weights is made.
        device: where to make it; the CPU by default.
        rounds: the least number of timed rounds per measurement, by default 4 to 10; more follow on a busy machine.
            Where even these do not tell, the plan goes by the latencies that the map has saved or by MACs, with a
            correction, and its `speedup_basis` says so; `remeasure_plan` measures it later.

    Raises:
        AsdmError: not exactly one of the four given, an unknown preset, or a budget that even removing
            every unit does not reach; the message says what is reachable.
    """
    require_budget(speedup, params, macs, preset)
    compensate = compensate or (redundancy.compensate if redundancy.estimator == "ablation" else "linear")
    choices = possible_edits(redundancy, compensate)
    if preset is not None:
        return _preset(redundancy, preset, choices)
    if speedup is not None:
        rounds = rounds or int(np.clip(10_000 / redundancy.latency_ms, 4, 10))
        return _plan_for_speedup(redundancy, speedup, choices, unet, device, rounds, progress)
    if params is not None:
        chosen = _within("params", params, redundancy.parameters, choices, [c.parameters for c in choices])
        return _plan(redundancy, chosen, {"params": params})
    assert macs is not None
    chosen = _within("macs", macs, redundancy.gmacs * 1e9, choices, [choice.macs for choice in choices])
    return _plan(redundancy, chosen, {"macs": macs})


@checks.arguments(
    plan=checks.a(PruningPlan, "asdm.make_plan makes one"),
    unet=checks.UNET,
    params=checks.number(above=0),
    router=checks.one_of("input", "input+time", "time"),
    activation=checks.one_of("softmax", "sigmoid"),
)
def add_cond_conv(
    plan: PruningPlan,
    unet: UNet2DConditionModel,
    *,
    params: float = 0.05,
    router: Literal["input", "input+time", "time"] = "input",
    activation: Literal["softmax", "sigmoid"] = "softmax",
) -> PruningPlan:
    """The plan with CLME-CondConv banks: convolutions that stay inherit those of removed resnets as experts.

    Each removed convolution goes to the nearest kept one, in order of execution, of its kind (`conv1`, `conv2`) and
    its output channels; the smallest first, as mixing a kernel costs its size, then the nearest, until the budget is
    used (inferred).

    Args:
        params: what the experts may add, as a part of the original's parameters or as a number of them.

    Raises:
        AsdmError: the plan is for another model, or no expert fits into the budget.
    """
    plan.require_for(unet)
    order = {name: index for index, name in enumerate(layers(unet))}
    removed = [edit.unit for edit in plan.edits if isinstance(edit, Remove)]
    convs = {name: unet.get_submodule(name) for name in conv_channels(unet)}
    gone = [name for name in convs if is_covered_by(name, removed)]
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
            size = convs[name].weight.numel() + len(convs[name].weight)
            pairs.append((size, distance, order[resnet], name, source))
    total = sum(p.numel() for p in unet.parameters())
    budget = params * total if params <= 1 else params
    banks: dict[str, list[str]] = {}
    for size, _, _, name, source in sorted(pairs):
        if size <= budget:
            banks.setdefault(name, []).append(source)
            budget -= size
    if not banks:
        raise AsdmError(
            f"params={params:g}: no expert fits; the plan removes {len(gone)} convolutions, "
            f"{len(pairs)} of which a kept one could inherit; allow more, or drop the banks"
        )
    edits = [
        CondConv(unit=name, experts=sources, router=router, activation=activation) for name, sources in banks.items()
    ]
    return _with_edits(plan, [*plan.edits, *edits])


@dataclass(frozen=True)
class PossibleEdit:
    """An edit that a plan can choose: what it saves of the original's parameters, MACs of a sample and milliseconds
    of a call, what it costs, and the units that it alone may then touch."""

    edit: UnitEdit
    covers: frozenset[str]
    parameters: float
    macs: float
    ms: float
    sensitivity: float


def possible_edits(redundancy: RedundancyMap, compensate: CompensationKind) -> list[PossibleEdit]:
    """All edits of a map: its units' removals first, in their order, compensated as asked for."""
    names = [unit.name for unit in redundancy.units]
    choices = []
    for unit in redundancy.units:
        covers = frozenset(name for name in names if is_covered_by(name, [unit.name]))
        edit = Remove(unit=unit.name, compensate=compensate)
        choices.append(_possible(redundancy, unit, edit, covers, "none" if unit.has_shortcut else compensate))
    for other in redundancy.others:
        (parsed,) = parse_edits([other.edit])
        assert isinstance(parsed, UnitEdit)
        fitted: CompensationKind = "none"
        if isinstance(parsed, Remove) and other.channels:
            fitted, parsed = compensate, replace(parsed, compensate=compensate)
        choices.append(_possible(redundancy, other, parsed, frozenset(other.covers), fitted))
    return choices


def _possible(
    redundancy: RedundancyMap,
    record: UnitRecord | EditRecord,
    edit: UnitEdit,
    covers: frozenset[str],
    fitted: CompensationKind,
) -> PossibleEdit:
    """With what the map costs that is fitted in a branch's place; it counts as slow as the branch for its MACs."""
    map_parameters = {"none": 0, "bias": 1, "diagonal": 2, "linear": record.channels + 1}[fitted] * record.channels
    map_macs = (
        {"none": 0, "bias": 0, "diagonal": 1, "linear": record.channels}[fitted] * record.channels * record.positions
    )
    macs = record.gmacs * 1e9
    # On a machine that was too busy to tell, a unit counts as slow as its MACs.
    reliable = redundancy.has_reliable_latencies
    latency_ms = record.latency_ms if reliable else redundancy.latency_ms * record.gmacs / redundancy.gmacs
    return PossibleEdit(
        edit=edit,
        covers=covers,
        parameters=record.parameters - map_parameters,
        macs=macs - map_macs,
        ms=latency_ms * (1 - min(1.0, map_macs / macs)) if macs else latency_ms,
        sensitivity=record.sensitivity,
    )


def _within(
    name: str, remaining: float, total: float, choices: list[PossibleEdit], savings: list[float]
) -> list[PossibleEdit]:
    """The least sensitive edits that leave so much of one resource."""
    kept = remaining if remaining <= 1 else remaining / total
    chosen = least_sensitive(choices, savings, total * (1 - kept)) if 0 < kept <= 1 else None
    if chosen is None:
        least = 1 - most_saved(choices, savings) / total
        raise AsdmError(
            f"{name}={remaining:g}: out of reach; between {least:.3f} and 1 of the original's "
            f"{total:.4g} can remain; ask for more"
        )
    return chosen


def least_sensitive(
    choices: Sequence[PossibleEdit],
    savings: Sequence[float],
    needed: float,
    near: tuple[Collection[PossibleEdit], int] | None = None,
) -> list[PossibleEdit] | None:
    """The edits that save at least `needed` at the least total sensitivity; None if none do.

    An integer programme: minimise s.x subject to savings.x >= needed, for each unit at most one of the edits that
    cover it, and with `near`, edits and a count, no more than so many differences from those edits.
    """
    if needed <= 0:
        return []
    scale = max(savings) or 1.0
    constraints = [LinearConstraint(np.array(savings)[None] / scale, needed / scale, np.inf)]
    if near is not None:
        start, changes = near
        chosen = np.array([choice in start for choice in choices])
        constraints.append(LinearConstraint(np.where(chosen, -1.0, 1.0)[None], -np.inf, changes - chosen.sum()))
    # a tiny price on each edit: of equally good plans, the one with fewer
    price = np.array([choice.sensitivity for choice in choices]) + 1e-9
    return _solve(choices, price, constraints)


def most_saved(choices: Sequence[PossibleEdit], savings: Sequence[float]) -> float:
    """What can be saved at most."""
    best = _solve(choices, -np.array(savings, dtype=float), []) or []
    return sum(saved for choice, saved in zip(choices, savings, strict=True) if choice in best)


def _solve(
    choices: Sequence[PossibleEdit], price: np.ndarray, constraints: list[LinearConstraint]
) -> list[PossibleEdit] | None:
    units = sorted({unit for choice in choices for unit in choice.covers})
    covering = np.array([[float(unit in choice.covers) for choice in choices] for unit in units])
    solution = milp(
        price,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[*constraints, LinearConstraint(covering, -np.inf, 1.0)],
        options={"time_limit": 60, "mip_rel_gap": 1e-4},
    )
    if solution.x is None:
        return None
    return [choice for choice, taken in zip(choices, solution.x, strict=True) if taken > 0.5]


def _plan_for_speedup(
    redundancy: RedundancyMap,
    target: float,
    choices: list[PossibleEdit],
    unet: UNet2DConditionModel | None,
    device: str | None,
    rounds: int,
    progress: Callable[[str], None] | None,
) -> PruningPlan:
    """Plan by the map's latencies, measure the pruned UNet, and ask for more or less until it is just enough."""
    savings = [choice.ms for choice in choices]
    total = redundancy.latency_ms
    reachable = total / max(total - most_saved(choices, savings), 1e-9)
    if unet is None:
        unet = on_device(random_unet(redundancy.unet_config, getattr(torch, redundancy.dtype)), device or "cpu")
    needed = target * MEASUREMENT_MARGIN
    aim, too_little, enough = target, 1.0, np.inf
    best: PruningPlan | None = None
    most = 0.0
    for attempt in range(1, MEASUREMENT_ATTEMPTS + 1):
        chosen = least_sensitive(choices, savings, total * (1 - 1 / aim))
        if chosen is None:
            # More than everything: the aim lies beyond what the map can give.
            enough, aim = aim, (too_little + min(aim, reachable)) / 2
            continue
        plan = _plan(redundancy, chosen, {"speedup": target})
        measured = measured_speedup(unet, plan, rounds)
        if progress is not None:
            progress(f"attempt {attempt}: {len(chosen)} edits, {measured} measured, {target:g}x requested")
        if not is_precise(measured):
            if best is None:
                return _unmeasured(redundancy, target, choices, progress)
            break
        most = max(most, measured.value)
        if measured.value >= needed:
            best, enough = with_measured(plan, measured), aim
            if measured.value <= needed * CLOSE_ENOUGH:
                break
        else:
            too_little = aim
        guess = aim * needed * (1 + (CLOSE_ENOUGH - 1) / 2) / measured.value
        aim = guess if too_little < guess < enough else (too_little + min(enough, 2 * too_little)) / 2
    if best is None:
        raise AsdmError(
            f"speedup={target:g}: out of reach; measured {most:.2f}x at most, "
            f"about {reachable:.2f}x if every unit went; ask for less"
        )
    return best


def _unmeasured(
    redundancy: RedundancyMap, target: float, choices: list[PossibleEdit], progress: Callable[[str], None] | None
) -> PruningPlan:
    """Plan by what the map has saved, or where its latencies are in doubt too by MACs, as nothing can be measured."""
    basis = _basis(redundancy)
    correction, by_latency = CORRECTIONS[basis], basis == "latency"
    total = redundancy.latency_ms if by_latency else redundancy.gmacs * 1e9
    savings = [choice.ms if by_latency else choice.macs for choice in choices]
    chosen = least_sensitive(choices, savings, total * (1 - 1 / (target * correction)))
    if chosen is None:
        raise AsdmError(
            f"speedup={target:g}: out of reach by the map's {basis}, and not measurable now as the machine is busy; "
            "ask for less, or plan on a quiet machine"
        )
    if progress is not None:
        known = "the latencies that the map has saved" if by_latency else "MACs"
        progress(
            f"not measurable now, as the machine is busy: planned by {known} for {target:g}x times a correction of "
            f"{correction:g}; measure it later with `asdm plan --remeasure`"
        )
    return _plan(redundancy, chosen, {"speedup": target}, basis)


def _basis(redundancy: RedundancyMap) -> SpeedupBasis:
    """What tells a speed-up that is not measured."""
    return "latency" if redundancy.has_reliable_latencies else "macs"


def measured_speedup(unet: UNet2DConditionModel, plan: PruningPlan, rounds: int = 5) -> Ratio:
    """How many times faster a UNet call (batch 2) is with the plan's edits, timed in turns."""
    with preserve_module_state(unet):
        student = build_student(unet.eval(), plan)
        calls = {"original": unet_call(unet), "pruned": unet_call(student)}
        return measure_interleaved(calls, rounds=rounds, device=unet.device).speedup("original", "pruned")


def is_precise(ratio: Ratio) -> bool:
    """Whether a plan can go by it."""
    return ratio.precision <= PRECISE_ENOUGH


@checks.arguments(plan=checks.a(PruningPlan, "asdm.make_plan makes one"), unet=checks.UNET)
def remeasure_plan(plan: PruningPlan, unet: UNet2DConditionModel) -> PruningPlan:
    """The plan with its speed-up measured on this machine now.

    Raises:
        AsdmError: a plan for another model, or the machine is too busy to measure it.
    """
    measured = measured_speedup(unet, plan)
    if not is_precise(measured):
        raise AsdmError(f"{measured}: other processes are busy; end them, or try again later")
    return with_measured(plan, measured)


def _plan(
    redundancy: RedundancyMap,
    chosen: Sequence[PossibleEdit],
    target: dict[str, float],
    basis: SpeedupBasis | None = None,
) -> PruningPlan:
    timed = redundancy.latency_ms > 0
    total = redundancy.latency_ms if timed else redundancy.gmacs * 1e9
    saved = sum(choice.ms if timed else choice.macs for choice in chosen)
    sensitivity = sum(choice.sensitivity for choice in chosen)
    return PruningPlan(
        base=PlanBase.of(redundancy.fingerprint),
        edits=[choice.edit for choice in chosen],
        figures=PlanMetrics(
            model=redundancy.model or None,
            target=target,
            predicted_sensitivity=None if redundancy.estimator is None else sensitivity,
            predicted_speedup=total / max(total - saved, 1e-9),
            speedup_basis=basis if timed else "macs",
        ),
    )


def with_measured(plan: PruningPlan, measured: Ratio) -> PruningPlan:
    """The plan with what was measured of it."""
    return _with_speedup(plan, measured.value, measured.interval, "measured")


def without_measured(plan: PruningPlan, redundancy: RedundancyMap) -> PruningPlan:
    """The plan where its speed-up cannot be measured, and is told by the map."""
    return _with_speedup(plan, None, None, _basis(redundancy))


def _with_speedup(
    plan: PruningPlan, value: float | None, interval: tuple[float, float] | None, basis: SpeedupBasis
) -> PruningPlan:
    known = plan.figures or PlanMetrics(target={}, predicted_speedup=1.0)
    update = {"measured_speedup": value, "measured_speedup_interval": interval, "speedup_basis": basis}
    return plan.model_copy(update={"figures": known.model_copy(update=update)})


def _preset(redundancy: RedundancyMap, preset: str, choices: list[PossibleEdit]) -> PruningPlan:
    if preset in BK_PRESETS:
        layers, mid_block, fewer = BK_PRESETS[preset]
        names = [unit.name for unit in redundancy.units]
        levels = len({unit.block for unit in redundancy.units if unit.name.startswith("down_blocks.")})
        edit = DropLayers(layers_per_block=layers, mid_block=mid_block, levels=levels - fewer if fewer else None)
        gone = dropped(edit, names)
        plain = [c for c in possible_edits(redundancy, "none") if isinstance(c.edit, Remove) and c.edit.unit in gone]
        return _with_edits(_plan(redundancy, plain, {}), [edit])
    return _plan(redundancy, _a_sdm(redundancy, choices, fast=preset == "a-sdm-fast"), {})


def _a_sdm(redundancy: RedundancyMap, choices: list[PossibleEdit], fast: bool) -> list[PossibleEdit]:
    """The presets of our own, for Stable Diffusion's UNets (inferred): the outermost self-attentions look at regions,
    and the second layers of the first and the last stage go; `fast`, that of every stage, with the innermost stage,
    the mid block and the first and last attentions (SDXL has none in its outermost stages either), and the faster kind
    of GRI."""
    tokens = max((unit.positions for unit in redundancy.units if unit.kind == "self_attention"), default=0)
    last_block = redundancy.units[-1].block
    attentions = [unit.name for unit in redundancy.units if unit.kind == "attention"]
    outermost = [*attentions[:1], *attentions[-1:]]

    def wanted(choice: PossibleEdit) -> bool:
        edit = choice.edit
        if isinstance(edit, GriAttention):
            unit = next(unit for unit in redundancy.units if unit.name == edit.unit)
            return unit.positions == tokens
        if not isinstance(edit, Remove) or edit.unit.count(".") > 3:
            return False
        middle = edit.unit.endswith((".resnets.1", ".attentions.1"))
        if not fast:
            return middle and edit.unit.startswith((redundancy.units[0].block, last_block))
        if edit.unit == "mid_block" or is_level(edit.unit) or edit.unit in outermost:
            return True
        return middle and not edit.unit.startswith("mid_block")

    def order(choice: PossibleEdit) -> tuple[float, float]:
        """What covers most comes first: a stage, then layers, then what is left inside them."""
        saved = choice.macs if isinstance(choice.edit, GriAttention) else 0.0
        return -len(choice.covers), -saved if fast else saved

    chosen: list[PossibleEdit] = []
    for choice in sorted(filter(wanted, choices), key=order):
        if not any(choice.covers & other.covers for other in chosen):
            chosen.append(choice)
    if not chosen:
        raise AsdmError("no such layers in this UNet as the preset removes; give a budget instead")
    return sorted(chosen, key=choices.index)


def _with_edits(plan: PruningPlan, edits: Sequence[Edit]) -> PruningPlan:
    return plan.model_copy(update={"edits": list(edits)})
