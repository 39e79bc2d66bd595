"""Feature inheritance: work whose result hardly changes between neighbouring steps is done at some steps only, and the
others inherit it. No training; named in the abstract of arXiv 2406.00210, the rest is inferred.

What is inherited is a copy, or an extrapolation over the noise level from the last results. When to inherit follows
from an interval, a speed-up, a budget, or a schedule that `inheritance_calibration` found.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from asdm import checks
from asdm.errors import AsdmError
from asdm.families.tensors import fingerprint
from asdm.families.unet_calls import unet_call
from asdm.families.unet_structure import block_of, blocks, layers, removable_units
from asdm.files import write_text
from asdm.measure.latency import Ratio, Timing, measure_interleaved
from asdm.records import Record, first_fault

Granularity = Literal["block", "layer", "unit"]
Spacing = Literal["uniform", "early", "late"]
UNEVENNESS = 1.6  # exponent of the computed steps' places where they are denser early or late
_HOOK = "asdm_inherit_features"


@checks.arguments(
    pipeline=checks.PIPELINE,
    speedup=checks.SPEEDUP,
    every=checks.STEPS,
    steps=checks.each(checks.whole(0, 10_000)),
    budget=checks.number(0),
    granularity=checks.literal(Granularity),
    depth=checks.whole(),
    spacing=checks.literal(Spacing),
    order=checks.whole(0, 2),
    damping=checks.number(0, 1),
)
@contextmanager
def cache_features(
    pipeline: DiffusionPipeline,
    *,
    speedup: float | None = None,
    every: int | None = None,
    steps: Sequence[int] | None = None,
    budget: float | None = None,
    schedule: CacheSchedule | str | Path | None = None,
    granularity: Granularity = "layer",
    depth: int = 1,
    spacing: Spacing = "uniform",
    order: int = 1,
    damping: float = 1.0,
) -> Iterator[CachingSession]:
    """Within the block, the pipeline's UNet computes itself wholly at some steps and inherits features at the others.

    Exactly one of five says when it computes. Other pipelines that share the UNet, guidance, ControlNet residuals and
    any size go on working; a new call begins anew, also after one that an exception ended. Each thread has a sampling
    of its own. The UNet's modules and their names stay as they are: LoRA files load, and it can be saved. It cannot be
    copied.

    Args:
        speedup: of all UNet calls together; how many steps are computed follows from a timed call of each kind.
        every: computes every n-th step.
        steps: indices of the steps that compute; the first always does.
        budget: adaptive: computes when the first layer's output has changed, relative and summed up over the steps
            since, by this much.
        schedule: what `calibrate_cache` found, or the file that it was saved to; also says depth, order and
            damping.
        granularity: what inherits: "block", all layers outside the outermost blocks; "layer", all but the last
            `depth` layers of the way up and what their skip connections bring; "unit", the residual branches of all
            layers but the first and the last, whose shortcuts are computed.
        depth: of "layer": the more layers are computed at every step, the nearer and the slower.
        spacing: of the steps that `speedup` asks for: evenly, or denser early or late.
        order: 0 copies the last result; 1 and 2 extrapolate from the last two or three, which are kept in memory.
        damping: how far the extrapolation goes from the last result; 0 is a copy, 1 the whole way.

    Raises:
        AsdmError: not exactly one of the five, a value out of range, a speed-up out of reach, a schedule of another
            architecture, a UNet that is compiled as a whole, or one within another such block.
    """
    unet: UNet2DConditionModel = pipeline.unet
    given = {"speedup": speedup, "every": every, "steps": steps, "budget": budget, "schedule": schedule}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise AsdmError(f"give exactly one of {', '.join(given)}; got {', '.join(named) or 'none'}")
    if schedule is not None:
        schedule = schedule if isinstance(schedule, CacheSchedule) else CacheSchedule.load(schedule)
        schedule.require_fit(unet)
        granularity, depth, order, damping = "layer", schedule.depth, schedule.order, schedule.damping
    least = {"speedup": 1, "every": 1, "budget": 0}
    if any((value := given[name]) is not None and value < low for name, low in least.items()):  # type: ignore[operator]
        raise AsdmError(f"{named[0]}={given[named[0]]}: out of range; every and speedup are at least 1, budget 0")
    if not 0 <= order <= 2:
        raise AsdmError(f"order={order}: allowed are 0, 1 and 2")
    if inherits(unet):
        raise AsdmError("this UNet inherits features already; leave the other block first")
    if getattr(unet, "_compiled_call_impl", None) is not None or hasattr(unet, "_orig_mod"):
        raise AsdmError(
            "the UNet is compiled as a whole, which would be compiled anew at every step; compile its repeated blocks "
            "(unet.compile_repeated_blocks())"
        )
    session = CachingSession(pipeline, order, damping)
    exported = getattr(unet, "cut", None)  # a UNet in graphs (asdm.runtime.openvino)
    if exported is not None and budget is not None:
        raise AsdmError(f"budget={budget:g}: is told by a layer, which is hidden in a graph; give every or a schedule")
    if exported is not None:
        cut = exported(granularity, depth)
    else:
        cut = cut_of(unet, granularity, depth, needed=layers(unet)[:1] if budget is not None else ())
    modules = {name: unet.get_submodule(name) for name in cut.inheriting}
    handles = [unet.register_forward_pre_hook(session.before_call, with_kwargs=True)]
    try:
        for name, module in modules.items():
            kept = _shortcut_of(module) if granularity == "unit" else None
            session.hooks.append(_Inheriting(session, kept, read=name in cut.read))
            HookRegistry.check_if_exists_or_initialize(module).register_hook(session.hooks[-1], _HOOK)
        if budget is not None:
            first = unet.get_submodule(layers(unet)[0])
            handles.append(first.register_forward_hook(session.after_first_layer))
        if schedule is not None:
            session.computes_at = schedule.computes_at
        else:
            session.computes_at = _decision(session, unet, speedup, every, steps, budget, spacing)
        yield session
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            _remove_hook(module)
        session.forget()


def inherits(unet: nn.Module) -> bool:
    """Whether a block of `cache_features` is open for a UNet."""
    registries = (getattr(module, "_diffusers_hook", None) for module in unet.modules())
    return any(registry.get_hook(_HOOK) is not None for registry in registries if registry is not None)


def require_whole(unet: nn.Module, work: str) -> None:
    """Raise an AsdmError within a block of `cache_features`, where a UNet's modules do not always compute."""
    if inherits(unet):
        raise AsdmError(f"{work}: this UNet inherits features; leave the block of cache_features first")


def _remove_hook(module: nn.Module) -> None:
    """Take the hook off and leave nothing behind, unless there are others."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(_HOOK, recurse=False)
    if not registry.hooks:
        del module._diffusers_hook
        if vars(module).get("forward") == type(module).forward.__get__(module):
            del module.forward


class CacheSchedule(Record):
    """When to compute and how to inherit: what a calibration found for one architecture under a speed-up target.

    `computed` are indices among `steps` sampling steps; `depth`, `order` and `damping` as in `cache_features`.
    `speedup` of all UNet calls together counts with the milliseconds of a whole call and of one that inherits;
    `speedup_interval` holds the true one.
    `distance`: mean squared distance of the final latents to the full sampling's, relative to their mean square; where
    it is known, `uniform_distance` is that of copies at the same number of evenly spaced steps.
    """

    fingerprint: str
    steps: int = Field(ge=1)
    computed: tuple[int, ...]
    depth: int = Field(ge=1)
    order: int = Field(ge=0, le=2)
    damping: float = Field(1.0, ge=0, le=1)
    whole_ms: float = Field(gt=0)
    cached_ms: float = Field(gt=0)
    speedup: float = Field(gt=0)
    speedup_interval: tuple[float, float] | None = None
    distance: float | None = None
    uniform_distance: float | None = None

    @model_validator(mode="after")
    def _within_the_sampling(self) -> CacheSchedule:
        if not self.computed or self.computed[0] != 0 or list(self.computed) != sorted(set(self.computed)):
            raise ValueError("computed: rising indices that begin with 0")
        if self.computed[-1] >= self.steps:
            raise ValueError(f"computed: indices below steps={self.steps}")
        return self

    @property
    def ratio(self) -> Ratio:
        """The speed-up with its interval."""
        return Ratio(self.speedup, *(self.speedup_interval or [self.speedup] * 2))

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CacheSchedule:
        try:
            return cls.model_validate_json(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError):
            raise AsdmError(f"{path}: no such file; `asdm analyze MODEL --cache 2` writes one") from None
        except ValidationError as error:
            raise AsdmError(
                f"{path}: not a schedule of inheritance ({first_fault(error)}); "
                "write it anew by `asdm analyze MODEL --cache 2`"
            ) from None

    def require_fit(self, unet: UNet2DConditionModel) -> None:
        """Raise an AsdmError if it was found for another architecture."""
        mine = fingerprint(unet)
        if mine != self.fingerprint:
            raise AsdmError(
                f"this schedule is for the architecture {self.fingerprint}, the UNet's is {mine}; calibrate anew by "
                "`asdm analyze MODEL --cache 2`"
            )

    def steps_of(self, count: int) -> set[int]:
        """The steps that compute in a sampling of `count`: as dense, at every part of it, as in the calibration."""
        if count == self.steps:
            return set(self.computed)
        places = [step / self.steps for step in self.computed]
        wanted = min(count, max(1, round(len(places) * count / self.steps)))
        return _nearest_steps(
            np.interp(np.arange(wanted) / wanted * len(places), range(len(places) + 1), [*places, 1]), count
        )

    def computes_at(self, index: int, count: int) -> bool:
        return index in self.steps_of(count)


class _Sampling(threading.local):
    """Where a sampling is, and what was computed in it; each thread that calls the UNet has its own."""

    def __init__(self) -> None:
        self.inheriting = False  # the call that is under way, and at which
        self.sigma = 0.0  # noise level
        self.past: dict[_Inheriting, list[tuple[float, Any]]] = {}
        self.forced: bool | None = None
        self.restart()

    def restart(self) -> None:
        """The next call is the first of a sampling."""
        self.timesteps: Any = None  # the scheduler's
        self.index = -1  # of the last call among them
        self.seen: tuple[Any, ...] = ()
        self.takes_turns = False  # several samplings visit each step
        self.forget()

    def forget(self) -> None:
        """What was computed is not inherited."""
        self.past.clear()
        self.first: Tensor | None = None  # adaptive: the first layer's output, and how far it has moved since
        self.change = 0.0


class CachingSession:
    """When to compute and when to inherit, and where in a sampling the UNet is.

    `computed` and `inherited` count the UNet's calls of each kind since the block was entered.
    """

    def __init__(self, pipeline: DiffusionPipeline, order: int, damping: float = 1.0):
        self.pipeline, self.order, self.damping = pipeline, order, damping
        self.computes_at: Callable[[int, int], bool | None] = lambda index, count: True
        self.computed, self.inherited = 0, 0
        self.hooks: list[_Inheriting] = []
        self.budget: float | None = None
        self.sampling = _Sampling()
        self._counting = threading.Lock()

    def __reduce__(self) -> Any:
        raise AsdmError("a UNet that inherits features is not copied; leave the block of cache_features first")

    @contextmanager
    def forced(self, inheriting: bool) -> Iterator[None]:
        """Compute or inherit whatever the schedule says; for timing."""
        self.sampling.forced = inheriting
        try:
            yield
        finally:
            self.sampling.forced = None
            self.sampling.timesteps = None

    def answer_with(self, value: Tensor) -> None:
        """Let the one border of the cut inherit this, whatever it answered; for calibration."""
        (border,) = (hook for hook in self.hooks if hook.read)
        self.sampling.past[border] = [(0.0, value)]

    def forget(self) -> None:
        """Let go of what all threads remember."""
        self.hooks.clear()
        self.sampling = _Sampling()

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide for a call of the UNet (a forward pre-hook)."""
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, states = (kwargs[name] if name in kwargs else args[place] for place, name in enumerate(names))
        timestep = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        now = self.sampling
        now.sigma = noise_level(self.pipeline.scheduler, timestep)
        if now.forced is not None:
            now.inheriting = now.forced
            if not now.forced:
                now.forget()
            return
        follows, index, count = self._follows(timestep, (sample.shape, sample.dtype, sample.device), states)
        if not follows:
            now.forget()
        decision = self.computes_at(index, count) if follows else True
        self._decide(decision is not False, known=decision is not None)

    def after_first_layer(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Adaptive: decide by how far the first layer's output has moved (a forward hook)."""
        assert self.budget is not None
        now = self.sampling
        first: Tensor = output[0] if isinstance(output, tuple) else output
        if now.first is not None and now.first.shape == first.shape:
            moved = (first - now.first).abs().mean() / now.first.abs().mean().clamp(min=1e-12)
            now.change += float(moved)
            self._decide(now.change > self.budget, known=True)
        if not now.inheriting:
            now.change = 0.0
        now.first = first.detach()

    def _decide(self, compute: bool, known: bool) -> None:
        self.sampling.inheriting = not compute
        if known:
            with self._counting:
                self.computed += compute
                self.inherited += not compute

    def _follows(self, timestep: float, shape: tuple[Any, ...], states: Tensor) -> tuple[bool, int, int]:
        """Whether a call is at the step behind the last call's, in the same sampling; its step, and of how many.

        A pipeline makes the prompts' embeddings anew for each sampling. What only has the same values is of the same
        sampling where the scheduler says so.
        """
        now, scheduler = self.sampling, self.pipeline.scheduler
        timesteps: Any = getattr(scheduler, "timesteps", None)
        same = now.seen[:-1] == shape and _equal(states, now.seen[-1]) and _equal(timesteps, now.timesteps)
        index = _place(timestep, timesteps, now.index) if same else -1
        if same and states is not now.seen[-1]:
            same = getattr(scheduler, "step_index", None) == index
        if not same or index < now.index:
            now.restart()  # image-to-image not with the first step
            now.index = (getattr(scheduler, "begin_index", None) or 0) - 1
            index = _place(timestep, timesteps, now.index)
            same = False
        now.takes_turns |= same and 0 <= index == now.index
        follows = same and not now.takes_turns and 0 <= now.index == index - 1
        now.timesteps, now.index, now.seen = timesteps, index, (*shape, states)
        return follows, index, len(timesteps) if follows else 0


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def _place(timestep: float, timesteps: Any, last: int) -> int:
    """Index of a time step in a sampling whose last call was at `last`; -1 for one that is not of it."""
    if not isinstance(timesteps, Tensor):
        return -1
    found = (timesteps.float().cpu() - timestep).abs().lt(1e-3).nonzero().flatten().tolist()
    # Second-order schedulers visit a time step twice.
    return next((i for i in found if i > last), found[-1]) if found else -1


class _Inheriting(ModelHook):
    """Lets a module answer with what it, or an extrapolation of what it, answered before.

    With `kept`, a map of its input that is always computed, only the difference to it is inherited. What no computed
    module reads is not `read`: the last answer stands in for it, as only its shape matters.
    """

    def __init__(self, session: CachingSession, kept: Callable[[Tensor], Tensor] | None = None, read: bool = True):
        super().__init__()
        self.session, self.kept, self.read = session, kept, read
        self.in_tuple = False

    def new_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        sampling = self.session.sampling
        past = sampling.past.get(self)
        if sampling.inheriting and past:
            return self._inherited(past, sampling.sigma, args)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.read:
            self.in_tuple = isinstance(output, tuple)
            value = output[0] if self.in_tuple else output
            # What reads it may change it in place, as FreeU does.
            value = value.clone() if self.kept is None else value - self.kept(args[0])
            sampling.past[self] = [*(past or ()), (sampling.sigma, value)][-1 - self.session.order :]
        else:
            sampling.past[self] = [(sampling.sigma, output)]
        return output

    def _inherited(self, past: list[tuple[float, Any]], sigma: float, args: tuple[Any, ...]) -> Any:
        if not self.read:
            return past[-1][1]
        value = extrapolated(past, sigma, self.session.damping)
        if self.kept is not None:
            value = value + self.kept(args[0])
        return (value,) if self.in_tuple else value


def extrapolated(past: Sequence[tuple[float, Tensor]], sigma: float, damping: float = 1.0) -> Tensor:
    """Lagrange's polynomial through results at noise levels, oldest first, at `sigma`; `damping` scales how far it
    goes from the last one. A tensor of its own, whatever is done to it."""
    points = [point for point, _ in past]
    last = past[-1][1]
    if len(past) == 1 or len(set(points)) < len(points):
        return last.clone()
    value = (1 - damping) * last
    for i, (_, result) in enumerate(past):
        factor = math.prod((sigma - point) / (points[i] - point) for j, point in enumerate(points) if j != i)
        value = value.add(result, alpha=damping * factor)
    return value


@dataclass(frozen=True)
class Cut:
    """Which modules inherit, outermost first, and which of them what is computed reads."""

    inheriting: list[str]
    read: frozenset[str]


def cut_of(unet: UNet2DConditionModel, granularity: Granularity, depth: int = 1, needed: Sequence[str] = ()) -> Cut:
    """Where computed features meet inherited ones.

    Args:
        depth: of "layer": so many of the last layers are computed, and on the way down what their skip connections
            bring, with the first of them the input convolution alone (as DeepCache's branch 0, arXiv 2312.00858).
        needed: modules that are computed in any case.

    Raises:
        AsdmError: an argument out of range, or a UNet without blocks (graphs, several UNets in one).
    """
    if granularity not in ("block", "layer", "unit"):
        raise AsdmError(f"granularity={granularity}: allowed are block, layer, unit")
    if not hasattr(unet, "up_blocks"):
        raise AsdmError(f"a {type(unet).__name__} has no blocks of its own; take a torch pipeline with one UNet")
    down, up = _items(unet, "down_blocks"), _items(unet, "up_blocks")
    deepest = sum(".resnets." in item[0] for item in up) - 1
    if granularity == "block":
        depth = len(unet.up_blocks[-1].resnets)
    if not 1 <= depth <= deepest:
        raise AsdmError(f"depth={depth}: this UNet's way up has {deepest + 1} layers; allowed are 1 to {deepest}")
    if granularity == "unit":
        ends = {*down[0], *up[-1]}
        units = [unit for unit in removable_units(unet) if unit.layer not in ends and unit.kind != "attention"]
        return Cut([unit.name for unit in units], frozenset(unit.name for unit in units))
    first = len(up)
    for _ in range(depth):
        first -= 1
        while ".resnets." not in up[first][0]:
            first -= 1
    computed = {name for item in [*down[: depth - 1], *up[first:]] for name in item} | set(needed)
    border = up[first - 1][-1]
    chosen: list[str] = []
    for block_name in blocks(unet):
        inside = [name for name in _members(unet, block_name) if name not in computed]
        whole = inside == _members(unet, block_name)
        chosen += [block_name] if whole else inside
        if whole and border in inside:
            border = block_name
    return Cut(chosen, frozenset([border]))


def _items(unet: UNet2DConditionModel, side: str) -> list[list[str]]:
    """The modules of each layer (a resnet and its attention) and of each sampler, in order of execution; those of the
    way down make one skip connection each."""
    items: list[list[str]] = []
    for index in range(len(unet.get_submodule(side))):
        for name in _members(unet, f"{side}.{index}"):
            if ".attentions." in name and items and ".resnets." in items[-1][0]:
                items[-1].append(name)
            else:
                items.append([name])
    return items


def _members(unet: UNet2DConditionModel, block_name: str) -> list[str]:
    """A block's resnets, attentions and samplers, in order of execution."""
    block = unet.get_submodule(block_name)
    names = [name for name in layers(unet) if block_of(name) == block_name]
    for kind in ("downsamplers", "upsamplers"):
        names += [f"{block_name}.{kind}.{i}" for i in range(len(getattr(block, kind, None) or ()))]
    return names


def _shortcut_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a resnet adds its branch to; None for a branch whose shortcut is outside of it."""
    scale = getattr(module, "output_scale_factor", None)
    if scale is None:
        return None
    shortcut = getattr(module, "conv_shortcut", None)
    return lambda hidden_states: (hidden_states if shortcut is None else shortcut(hidden_states)) / scale


def _decision(
    session: CachingSession,
    unet: UNet2DConditionModel,
    speedup: float | None,
    every: int | None,
    steps: Sequence[int] | None,
    budget: float | None,
    spacing: Spacing,
) -> Callable[[int, int], bool | None]:
    """Whether step `index` of `count` computes; None where it is decided later."""
    if budget is not None:
        session.budget = budget
        return lambda index, count: None
    if every is not None:
        return lambda index, count: index % every == 0
    if steps is not None:
        chosen = {0, *steps}
        return lambda index, count: index in chosen
    assert speedup is not None
    if spacing not in ("uniform", "early", "late"):
        raise AsdmError(f"spacing={spacing}: allowed are uniform, early, late")
    times = timed_calls(session, unet)
    whole, rest = times["computing"].ms, times["inheriting"].ms
    part = part_computed(whole, rest, speedup)
    return lambda index, count: index in computed_steps(count, max(1, math.floor(part * count)), spacing)


def computed_steps(count: int, computed: int, spacing: Spacing) -> set[int]:
    """Which of `count` steps compute; the first always does."""
    places = [index / computed for index in range(computed)]
    if spacing == "early":
        places = [place**UNEVENNESS for place in places]
    elif spacing == "late":
        places = [1 - (1 - place) ** UNEVENNESS for place in places]
    return _nearest_steps(places, count)


def _nearest_steps(places: Iterable[float], count: int) -> set[int]:
    """The steps nearest to rising places in [0, 1), no step twice."""
    chosen: set[int] = set()
    for place in places:
        free = [step for step in range(count) if step not in chosen]  # dense places meet
        chosen.add(min(free, key=lambda step: abs(step - place * count)))
    return chosen


def noise_level(scheduler: Any, timestep: float) -> float:
    """Sigma, noise over signal, at a time step (between two of them for one that is not whole); the time step itself
    for schedulers that have no cumulative alphas. Features are nearer to linear in sigma than in the time step."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return timestep
    below = min(max(int(timestep), 0), len(alphas) - 1)
    above = min(below + 1, len(alphas) - 1)
    sigmas = [math.sqrt((1 - alpha) / max(alpha, 1e-6)) for alpha in (float(alphas[below]), float(alphas[above]))]
    return sigmas[0] + min(max(timestep - below, 0.0), 1.0) * (sigmas[1] - sigmas[0])


def timed_calls(session: CachingSession, unet: UNet2DConditionModel, rounds: int = 3) -> Timing:
    """What a call takes that is "computing", and one that is "inheriting"."""
    call = unet_call(unet)

    def timed(inheriting: bool) -> Callable[[], Any]:
        def run() -> Any:
            with session.forced(inheriting):
                return call()

        return run

    calls = {"computing": timed(False), "inheriting": timed(True)}
    device = session.pipeline._execution_device  # the UNet's own, unless it is offloaded
    return measure_interleaved(calls, rounds=rounds, warmup=1, device=device)


def part_computed(whole: float, rest: float, speedup: float) -> float:
    """The part of the calls that may be whole ones, where a call takes `whole` or, inheriting, `rest`.

    Raises:
        AsdmError: the speed-up is out of reach.
    """
    part = (whole / speedup - rest) / max(whole - rest, 1e-9)
    if part <= 0:
        raise AsdmError(
            f"speedup={speedup:g}: out of reach; a call that inherits takes {rest / whole:.0%} of a whole one, so "
            f"{whole / rest:.2f} is the limit; ask for less, or choose the granularity layer"
        )
    return part
