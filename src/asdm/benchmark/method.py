"""A method that makes a pipeline faster, and how methods are put together of techniques."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline

from asdm.benchmark.engine import Engine

Prepared = Callable[[DiffusionPipeline], AbstractContextManager[DiffusionPipeline]]
Maker = Callable[[DiffusionPipeline], DiffusionPipeline]
Kinds = Callable[[int], str]
Loaded = Callable[[DiffusionPipeline], AbstractContextManager[Engine]]
Setup = tuple[Prepared | Loaded, Kinds]
Result = TypeVar("Result")


def whole(_step: int) -> str:
    """Every step computes the whole denoiser."""
    return "whole"


def at_every(interval: int) -> Kinds:
    """Every n-th step computes the whole denoiser; the others reuse features."""
    return lambda step: "whole" if step % interval == 0 else "reusing"


def data_dependent(step: int) -> str:
    """Return the prompt, or a measurement, decides which steps compute the whole denoiser; the first does."""
    return "mixed" if step else "whole"


@dataclass(frozen=True)
class Method:
    """A way to make a pipeline faster: `prepared` yields the pipeline to call, and restores the original after it.

    `kinds` names the kind of the denoiser call at each step: where only parts are timed, each kind is timed once.
    `cfg_cutoff` is the part of the steps that have guidance. `image_to_image` says whether it works in a pipeline for
    image-to-image that shares the prepared one's parts. An `engine` samples in a loop of its own, and is timed alone.
    An `extra` one is one setting or combination of many, which a benchmark that judges images measures if asked to.
    """

    name: str
    group: str
    prepared: Prepared = nullcontext
    steps: int = 25
    kinds: Kinds = whole
    cfg_cutoff: float = 1.0
    image_to_image: bool = True
    engine: Loaded | None = None
    extra: bool = False

    @property
    def setup(self) -> Setup:
        """What methods share that differ in the number of steps alone."""
        return self.engine or self.prepared, self.kinds

    def in_steps(self, counts: Sequence[int]) -> list[Method]:
        """Return the method in each of these numbers of steps."""
        return [self.with_steps(count) for count in counts]

    def with_steps(self, steps: int) -> Method:
        """Return the method in this number of steps."""
        return self if steps == self.steps else replace(self, name=f"{self.name}, {steps} steps", steps=steps)


def combined(name: str, group: str, *techniques: Prepared, steps: int, kinds: Kinds = whole) -> Method:
    """Make the method that applies these techniques in this order."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with ExitStack() as entered:
            for technique in techniques:
                pipeline = entered.enter_context(technique(pipeline))
            yield pipeline

    return Method(name, group, prepared, steps, kinds)


def fresh(maker: Maker) -> Prepared:
    """Make the pipeline each time that it is used.

    At SD 1.5's size a UNet takes 3.4 GB, so the pipelines of all methods would not fit into memory together.
    """
    return lambda pipeline: nullcontext(maker(pipeline))


def cached(*makers: Maker) -> Prepared:
    """Make the pipeline once and keep it in memory, as it takes minutes (it is measured or compiled)."""

    @memoized
    def made(pipeline: DiffusionPipeline) -> DiffusionPipeline:
        for maker in makers:
            pipeline = maker(pipeline)
        return pipeline

    return lambda pipeline: nullcontext(made(pipeline))


def memoized(function: Callable[[DiffusionPipeline], Result]) -> Callable[[DiffusionPipeline], Result]:
    """Cache the function's result for each pipeline, as long as there is that pipeline. A failure is cached, too, as it
    may take minutes."""
    known: WeakKeyDictionary[DiffusionPipeline, Result | Exception] = WeakKeyDictionary()

    def call(pipeline: DiffusionPipeline) -> Result:
        if pipeline not in known:
            try:
                known[pipeline] = function(pipeline)
            except Exception as error:
                known[pipeline] = error.with_traceback(None)  # whose frames would keep large objects in memory
        result = known[pipeline]
        if isinstance(result, Exception):
            raise result
        return result

    return call
