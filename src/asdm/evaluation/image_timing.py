"""The latency of an image, part by part: the text encoders, each denoiser call, the scheduler, the decoder.

A burst of other work slows some calls down, but hardly ever all of a kind. So each part is taken from its fastest
calls, and an image is the sum of its parts. Its speed-up cannot exceed that of its fastest part.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from asdm.families import denoiser_of
from asdm.measure.latency import Latency, Patience, Ratio, Stopwatch, Timing, synchronise

IMAGES = 3  # of each pipeline at least
IMAGES_PATIENCE = 60.0  # seconds
IMAGE_PRECISION = 0.03  # of their ratio


def one_kind(_step: int) -> str:
    """Name the part that all denoiser calls belong to where they are of one kind."""
    return "UNet"


@dataclass(frozen=True)
class ImageJob:
    """How a pipeline generates one image.

    `generate` may take fewer denoiser calls than the `calls` that an image needs. `encode` encodes an image by the VAE,
    which is timed beside the images where they are also to start from images. `kinds` names the part that the
    denoiser call of each step belongs to. Where the calls are `data_dependent`, all but the first are timed as a whole,
    with the scheduler between them.
    """

    pipeline: DiffusionPipeline
    generate: Callable[[], Any]
    calls: int
    kinds: Callable[[int], str] = one_kind
    data_dependent: bool = False
    encode: Callable[[], Any] | None = None


@dataclass(frozen=True)
class ImageTiming:
    """The timed parts of several pipelines' images, and how often each part occurs in an image.

    `parts` maps a pipeline's name to the part's name, its key in `timing`, and its count. Pipelines that share a
    module share its key. `denoiser_ratios` maps the names of two pipelines to the speed-up of the second one's denoiser
    calls over the first one's, where these were timed in turns: noise slowed both down alike.
    """

    timing: Timing
    parts: dict[str, dict[str, tuple[str, int]]]
    images: int
    denoiser_ratios: Mapping[tuple[str, str], Ratio] = field(default_factory=dict)

    def latency(self, name: str) -> Latency:
        """Return an image's milliseconds: the sum of its parts."""
        known = {key: (self.timing[key], count) for key, count in self.parts[name].values()}
        low, best, high = (
            sum(getattr(latency, bound) * count for latency, count in known.values())
            for bound in ("low_ms", "ms", "high_ms")
        )
        return Latency(best, low, high, self.images)

    def by_part(self, name: str) -> dict[str, float]:
        """Return the milliseconds of each part in an image."""
        return {part: self.timing[key].ms * count for part, (key, count) in self.parts[name].items()}

    def each_part(self, name: str) -> dict[str, float]:
        """Return the milliseconds of each part, once."""
        return {part: self.timing[key].ms for part, (key, _) in self.parts[name].items()}

    def speedup(self, base: str, other: str) -> Ratio:
        """Return how many times faster an image of `other` is than one of `base`."""
        if base == other:
            return Ratio(1.0, 1.0, 1.0)
        shared = {key for key, _ in self.parts[base].values()} & {key for key, _ in self.parts[other].values()}
        denoiser = self.denoiser_ratios.get((base, other))

        def total(name: str, own: str, common: str, faster: float | None) -> float:
            """Sum an image's milliseconds, with its own parts and the shared ones at a bound of their intervals."""
            milliseconds = 0.0
            for part, (key, count) in self.parts[name].items():
                if faster is not None and part == one_kind(0):
                    # The denoiser calls are shared, too: the other's latency follows from the first one's.
                    first = self.parts[base][part][0]
                    milliseconds += getattr(self.timing[first], common) * count / faster
                else:
                    milliseconds += getattr(self.timing[key], common if key in shared else own) * count
            return milliseconds

        def ratio(own: str, others: str, common: str, denoiser_bound: str) -> float:
            faster = None if denoiser is None else getattr(denoiser, denoiser_bound)
            return total(base, own, common, None if denoiser is None else 1.0) / total(other, others, common, faster)

        commons = ("low_ms", "high_ms")
        return Ratio(
            ratio("ms", "ms", "ms", "value"),
            min(ratio("low_ms", "high_ms", common, "low") for common in commons),
            max(ratio("high_ms", "low_ms", common, "high") for common in commons),
        )

    def from_images(self, calls: Mapping[str, int], encoders: Mapping[str, str]) -> ImageTiming:
        """Return the timing of images that start from an image.

        Args:
            calls: of the denoiser, all of one kind, by the pipeline's name.
            encoders: the key in `timing` of the VAE's encoder, by the pipeline's name.
        """
        counts = {name: {one_kind(0): count, "scheduler": count - 1} for name, count in calls.items()}
        parts = {
            name: {
                "text encoder": own["text encoder"],
                "VAE encoder": (encoders[name], 1),
                **{part: (key, counts[name].get(part, count)) for part, (key, count) in own.items()},
            }
            for name, own in self.parts.items()
        }
        return replace(self, parts=parts)

    def precision(self) -> float:
        """Return half of the widest interval of the ratios to the first pipeline, relative to its value."""
        first, *others = self.parts
        ratios = [self.speedup(first, other).precision for other in others]
        return max(ratios, default=self.latency(first).precision)


@torch.no_grad()
def time_images(
    jobs: Mapping[str, ImageJob],
    *,
    rounds: int = IMAGES,
    patience: float | None = None,
    denoiser_ratios: Mapping[tuple[str, str], Ratio] | None = None,
) -> ImageTiming:
    """Generate an image by each pipeline in turns, until the intervals of the ratios to the first one are narrow.

    Args:
        rounds: the least number of images of each, after an untimed one.
        patience: seconds after which no more follow, as for `measure_interleaved`.
        denoiser_ratios: as `ImageTiming` has them.
    """
    for job in jobs.values():
        job.generate()
    watch = Stopwatch(next(iter(jobs.values())).pipeline.device)
    more = Patience(rounds, IMAGES_PATIENCE if patience is None else patience, IMAGE_PRECISION)
    parts: dict[str, dict[str, tuple[str, int]]] = {}
    images = 0

    def timed() -> ImageTiming:
        return ImageTiming(watch.timing(), parts, images, denoiser_ratios or {})

    shared = {id(module) for job in jobs.values() for module in job.pipeline.components.values()}
    while more.another_round(lambda: timed().precision()):
        encoders = {}
        for name, job in jobs.items():
            parts[name] = time_image(watch, name, job, shared)
            if job.encode is not None:
                encoders[encoder_key(job.pipeline)] = job.encode
        for key, encode in encoders.items():
            watch.time(key, encode)
        images += 1
    return timed()


def time_image(watch: Stopwatch, name: str, job: ImageJob, shared: Collection[int]) -> dict[str, tuple[str, int]]:
    """Generate one image and time its parts; return their keys and counts, as `ImageTiming` has them.

    Args:
        shared: identities of modules that live through all rounds, which pipelines may have in common.
    """
    pipeline = job.pipeline
    watch.meter.mark()
    start = time.perf_counter()
    with watching_calls(denoiser_of(pipeline), watch.device, watch.meter.mark) as calls:
        job.generate()
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
    """Return the timing key of a pipeline's decoder, which pipelines with the same decoder share."""
    return f"decoder {id(pipeline.vae)}" if id(pipeline.vae) in shared else f"{name}: decoder"


def encoder_key(pipeline: DiffusionPipeline) -> str:
    """Return the timing key of a pipeline's VAE encoder, which pipelines with the same VAE share."""
    return f"encoder {id(pipeline.vae)}"


def add_calls(
    watch: Stopwatch, name: str, job: ImageJob, calls: Sequence[tuple[float, float]]
) -> dict[str, tuple[str, int]]:
    """Add the timed denoiser calls, and the scheduler between them; return the parts of a whole image."""
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
    denoiser: nn.Module, device: torch.device | str, called: Callable[[], Any] = lambda: None
) -> Iterator[list[tuple[float, float]]]:
    """Record when each call of the denoiser starts and ends (`time.perf_counter`); run `called` after each."""
    calls: list[tuple[float, float]] = []
    started = [0.0]

    def before(*_: Any) -> None:
        synchronise(device)
        started[0] = time.perf_counter()

    def after(*_: Any) -> None:
        synchronise(device)
        calls.append((started[0], time.perf_counter()))
        called()

    handles = [denoiser.register_forward_pre_hook(before), denoiser.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
