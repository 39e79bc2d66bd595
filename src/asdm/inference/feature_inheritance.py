"""Feature inheritance: work whose result hardly changes between neighbouring steps is done at some steps only, and the
others inherit it. No training; named in the abstract of arXiv 2406.00210, the rest is inferred.

What is inherited is a copy, or an extrapolation over the time steps from the last results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from asdm.errors import AsdmError
from asdm.evaluation.latency import measure_interleaved, unet_call
from asdm.student.surgery import set_module
from asdm.units import layers, removable_units

Granularity = Literal["block", "layer", "unit"]
Spacing = Literal["uniform", "early", "late"]
UNEVENNESS = 1.6  # exponent of the computed steps' places where they are denser early or late


@contextmanager
def inherit_features(
    pipeline: DiffusionPipeline,
    *,
    speedup: float | None = None,
    every: int | None = None,
    steps: Sequence[int] | None = None,
    budget: float | None = None,
    granularity: Granularity = "layer",
    spacing: Spacing = "uniform",
    order: int = 0,
) -> Iterator[FeatureInheritance]:
    """Within the block, the pipeline's UNet computes itself wholly at some steps and inherits features at the others.

    Exactly one of four says when it computes. Other pipelines that share the UNet, guidance, ControlNet residuals and
    any size go on working; a new call begins anew, also after one that an exception ended.

    Args:
        speedup: of all UNet calls together; how many steps are computed follows from a timed call of each kind.
        every: computes every n-th step.
        steps: indices of the steps that compute; the first always does.
        budget: adaptive: computes when the first layer's output has changed, relative and summed up over the steps
            since, by this much.
        granularity: what inherits: "block", all blocks but the outermost ones; "layer", all layers but the first of
            the first block and the last of the last; "unit", the residual branches of those layers, whose shortcuts
            are computed.
        spacing: of the steps that `speedup` asks for: evenly, or denser early or late.
        order: 0 copies the last result; 1 and 2 extrapolate from the last two or three, which are kept in memory.

    Raises:
        AsdmError: not exactly one of the four, a value out of range, a speed-up out of reach, or a UNet within another
            such block.
    """
    unet: UNet2DConditionModel = pipeline.unet
    given = {"speedup": speedup, "every": every, "steps": steps, "budget": budget}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise AsdmError(f"give exactly one of speedup, every, steps, budget; got {', '.join(named) or 'none'}")
    least = {"speedup": 1, "every": 1, "budget": 0}
    if any((value := given[name]) is not None and value < low for name, low in least.items()):  # type: ignore[operator]
        raise AsdmError(f"{named[0]}={given[named[0]]}: out of range; every and speedup are at least 1, budget 0")
    if not 0 <= order <= 2:
        raise AsdmError(f"order={order}: allowed are 0, 1 and 2")
    if any(isinstance(module, _Inheriting) for module in unet.modules()):
        raise AsdmError("this UNet inherits features already; leave the other block first")
    session = FeatureInheritance(pipeline, order)
    originals = {name: unet.get_submodule(name) for name in inheriting_modules(unet, granularity)}
    handles = [unet.register_forward_pre_hook(session.before_call, with_kwargs=True)]
    try:
        for name, module in originals.items():
            kept = _shortcut_of(module) if granularity == "unit" else None
            set_module(unet, name, _Inheriting(module, session, kept))
        if budget is not None:
            first = unet.get_submodule(layers(unet)[0])
            handles.append(first.register_forward_hook(session.after_first_layer))
        session.computes_at = _decision(session, unet, speedup, every, steps, budget, spacing)
        yield session
    finally:
        for handle in handles:
            handle.remove()
        for name, module in originals.items():
            set_module(unet, name, module)


class FeatureInheritance:
    """When to compute and when to inherit, and where in a sampling the UNet is.

    `computed` and `inherited` count the UNet's calls of each kind since the block was entered.
    """

    def __init__(self, pipeline: DiffusionPipeline, order: int):
        self.pipeline, self.order = pipeline, order
        self.computes_at: Callable[[int, int], bool | None] = lambda index, count: True
        self.computed, self.inherited = 0, 0
        self.inheriting = False
        self.budget: float | None = None
        self.generation = 0  # of the sampling that is under way: what was stored before is not inherited
        self.timestep = 0.0
        self._timesteps: Any = None  # the scheduler's, made anew at the start of each sampling
        self._index = -1
        self._seen: tuple[Any, ...] = ()
        self._first: Tensor | None = None
        self._change = 0.0
        self._forced: bool | None = None

    @contextmanager
    def forced(self, inheriting: bool) -> Iterator[None]:
        """Compute or inherit whatever the schedule says; for timing."""
        self._forced = inheriting
        try:
            yield
        finally:
            self._forced = None
            self._timesteps = None

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide for a call of the UNet (a forward pre-hook)."""
        sample = kwargs["sample"] if "sample" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        states = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        self.timestep = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        if self._forced is not None:
            self.generation += not self._forced
            self.inheriting = self._forced
            return
        timesteps = getattr(self.pipeline.scheduler, "timesteps", None)
        index = self._place(timesteps)
        seen = (sample.shape, sample.dtype, sample.device, states)
        follows = timesteps is self._timesteps and index in (self._index, self._index + 1) and self._same(seen)
        if not follows or index < 0:
            self.generation += 1
            self._first, self._change = None, 0.0
        self._timesteps, self._index, self._seen = timesteps, index, seen
        decision = self.computes_at(index, len(timesteps) if timesteps is not None else 0)
        self._decide(decision is not False or not follows, known=decision is not None or not follows)

    def after_first_layer(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Adaptive: decide by how far the first layer's output has moved (a forward hook)."""
        assert self.budget is not None
        first: Tensor = output[0] if isinstance(output, tuple) else output
        if self._first is not None and self._first.shape == first.shape:
            moved = (first - self._first).abs().mean() / self._first.abs().mean().clamp(min=1e-12)
            self._change += float(moved)
            self._decide(self._change > self.budget, known=True)
        if not self.inheriting:
            self._change = 0.0
        self._first = first.detach()

    def _decide(self, compute: bool, known: bool) -> None:
        self.inheriting = not compute
        if known:
            self.computed += compute
            self.inherited += not compute

    def _place(self, timesteps: Any) -> int:
        """Index of the time step in the sampling; -1 for one that is not of it."""
        if not isinstance(timesteps, Tensor):
            return -1
        found = (timesteps.float().cpu() - self.timestep).abs().lt(1e-3).nonzero().flatten().tolist()
        # Second-order schedulers visit a time step twice.
        return next((i for i in found if i > self._index), found[-1]) if found else -1

    def _same(self, seen: tuple[Any, ...]) -> bool:
        if not self._seen or seen[:3] != self._seen[:3]:
            return False
        mine, theirs = seen[3], self._seen[3]
        return mine is theirs or (mine.shape == theirs.shape and torch.equal(mine, theirs))


class _Inheriting(nn.Module):
    """A module that answers with what it, or an extrapolation of what it, answered before.

    With `kept`, a map of its input that is always computed, only the difference to it is inherited.
    """

    def __init__(self, module: nn.Module, session: FeatureInheritance, kept: Callable[[Tensor], Tensor] | None):
        super().__init__()
        self.module, self.kept = module, kept
        self._session = [session]  # not a submodule
        self._past: list[tuple[float, Tensor]] = []
        self._generation = -1
        self._in_tuple = False

    def __getattr__(self, name: str) -> Any:
        """What is asked of the module itself: a processor, a count of channels."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        session = self._session[0]
        if session.generation != self._generation:
            self._past, self._generation = [], session.generation
        if session.inheriting and self._past:
            value = self._inherited(session.timestep)
            if self.kept is not None:
                value = value + self.kept(args[0])
            return (value,) if self._in_tuple else value
        output = self.module(*args, **kwargs)
        self._in_tuple = isinstance(output, tuple)
        value = output[0] if self._in_tuple else output
        if self.kept is not None:
            value = value - self.kept(args[0])
        self._past = [*self._past, (session.timestep, value)][-1 - session.order :]
        return output

    def _inherited(self, timestep: float) -> Tensor:
        """Lagrange's polynomial through the last results, at this time step."""
        points = [t for t, _ in self._past]
        if len(set(points)) < len(points):
            return self._past[-1][1]
        value: Tensor | None = None
        for i, (_, result) in enumerate(self._past):
            factor = math.prod((timestep - t) / (points[i] - t) for j, t in enumerate(points) if j != i)
            value = factor * result if value is None else value + factor * result
        assert value is not None
        return value


def inheriting_modules(unet: UNet2DConditionModel, granularity: Granularity) -> list[str]:
    """The modules that inherit."""
    if granularity not in ("block", "layer", "unit"):
        raise AsdmError(f"granularity={granularity}: allowed are block, layer, unit")
    last_block = f"up_blocks.{len(unet.up_blocks) - 1}"
    order = layers(unet)
    if granularity == "block":
        chosen = [name for name in order if not name.startswith(("down_blocks.0.", f"{last_block}."))]
    else:
        last = str(len(unet.up_blocks[-1].resnets) - 1)
        ends = {f"down_blocks.0.{kind}.0" for kind in ("resnets", "attentions")}
        ends |= {f"{last_block}.{kind}.{last}" for kind in ("resnets", "attentions")}
        chosen = [name for name in order if name not in ends]
    if granularity == "unit":
        units = [unit for unit in removable_units(unet) if unit.layer in chosen]
        return [unit.name for unit in units if unit.kind != "attention"]
    for stage, block in [("down_blocks", unet.down_blocks), ("up_blocks", unet.up_blocks)]:
        for index, each in enumerate(block):
            for kind in ("downsamplers", "upsamplers"):
                samplers = getattr(each, kind, None) or ()
                chosen += [f"{stage}.{index}.{kind}.{i}" for i in range(len(samplers))]
    return chosen


def _shortcut_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a resnet adds its branch to; None for a branch whose shortcut is outside of it."""
    scale = getattr(module, "output_scale_factor", None)
    if scale is None:
        return None
    shortcut = getattr(module, "conv_shortcut", None)
    return lambda hidden_states: (hidden_states if shortcut is None else shortcut(hidden_states)) / scale


def _decision(
    session: FeatureInheritance,
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
    part = _part_computed(session, unet, speedup)
    return lambda index, count: index in computed_steps(count, max(1, math.floor(part * count)), spacing)


def computed_steps(count: int, computed: int, spacing: Spacing) -> set[int]:
    """Which of `count` steps compute; the first always does."""
    places = [index / computed for index in range(computed)]
    if spacing == "early":
        places = [place**UNEVENNESS for place in places]
    elif spacing == "late":
        places = [1 - (1 - place) ** UNEVENNESS for place in places]
    chosen: set[int] = set()
    for place in places:
        free = [step for step in range(count) if step not in chosen]  # dense places meet
        chosen.add(min(free, key=lambda step: abs(step - place * count)))
    return chosen


def _part_computed(session: FeatureInheritance, unet: UNet2DConditionModel, speedup: float) -> float:
    """The part of the calls that may be whole ones, by a timed call of each kind."""
    call = unet_call(unet)

    def timed(inheriting: bool) -> Callable[[], Any]:
        def run() -> Any:
            with session.forced(inheriting):
                return call()

        return run

    calls = {"computing": timed(False), "inheriting": timed(True)}
    times = measure_interleaved(calls, rounds=3, warmup=1, device=unet.device)
    whole, rest = times["computing"].median_ms, times["inheriting"].median_ms
    part = (whole / speedup - rest) / max(whole - rest, 1e-9)
    if part <= 0:
        raise AsdmError(
            f"speedup={speedup:g}: out of reach; a call that inherits takes {rest / whole:.0%} of a whole one, so "
            f"{whole / rest:.2f} is the limit; ask for less, or choose the granularity layer"
        )
    return part
