"""Ways to make a pipeline faster, ours and our peers', as parts that can be put together to methods.

Peers come from their own packages, unmodified; those that patch a UNet patch a copy of it.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from asdm.caching.calibration import Observations, observe_sampling
from asdm.caching.features import cache_features
from asdm.caching.schedule import Spacing
from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.generation import generate
from asdm.diffusion.kinds import is_sdxl
from asdm.distillation.consistency import lcm_scheduler
from asdm.distillation.stages import Consistency
from asdm.edits import GriAttention
from asdm.edits.regional_attention import gri_kinds
from asdm.errors import AsdmError, needs_extra
from asdm.families.unet_calls import unet_call
from asdm.families.unet_structure import blocks, removable_units
from asdm.measure.macs import counting_macs
from asdm.pipelines.derived import with_unet
from asdm.planning.budget import make_plan
from asdm.planning.presets import PRESETS
from asdm.runtime.export import export
from asdm.runtime.openvino import with_openvino_graphs
from asdm.runtime.optimize import optimize
from asdm.runtime.switching import switch_unets
from asdm.runtime.writers import Int8
from asdm.sensitivity.analysis import analyze
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan

Prepared = Callable[[DiffusionPipeline], AbstractContextManager[DiffusionPipeline]]
Maker = Callable[[DiffusionPipeline], DiffusionPipeline]
Kinds = Callable[[int], str]
Way = tuple[Prepared, Kinds]
Observing = Callable[[DiffusionPipeline], Observations]
Made = TypeVar("Made")
PEERS = "bk-"  # what the names of BK-SDM's students begin with


def whole(_step: int) -> str:
    """All steps compute the UNet wholly."""
    return "whole"


def unforeseen(step: int) -> str:
    """What is drawn, or a measurement, decides which steps compute; the first does."""
    return "mixed" if step else "whole"


@dataclass(frozen=True)
class Method:
    """A way to make a pipeline faster: `prepared` yields the pipeline to be called, and undoes what it did.

    `kinds` names the kind of the UNet call at each step: where only parts are timed, a kind is timed once.
    `cfg_cutoff` is the part of the steps that are guided.
    """

    name: str
    group: str
    prepared: Prepared = nullcontext
    steps: int = 25
    kinds: Kinds = whole
    cfg_cutoff: float = 1.0

    @property
    def way(self) -> Way:
        """What it shares with those that differ from it in the number of steps alone."""
        return self.prepared, self.kinds

    def in_steps(self, counts: Sequence[int]) -> list[Method]:
        """It in each of so many steps."""
        names = {count: self.name if count == self.steps else f"{self.name}, {count} steps" for count in counts}
        return [replace(self, name=name, steps=count) for count, name in names.items()]


def combined(name: str, group: str, *parts: Prepared, steps: int, kinds: Kinds = whole) -> Method:
    """The contestant that does all of these, in this order."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with ExitStack() as entered:
            for part in parts:
                pipeline = entered.enter_context(part(pipeline))
            yield pipeline

    return Method(name, group, prepared, steps, kinds)


def anew(maker: Maker) -> Prepared:
    """A pipeline that is made each time that it is needed: at SD 1.5's size a UNet takes 3.4 GB, and a benchmark's
    methods together would not fit into memory."""
    return lambda pipeline: nullcontext(maker(pipeline))


def once(make: Callable[[DiffusionPipeline], Made]) -> Callable[[DiffusionPipeline], Made]:
    """The function with a memory for each pipeline, of its failure too, so that it is not waited for again."""
    known: dict[int, Made | Exception] = {}

    def made(pipeline: DiffusionPipeline) -> Made:
        if id(pipeline) not in known:
            try:
                known[id(pipeline)] = make(pipeline)
            except Exception as error:
                known[id(pipeline)] = error.with_traceback(None)  # which would keep what had been made in memory
        found = known[id(pipeline)]
        if isinstance(found, Exception):
            raise found
        return found

    return made


def kept(*makers: Maker) -> Prepared:
    """A pipeline that takes minutes to make (measured, compiled): made once, then kept in memory. These are few, and in
    half precision or less."""

    @once
    def made(pipeline: DiffusionPipeline) -> DiffusionPipeline:
        for maker in makers:
            pipeline = maker(pipeline)
        return pipeline

    return lambda pipeline: nullcontext(made(pipeline))


# -- the scheduler, and other pipelines beside the original -------------------------------------------------


def with_dpm_solver(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with DPM-Solver++ (arXiv 2211.01095), with which all methods sample: what saves computation must
    not be credited with a better scheduler, and few steps deserve the best."""
    if not isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
        pipeline.register_modules(scheduler=DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config))
    return pipeline


def of(unet: UNet2DConditionModel) -> Maker:
    """The pipeline with this UNet."""
    return lambda pipeline: with_unet(pipeline, unet)


def pruned(plan: PruningPlan) -> Maker:
    """The pipeline with a plan's student."""
    return lambda pipeline: with_unet(pipeline, build_student(pipeline.unet, plan))


def with_gri(pipeline: DiffusionPipeline, faster: bool = False) -> DiffusionPipeline:
    """Global-regional attention in the outermost stages' self-attentions, untrained; of the nearer or the faster
    kind."""
    units = outer_self_attentions(pipeline.unet)
    if not units:
        raise AsdmError("no self-attention in the outermost stages")
    _, height, width = latent_shape(pipeline)
    regions, pool = gri_kinds(height * width)[faster]
    edits = [GriAttention(unit=unit, regions=regions, pool=pool, weighted=True) for unit in units]
    return pruned(PruningPlan.for_unet(pipeline.unet, edits))(pipeline)


def switching(student: Maker, below: float) -> Prepared:
    """The student where the noise is high, the original below this part of the schedule."""
    return anew(lambda pipeline: switch_unets(pipeline, [student(pipeline).unet, pipeline.unet], below=[below]))


def outer_self_attentions(unet: UNet2DConditionModel) -> list[str]:
    """The self-attentions of the outermost stages, where tokens are most."""
    outer = (f"{blocks(unet)[0]}.", f"{blocks(unet)[-1]}.")
    return [u.name for u in removable_units(unet) if u.kind == "self_attention" and u.name.startswith(outer)]


def by_lcm(pipeline: DiffusionPipeline) -> AbstractContextManager[DiffusionPipeline]:
    """The pipeline with LCM's scheduler (arXiv 2310.04378), hence without guidance."""
    other = with_unet(pipeline, pipeline.unet)
    other.register_modules(scheduler=lcm_scheduler(pipeline.scheduler.config, Consistency().solver_steps))
    generate(other, ["a photograph"], steps=1)  # a graph is compiled for one sample instead of two
    return nullcontext(other)


def optimized(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A second pipeline, run as `asdm.optimize` finds it fastest on this machine; compiled too where it is a GPU."""
    other = with_unet(pipeline, pipeline.unet)
    optimize(other, rounds=2, compile=pipeline.device.type == "cuda")
    return other


def in_openvino(
    maker: Maker | None = None,
    *,
    int8: Int8 | None = None,
    data: str | Path | None = None,
    cache: int | None = None,
) -> Prepared:
    """The UNet, with `cache` in two graphs, and the VAE's decoder as `asdm.export` writes them, within the same
    pipeline: of the pipeline that `maker` makes. The ranges of `int8` are taken from `data`.

    They are exported once; of all graphs, those that were last asked for are in memory, compiled and called once.
    """
    parts = (*(("unet",) if cache is None else ("unet_inner", "unet_outer")), "vae_decoder")

    @once
    def exported(pipeline: DiffusionPipeline) -> tuple[tempfile.TemporaryDirectory[str], float]:
        made = pipeline if maker is None else maker(pipeline)
        _loaded.clear()
        folder = tempfile.TemporaryDirectory(prefix="asdm-openvino-")
        graphs, ranges = Path(folder.name) / "graphs", None if int8 is None else data
        export(made, graphs, "openvino", int8=int8, data=ranges, cache=cache, parts=parts)
        with counting_macs(made.unet) as count:
            unet_call(made.unet, batch_size=1)()
        return folder, count.below() / 1e9

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        folder, gmacs = exported(pipeline)
        if folder.name not in _loaded:
            _loaded.clear()
            ready = with_openvino_graphs(pipeline, Path(folder.name) / "graphs")
            ready.unet.gmacs = gmacs
            generate(ready, ["a photograph"], steps=2)
            _loaded[folder.name] = ready
        yield _loaded[folder.name]

    return prepared


_loaded: dict[str, DiffusionPipeline] = {}  # the graphs in memory, by their folder: one at most


def forget_graphs() -> None:
    """Let the graphs in memory go; they are read again when they are asked for."""
    _loaded.clear()


def preset_students(pipeline: DiffusionPipeline) -> dict[str, Maker]:
    """The students of the published presets and of ours, by name; their weights are only inherited, for speed alone."""

    @cache
    def redundancy() -> RedundancyMap:
        return analyze(pipeline, sensitivity="taylor", compensate="none", timesteps=1, samples=1, latency_rounds=2)

    def student(preset: str) -> Maker:
        return lambda given: pruned(make_plan(redundancy(), preset=preset, unet=given.unet))(given)

    return {preset: student(preset) for preset in PRESETS}


# -- parts that last for a call -----------------------------------------------------------------------------


def inheriting(**settings: Any) -> Prepared:
    """Feature inheritance with these settings of `cache_features`."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with cache_features(pipeline, **settings):
            yield pipeline

    return prepared


def at_every(interval: int) -> Kinds:
    """The kinds of what computes at every n-th step."""
    return lambda step: "whole" if step % interval == 0 else "reusing"


def observing(steps: int, data: str | Path | None, maker: Maker | None = None, depth: int | None = None) -> Observing:
    """A sampling of the pipeline, or of the one that `maker` makes, recorded once: schedules for any speed-up follow
    from it."""
    return once(
        lambda pipeline: observe_sampling(
            pipeline if maker is None else maker(pipeline), steps=steps, data=data, depth=depth
        )
    )


def calibrated(speedup: float, observed: Observing, graphs: Prepared | None = None) -> Prepared:
    """Feature inheritance by the schedule that a calibration finds; in `graphs` of the pipeline, where they are
    given."""
    schedule = once(lambda pipeline: observed(pipeline).schedule(speedup))

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        found = schedule(pipeline)
        with (graphs or nullcontext)(pipeline) as ready, cache_features(ready, schedule=found):
            yield ready

    return prepared


def inherits(steps: int, every: int, order: int = 0) -> Method:
    name = f"inheritance, layer, every {every}, order {order}"
    part = inheriting(every=every, order=order)
    return combined(name, "ours", part, steps=steps, kinds=at_every(every))


def inherits_to(steps: int, speedup: float, spacing: Spacing) -> Method:
    name = f"inheritance, layer, {spacing}, {speedup:g}x"
    return combined(name, "ours", inheriting(speedup=speedup, spacing=spacing), steps=steps, kinds=unforeseen)


def inherits_within(steps: int, budget: float) -> Method:
    name = f"inheritance, layer, budget {budget:g}"
    return combined(name, "ours", inheriting(budget=budget), steps=steps, kinds=unforeseen)


def tome(steps: int, ratio: float) -> Method:
    """Token merging (arXiv 2303.17604), package tomesd."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with needs_extra("benchmark", "ToMe"):
            import tomesd
        patched = with_unet(pipeline, copy.deepcopy(pipeline.unet))
        tomesd.apply_patch(patched, ratio=ratio, max_downsample=1)
        yield patched

    return Method(f"ToMe, ratio {ratio:g}", "peer", prepared, steps)


def deep_cache(steps: int, interval: int) -> Method:
    """DeepCache (arXiv 2312.00858), package DeepCache."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with needs_extra("benchmark", "DeepCache"):
            from DeepCache import DeepCacheSDHelper
        patched = with_unet(pipeline, copy.deepcopy(pipeline.unet))
        helper = DeepCacheSDHelper(pipe=patched)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            yield patched
        finally:
            helper.disable()

    return Method(f"DeepCache, interval {interval}", "peer", prepared, steps, at_every(interval))


def attention_broadcast(steps: int, skip: int) -> Method:
    """Pyramid attention broadcast (arXiv 2408.12588), of diffusers."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        patched = with_unet(pipeline, copy.deepcopy(pipeline.unet))
        timestep = {"now": 0}
        handle = patched.unet.register_forward_pre_hook(
            lambda _module, args, kwargs: timestep.update(now=int(kwargs.get("timestep", args[1] if args[1:] else 0))),
            with_kwargs=True,
        )
        apply_pyramid_attention_broadcast(
            patched.unet,
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip,
                cross_attention_block_skip_range=skip,
                spatial_attention_timestep_skip_range=(0, 1000),
                cross_attention_timestep_skip_range=(0, 1000),
                spatial_attention_block_identifiers=("down_blocks", "up_blocks", "mid_block"),
                cross_attention_block_identifiers=("down_blocks", "up_blocks", "mid_block"),
                current_timestep_callback=lambda: timestep["now"],
            ),
        )
        try:
            yield patched
        finally:
            handle.remove()

    return Method(f"PAB, skip {skip}", "peer", prepared, steps, at_every(skip))


class _GatedPipeline(StableDiffusionPipeline):
    """Calls what T-GATE's loader adds to a pipeline beside its own call."""

    gate_step: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tgate(*args, gate_step=self.gate_step, **kwargs)


def t_gate(steps: int, gate_step: int) -> Method:
    """T-GATE (arXiv 2404.02747), package tgate, with its other settings as they come."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with needs_extra("benchmark", "T-GATE"):
            from tgate import TgateSDLoader
        if is_sdxl(pipeline):
            raise AsdmError("T-GATE's contestant is for SD 1.x and 2.x")
        parts = {**pipeline.components, "unet": copy.deepcopy(pipeline.unet)}
        patched = _GatedPipeline(**parts, requires_safety_checker=False)
        patched.set_progress_bar_config(disable=True)
        patched.gate_step = gate_step
        yield TgateSDLoader(patched)

    def kinds(step: int) -> str:
        """As tgate_scheduler of that package decides, with sp_interval 5, fi_interval 1 and warm_up 2."""
        if step >= gate_step:
            return "gated"
        return "reusing" if 2 < step < gate_step - 1 and step % 5 else "whole"

    return Method(f"T-GATE, gate {gate_step}", "peer", prepared, steps, kinds)


# -- who takes part -----------------------------------------------------------------------------------------


def methods(
    steps: int = 25,
    students: dict[str, Maker] | None = None,
    *,
    few_step: dict[str, Maker] | None = None,
    data: str | Path | None = None,
    graphs: bool = True,
) -> list[Method]:
    """All of them; the unmodified pipeline first.

    Raises:
        AsdmError: a student has the name of another contestant.

    Args:
        steps: sampling steps of all that do not sample in fewer.
        students: by name; those whose names begin with `PEERS` are peers.
        few_step: consistency-distilled students, by name.
        data: what is drawn, and calibrated on; without it, of those that differ in quality alone one takes part, and of
            those whose computed steps depend on what is drawn none.
        graphs: with OpenVINO's, which compute on the CPU.
    """
    students = students or {}
    mine = {name: student for name, student in students.items() if not name.startswith(PEERS)}
    original = Method("original", "original", steps=steps)
    entries = [
        original,
        *(
            replace(original, name=f"{fewer} steps", group="fewer steps", steps=fewer)
            for fewer in fewer_steps(steps, data is not None)
        ),
        *(guided_until(steps, part) for part in (0.8, 0.6)),
        _by_lcm("", "fewer steps"),
        *(tome(steps, ratio) for ratio in (0.25, 0.5, 0.75)),
        *(deep_cache(steps, interval) for interval in (2, 3, 5)),
        *(attention_broadcast(steps, skip) for skip in (2, 4)),
        *(t_gate(steps, gate) for gate in sorted({round(part * steps) for part in (0.2, 0.4)}, reverse=True)),
        *(
            combined(name, "ours" if name in mine else "peer", anew(student), steps=steps)
            for name, student in students.items()
        ),
        *_switches(steps, mine, data),
        combined("GRI attention", "ours", anew(with_gri), steps=steps),
        combined("GRI attention, faster kind", "ours", anew(partial(with_gri, faster=True)), steps=steps),
        *_inheritances(steps, data),
        *_stacks(steps, mine, data),
        *(_by_lcm(name, "stack", anew(student)) for name, student in (few_step or {}).items()),
        *(_by_lcm(f"{name} + OpenVINO", "stack", in_openvino(student)) for name, student in (few_step or {}).items()),
    ]
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise AsdmError(f"{twice}: two methods have this name; name the student's folder otherwise")
    return [entry for entry in entries if graphs or "OpenVINO" not in entry.name]


def fewer_steps(steps: int, draws: bool) -> list[int]:
    """How many steps to take instead of `steps`."""
    parts = (0.8, 0.64, 0.48, 0.4, 0.32) if draws else (0.48, 0.32)
    return list(dict.fromkeys(round(part * steps) for part in parts))


def guided_until(steps: int, part: float) -> Method:
    """The original, which leaves guidance out of its last steps."""

    def kinds(step: int) -> str:
        return "whole" if step < math.ceil(part * steps) else "without guidance"

    name = f"guidance in {part:.0%} of the steps"
    return Method(name, "fewer steps", steps=steps, kinds=kinds, cfg_cutoff=part)


def _switches(steps: int, students: dict[str, Maker], data: str | Path | None) -> list[Method]:
    """A student early, the original late."""
    return [
        combined(
            f"{name}, from {1 - below:.0%} of the schedule on the original",
            "ours",
            switching(student, below),
            steps=steps,
            kinds=unforeseen,
        )
        for name, student in (students.items() if data is not None else ())
        for below in (0.75, 0.5, 0.25)
    ]


def _inheritances(steps: int, data: str | Path | None) -> list[Method]:
    intervals = (2, 3, 5)
    entries = [inherits(steps, every) for every in intervals]
    if data is None:
        return entries
    observed = observing(steps, data)
    for speedup in (1.5, 2.0, 2.5, 3.0):
        part = calibrated(speedup, observed)
        entries.append(combined(f"inheritance, calibrated, {speedup:g}x", "ours", part, steps=steps, kinds=unforeseen))
    entries += [inherits(steps, every, order=1) for every in intervals]
    entries.append(inherits_to(steps, 2.0, "late"))
    return entries + [inherits_within(steps, budget) for budget in (0.1, 0.3)]


def _stacks(steps: int, students: dict[str, Maker], data: str | Path | None) -> list[Method]:
    """Runtimes of the original, with feature inheritance too; and of the students (the last alone where only speed is
    asked for; the original with GRI attention where there is none), with fewer steps and feature inheritance, alone and
    together."""
    few = (steps, *fewer_steps(steps, draws=False))
    best = combined("best runtime", "runtime", kept(optimized), steps=steps)
    entries = [best, *(entry for every in (2, 3) for entry in _every(best, every, [steps]))]
    entries += _graphs("", None, steps, few, "runtime", data)
    bases = list(students.items()) or [("GRI", with_gri)]
    for name, student in bases if data is not None else bases[-1:]:
        entries += _fast(name, kept(student, optimized), steps, few, data)
        entries += _graphs(f"{name} + ", student, steps, few, "stack", data)
    return entries


def _fast(name: str, fast: Prepared, steps: int, few: Sequence[int], data: str | Path | None) -> Iterator[Method]:
    """A student in the best runtime, alone and with feature inheritance."""
    base = combined(f"{name} + runtime", "stack", fast, steps=steps)
    yield from base.in_steps(few)
    yield _by_lcm(base.name, "stack", fast)
    for every in (2, 3):
        yield from _every(base, every, few)
    if data is not None:
        for count in few:  # a calibration is for a number of steps
            part = calibrated(1.5, observing(count, data))
            name = f"{base.name} + inheritance, calibrated, 1.5x"
            yield from combined(name, "stack", fast, part, steps=steps, kinds=unforeseen).in_steps([count])


def _graphs(
    base: str, student: Maker | None, steps: int, few: Sequence[int], group: str, data: str | Path | None
) -> Iterator[Method]:
    """In OpenVINO and in 8 bits, and with inherited features, which only our graphs can."""
    runtimes: dict[str, Int8 | None] = {"OpenVINO": None, "OpenVINO int8": "activations"}
    for runtime, int8 in runtimes.items():
        name = f"{base}{runtime}"
        graph = in_openvino(student, int8=int8, data=data)
        yield from combined(name, group, graph, steps=steps).in_steps(few)
        if int8 is None:
            yield _by_lcm(name, group, graph)
        inheriting_graphs = in_openvino(student, int8=int8, data=data, cache=1)
        for every in (2, 3):
            yield from _every(combined(name, "stack", inheriting_graphs, steps=steps), every, few)
        for count in few if data is not None and int8 is None else ():  # a calibration is for a number of steps
            observed = observing(count, data, student, depth=1)
            for speedup in (1.5, 2.0, 2.5):
                part = calibrated(speedup, observed, inheriting_graphs)
                also = f"{name} + inheritance, calibrated, {speedup:g}x"
                yield from combined(also, "stack", part, steps=steps, kinds=unforeseen).in_steps([count])


def _by_lcm(name: str, group: str, *parts: Prepared) -> Method:
    """In the four steps of a consistency model, also where the UNet has not been made one."""
    return combined(f"{name}, 4 steps of LCM" if name else "4 steps of LCM", group, *parts, by_lcm, steps=4)


def _every(base: Method, every: int, few: Sequence[int]) -> list[Method]:
    """It with features inherited but at every n-th step."""
    name = f"{base.name} + inheritance, every {every}"
    part = inheriting(every=every)
    return combined(name, base.group, base.prepared, part, steps=base.steps, kinds=at_every(every)).in_steps(few)
