"""The methods that the benchmark compares: ours, baselines, and combinations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from asdm.benchmark import baselines
from asdm.benchmark.baselines import attention_broadcast, deep_cache, t_gate, tome
from asdm.benchmark.method import Maker, Method, Prepared, at_every, cached, combined, data_dependent, fresh, whole
from asdm.benchmark.programs import programs
from asdm.benchmark.techniques import (
    by_lcm,
    caching,
    calibrated,
    decoding_by,
    in_openvino,
    observing,
    optimized,
    switching,
    with_gri,
)
from asdm.diffusion.guidance import guided_steps
from asdm.errors import AsdmError
from asdm.runtime.writers import Int8

Students = Mapping[str, Maker]
BASELINE_STUDENTS = "bk-"  # what the names of BK-SDM's students begin with
INTERVALS = (2, 3, 5)  # of full steps
PARTS = (0.48, 0.32)  # of the steps, to take instead of all
MANY_PARTS = (0.8, 0.64, 0.48, 0.4, 0.32)
GUIDED_PARTS = (0.8, 0.6, 0.36)  # of the steps, that have guidance
T = TypeVar("T")


def methods(
    steps: int = 25,
    students: Students | None = None,
    *,
    few_step: Students | None = None,
    data: str | Path | None = None,
    graphs: bool = True,
    decoder: str | Path | None = None,
    full: bool = False,
) -> list[Method]:
    """Return the methods, the original pipeline first.

    Args:
        steps: sampling steps of all methods that do not change their number.
        students: by name. Those whose names begin with `BASELINE_STUDENTS` are baselines.
        few_step: consistency-distilled students, by name.
        data: prompts to sample and to calibrate on. Without it there is one method of those that differ in quality
            alone, and none whose full steps depend on the prompt.
        graphs: include OpenVINO and the programs that compute on the CPU; the latter without data, as their images
            are not judged.
        decoder: a tiny decoder, as for `with_decoder`: the original and the fastest stacks decode by it, too.
        full: with data, the extra ones, too: every setting and combination, about three times as many. Without data
            all are returned anyway, as methods that differ in the number of steps share their timings.

    Raises:
        AsdmError: a student has the name of another method.
    """
    students, few_step = students or {}, few_step or {}
    own = {name: student for name, student in students.items() if not name.startswith(BASELINE_STUDENTS)}
    found = [
        *_original(steps),
        *_baselines(steps),
        *(programs(steps) if graphs and data is None else []),
        *_students(steps, students, own, data),
        *_caching(steps, data),
        *_stacks(steps, own, data),
        *(_by_lcm(name, "stack", fresh(student)) for name, student in few_step.items()),
        *(_by_lcm(f"{name} + OpenVINO", "stack", in_openvino(student)) for name, student in few_step.items()),
    ]
    if decoder is not None:
        found += _with_tiny_decoder(found, decoding_by(decoder))
    names = [method.name for method in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise AsdmError(f"{twice}: two methods have this name; name the student's folder otherwise")
    chosen = [method for method in found if full or data is None or not method.extra]
    return [method for method in chosen if graphs or "OpenVINO" not in method.name]


def _extra(methods: Iterable[Method]) -> Iterator[Method]:
    return (replace(method, extra=True) for method in methods)


def _in_settings(method_of: Callable[[T], Method], settings: Iterable[T], *, main: Collection[T]) -> Iterator[Method]:
    """Yield the method in each setting; those in all others than the main ones are extra."""
    for setting in settings:
        yield replace(method_of(setting), extra=setting not in main)


def _original(steps: int) -> list[Method]:
    """Return the original, also in fewer steps and with less guidance."""
    original = Method("original", "original", steps=steps)

    def in_fewer(count: int) -> Method:
        return replace(original, name=f"{count} steps", group="fewer steps", steps=count)

    return [
        original,
        *_in_settings(in_fewer, fewer_steps(steps, MANY_PARTS), main=fewer_steps(steps)),
        *_in_settings(partial(with_guidance_until, original), GUIDED_PARTS, main=[0.8]),
        _by_lcm("", "fewer steps"),
    ]


def _baselines(steps: int) -> list[Method]:
    gate, early_gate = (max(1, round(part * steps)) for part in (0.4, 0.2))
    return [
        *_in_settings(partial(tome, steps), (0.25, 0.5, 0.75), main=[0.5]),
        *(deep_cache(steps, interval) for interval in INTERVALS),
        *_in_settings(partial(attention_broadcast, steps), (2, 4), main=[2]),
        *_in_settings(partial(t_gate, steps), dict.fromkeys((gate, early_gate)), main=[gate]),
    ]


def _students(steps: int, students: Students, own: Students, data: str | Path | None) -> Iterator[Method]:
    """Yield students, early steps by a student and late ones by the original, and GRI attention."""
    for name, student in students.items():
        group = "ours" if name in own else baselines.GROUP
        yield combined(name, group, fresh(student), steps=steps)
    for name, student in own.items() if data is not None else ():
        yield from _in_settings(partial(_switch, steps, name, student), (0.75, 0.5, 0.25), main=[0.5])
    yield combined("GRI attention", "ours", fresh(with_gri), steps=steps)
    faster = fresh(partial(with_gri, faster=True))
    yield from _extra([combined("GRI attention, faster kind", "ours", faster, steps=steps)])


def _switch(steps: int, name: str, student: Maker, below: float) -> Method:
    title = f"{name}, from {1 - below:.0%} of the schedule on the original"
    return combined(title, "ours", switching(student, below), steps=steps, kinds=data_dependent)


def fewer_steps(steps: int, parts: Sequence[float] = PARTS) -> list[int]:
    """Return the numbers of steps to take instead of `steps`."""
    counts = dict.fromkeys(round(part * steps) for part in parts)
    return [count for count in counts if 0 < count < steps]


def with_guidance_until(method: Method, part: float) -> Method:
    """Return a method with guidance in the first steps alone. What is cached with it is of no use without."""
    guided = guided_steps(part, method.steps)

    def kinds(step: int) -> str:
        kind = whole(step) if step == guided else method.kinds(step)
        return kind if step < guided else f"{kind}, without guidance"

    guided_method = replace(method, kinds=kinds, cfg_cutoff=part)
    title = f"guidance in {part:.0%} of the steps"
    if method.group == "original":
        return replace(guided_method, name=title, group="fewer steps")
    return replace(guided_method, name=f"{method.name}, {title}")


def cached_every(steps: int, every: int, order: int = 0) -> Method:
    """Feature caching with every n-th step full."""
    name = f"caching, every {every}, order {order}"
    return combined(name, "ours", caching(every=every, order=order), steps=steps, kinds=at_every(every))


def _caching(steps: int, data: str | Path | None) -> Iterator[Method]:
    yield from _extra(cached_every(steps, every) for every in INTERVALS)
    if data is None:
        return
    observed = observing(steps, data)
    for speedup in (1.5, 2.0, 2.5, 3.0):
        yield _data_dependent(f"caching, calibrated, {speedup:g}x", "ours", calibrated(speedup, observed), steps=steps)
    yield from _in_settings(partial(cached_every, steps, order=1), INTERVALS, main=[3])
    settings = {"late, 2x": caching(speedup=2.0, spacing="late")}
    settings |= {f"budget {budget:g}": caching(budget=budget) for budget in (0.1, 0.3)}
    yield from _extra(
        _data_dependent(f"caching, {name}", "ours", technique, steps=steps) for name, technique in settings.items()
    )


# -- combinations -----------------------------------------------------------------------------------------


def _stacks(steps: int, students: Students, data: str | Path | None) -> Iterator[Method]:
    """Yield runtimes of the original and of the students, alone and with fewer steps and feature caching.

    Without data, the last student stands for all of them. The original with GRI attention does where there is none.
    """
    best = combined("best runtime", "runtime", cached(optimized), steps=steps)
    yield best
    for every in (2, 3):
        yield from _extra(_every(best, every, [steps]))
    yield from _graphs("", None, steps, "runtime", data)
    bases = list(students.items()) or [("GRI", with_gri)]
    for name, student in bases if data is not None else bases[-1:]:
        yield from _fastest(name, cached(student, optimized), steps, data)
        yield from _graphs(f"{name} + ", student, steps, "stack", data)


def _fastest(name: str, fast: Prepared, steps: int, data: str | Path | None) -> Iterator[Method]:
    """Yield a student in the fastest runtime; as extras also in fewer steps, and with feature caching."""
    base = combined(f"{name} + runtime", "stack", fast, steps=steps)
    counts = (steps, *fewer_steps(steps))
    yield from _in_settings(base.with_steps, counts, main=[steps])
    yield from _extra([_by_lcm(base.name, "stack", fast)])
    yield from _extra(_reusing(base, counts))
    for count in counts if data is not None else ():  # a calibration is for a number of steps
        technique = calibrated(1.5, observing(count, data))
        title = f"{base.name} + caching, calibrated, 1.5x"
        yield from _extra([_data_dependent(title, "stack", fast, technique, steps=steps).with_steps(count)])


def _graphs(base: str, student: Maker | None, steps: int, group: str, data: str | Path | None) -> Iterator[Method]:
    """Yield a pipeline in OpenVINO, in float and in 8 bits, alone and with feature caching, which our graphs allow."""
    counts = (steps, *fewer_steps(steps))
    runtimes: dict[str, Int8 | None] = {"OpenVINO": None, "OpenVINO int8": "activations"}
    for runtime, int8 in runtimes.items():
        name = f"{base}{runtime}"
        graph = in_openvino(student, int8=int8, data=data)
        alone = combined(name, group, graph, steps=steps)
        yield from _in_settings(alone.with_steps, counts, main=counts if int8 is None else [steps])
        if int8 is None:
            yield _by_lcm(name, group, graph)
        cached_graphs = in_openvino(student, int8=int8, data=data, cache=1)
        yield from _extra(_reusing(combined(name, "stack", cached_graphs, steps=steps), counts))
        for count in counts if data is not None and int8 is None else ():  # a calibration is for a number of steps
            observed = observing(count, data, student, depth=1)
            for speedup in (1.5, 2.0, 2.5):
                technique = calibrated(speedup, observed, cached_graphs)
                title = f"{name} + caching, calibrated, {speedup:g}x"
                method = _data_dependent(title, "stack", technique, steps=steps).with_steps(count)
                yield replace(method, extra=count != steps and speedup != 1.5)


def _with_tiny_decoder(found: Sequence[Method], decoding: Prepared) -> list[Method]:
    """Return the original, and the runtimes and stacks without a calibration, with a tiny decoder."""
    decoded: dict[Prepared, Prepared] = {}  # methods that differ in the number of steps alone share their timings
    methods = []
    for method in found:
        is_stack = method.group in ("runtime", "stack") and method.kinds is not data_dependent
        if method.group != "original" and not is_stack:
            continue
        if method.prepared not in decoded:
            decoded[method.prepared] = combined("", "", method.prepared, decoding, steps=1).prepared
        own = {"name": "tiny decoder", "group": "ours"} if method.group == "original" else {}
        named = {"name": f"{method.name} + tiny decoder"} | own
        methods.append(replace(method, prepared=decoded[method.prepared], **named))  # type: ignore[arg-type]
    return methods


def _by_lcm(name: str, group: str, *techniques: Prepared) -> Method:
    """Return a pipeline in the four steps of a consistency model, whether or not it is one."""
    return combined(f"{name}, 4 steps of LCM" if name else "4 steps of LCM", group, *techniques, by_lcm, steps=4)


def _every(base: Method, every: int, counts: Sequence[int]) -> list[Method]:
    """Return a method with feature caching, every n-th step full."""
    name = f"{base.name} + caching, every {every}"
    technique = caching(every=every)
    return combined(name, base.group, base.prepared, technique, steps=base.steps, kinds=at_every(every)).in_steps(
        counts
    )


def _reusing(base: Method, counts: Sequence[int]) -> Iterator[Method]:
    """Yield a method with feature caching in these numbers of steps. With guidance in the fewest steps, too, where
    most steps reuse features; every fifth step computed is for all the steps and little guidance alone."""
    every_third = _every(base, 3, counts)
    yield from _every(base, 2, counts)
    yield from every_third
    for method in (*every_third, *_every(base, 5, [base.steps])):
        yield with_guidance_until(method, min(GUIDED_PARTS))


def _data_dependent(name: str, group: str, *techniques: Prepared, steps: int) -> Method:
    return combined(name, group, *techniques, steps=steps, kinds=data_dependent)
