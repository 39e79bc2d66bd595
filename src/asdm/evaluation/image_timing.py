"""What an image takes, part by part: the text encoders, each UNet call, the scheduler, the decoder.

A burst of other work spoils some calls, and hardly ever all of a kind. So each part is taken from its fastest calls,
and an image from its parts. It cannot come out faster than its parts allow.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from asdm.measure.latency import Latency, Patience, Ratio, Stopwatch, Timing, synchronise

IMAGES = 3  # of each pipeline at least
IMAGES_PATIENCE = 60.0  # seconds
IMAGE_PRECISION = 0.03  # of their ratio


def one_kind(_step: int) -> str:
    """All UNet calls are of one kind."""
    return "UNet"


@dataclass(frozen=True)
class ImageJob:
    """How a pipeline draws one image: `draw` does, maybe in fewer than the `calls` of the UNet that it needs.

    `kinds` names the part that the UNet call of each step belongs to. Where the calls are `data_dependent`, all but the
    first are timed as a whole, with the scheduler between them.
    """

    pipeline: DiffusionPipeline
    draw: Callable[[], Any]
    calls: int
    kinds: Callable[[int], str] = one_kind
    data_dependent: bool = False


@dataclass(frozen=True)
class ImageTiming:
    """The timed parts of several pipelines' images, and how often each part comes in an image.

    `parts` maps a pipeline's name to the part's name, its key in `timing`, and its count. Pipelines that share a
    module share its key. `unet_ratios`, of names of two pipelines, say how many times faster the UNet calls of one are
    than those of the other, where these were timed in turns: then both were slowed down alike.
    """

    timing: Timing
    parts: dict[str, dict[str, tuple[str, int]]]
    images: int
    unet_ratios: Mapping[tuple[str, str], Ratio] = field(default_factory=dict)

    def latency(self, name: str) -> Latency:
        """An image's milliseconds, put together from its parts."""
        known = {key: (self.timing[key], count) for key, count in self.parts[name].values()}
        low, best, high = (
            sum(getattr(latency, bound) * count for latency, count in known.values())
            for bound in ("low_ms", "ms", "high_ms")
        )
        return Latency(best, low, high, self.images)

    def by_part(self, name: str) -> dict[str, float]:
        """Milliseconds that each part takes of an image."""
        return {part: self.timing[key].ms * count for part, (key, count) in self.parts[name].items()}

    def each_part(self, name: str) -> dict[str, float]:
        """Milliseconds that each part takes once."""
        return {part: self.timing[key].ms for part, (key, _) in self.parts[name].items()}

    def speedup(self, base: str, other: str) -> Ratio:
        """How many times faster an image of `other` is than one of `base`."""
        if base == other:
            return Ratio(1.0, 1.0, 1.0)
        shared = {key for key, _ in self.parts[base].values()} & {key for key, _ in self.parts[other].values()}
        unet = self.unet_ratios.get((base, other))

        def total(name: str, own: str, common: str, faster: float | None) -> float:
            """Milliseconds of an image, its own parts and the shared ones at a bound of their intervals."""
            milliseconds = 0.0
            for part, (key, count) in self.parts[name].items():
                if faster is not None and part == one_kind(0):
                    # What both UNets' calls take is shared, too: the other's follow from the first one's.
                    first = self.parts[base][part][0]
                    milliseconds += getattr(self.timing[first], common) * count / faster
                else:
                    milliseconds += getattr(self.timing[key], common if key in shared else own) * count
            return milliseconds

        def ratio(own: str, others: str, common: str, unet_bound: str) -> float:
            faster = None if unet is None else getattr(unet, unet_bound)
            return total(base, own, common, None if unet is None else 1.0) / total(other, others, common, faster)

        commons = ("low_ms", "high_ms")
        return Ratio(
            ratio("ms", "ms", "ms", "value"),
            min(ratio("low_ms", "high_ms", common, "low") for common in commons),
            max(ratio("high_ms", "low_ms", common, "high") for common in commons),
        )

    def precision(self) -> float:
        """How far the widest interval of the ratios to the first pipeline reaches to each side, relative to it."""
        first, *others = self.parts
        ratios = [self.speedup(first, other).precision for other in others]
        return max(ratios, default=self.latency(first).precision)


@torch.no_grad()
def time_images(
    jobs: Mapping[str, ImageJob],
    *,
    rounds: int = IMAGES,
    patience: float | None = None,
    unet_ratios: Mapping[tuple[str, str], Ratio] | None = None,
) -> ImageTiming:
    """Let pipelines draw in turns, one image each and round, until their ratios to the first one are narrow.

    Args:
        unet_ratios: of the UNet calls of two pipelines by name, where these have been timed in turns.
        rounds: the least number of images of each; an untimed one goes before them.
        patience: seconds after which no more follow, as for `measure_interleaved`.
    """
    for job in jobs.values():
        job.draw()
    watch = Stopwatch(next(iter(jobs.values())).pipeline.device)
    more = Patience(rounds, IMAGES_PATIENCE if patience is None else patience, IMAGE_PRECISION)
    parts: dict[str, dict[str, tuple[str, int]]] = {}
    images = 0

    def timed() -> ImageTiming:
        return ImageTiming(watch.timing(), parts, images, unet_ratios or {})

    shared = {id(module) for job in jobs.values() for module in job.pipeline.components.values()}
    while more.another_round(lambda: timed().precision()):
        for name, job in jobs.items():
            parts[name] = time_image(watch, name, job, shared)
        images += 1
    return timed()


def time_image(watch: Stopwatch, name: str, job: ImageJob, shared: Collection[int]) -> dict[str, tuple[str, int]]:
    """Draw one image and time its parts; return their keys and counts, as `ImageTiming` has them.

    Args:
        shared: identities of modules that live through all rounds, which pipelines may have in common.
    """
    pipeline = job.pipeline
    watch.meter.mark()
    start = time.perf_counter()
    with watching_calls(pipeline.unet, watch.device, watch.meter.mark) as calls:
        job.draw()
    synchronise(watch.device)
    end = time.perf_counter()
    watch.meter.mark()
    decoder = decoder_key(name, pipeline, shared)
    watch.add(f"{name}: text encoder", start, calls[0][0])
    watch.add(decoder, calls[-1][1], end)
    return {
        "text encoder": (f"{name}: text encoder", 1),
        **add_calls(watch, name, job, calls),
        "VAE decoder": (decoder, 1),
    }


def decoder_key(name: str, pipeline: DiffusionPipeline, shared: Collection[int]) -> str:
    """The key that pipelines with the same decoder have in common."""
    return f"decoder {id(pipeline.vae)}" if id(pipeline.vae) in shared else f"{name}: decoder"


def add_calls(
    watch: Stopwatch, name: str, job: ImageJob, calls: Sequence[tuple[float, float]]
) -> dict[str, tuple[str, int]]:
    """Count UNet calls and what the scheduler does between them; return the parts of a whole image."""
    if job.data_dependent:
        watch.add(f"{name}: {job.kinds(0)}", *calls[0])
        parts = {job.kinds(0): (f"{name}: {job.kinds(0)}", 1)}
        if len(calls) > 1:
            watch.add(f"{name}: {job.kinds(1)}", calls[0][1], calls[-1][1])
            parts[job.kinds(1)] = (f"{name}: {job.kinds(1)}", 1)
        return parts
    for step, call in enumerate(calls):
        watch.add(f"{name}: {job.kinds(step)}", *call)
    for before, after in pairwise(calls):
        watch.add(f"{name}: scheduler", before[1], after[0])
    counts = Counter(map(job.kinds, range(job.calls)))
    parts = {kind: (f"{name}: {kind}", count) for kind, count in counts.items()}
    if len(calls) > 1:
        parts["scheduler"] = (f"{name}: scheduler", job.calls - 1)
    return parts


@contextmanager
def watching_calls(
    unet: nn.Module, device: torch.device | str, called: Callable[[], Any] = lambda: None
) -> Iterator[list[tuple[float, float]]]:
    """When each call of the UNet started and ended (`time.perf_counter`); `called` is told after each."""
    calls: list[tuple[float, float]] = []
    started = [0.0]

    def before(*_: Any) -> None:
        synchronise(device)
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        synchronise(device)
        calls.append((started[0], time.perf_counter()))
        called()

    handles = [unet.register_forward_pre_hook(before), unet.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
