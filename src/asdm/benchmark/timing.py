"""The speed of all methods, timed in turns: of whole images, or of an image's parts where images take too long."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from diffusers import DiffusionPipeline

from asdm.benchmark.costs import Cost, first_steps, measure_cost
from asdm.benchmark.engine import Parts
from asdm.benchmark.method import Loaded, Method, Setup, data_dependent
from asdm.benchmark.results import fault
from asdm.benchmark.techniques import release_graphs
from asdm.diffusion.conditioning import decode_latents
from asdm.diffusion.generation import generate
from asdm.evaluation.image_timing import ImageJob, ImageTiming, add_calls, decoder_key, time_image
from asdm.measure.latency import Patience, Stopwatch

Progress = Callable[[str, int, int], None]
TURN_PRECISION = 0.05  # of the ratios to the first method, at which no more turns follow
TURN_PATIENCE = 1.0  # seconds after which no more turns than requested follow
_TIMES = 2  # of each kind of denoiser call in a turn, behind the first step


class MethodTimer:
    """Times one image by each method in turns.

    A method's pipeline is prepared in its turn and then released, as the denoisers of all methods do not fit into
    memory. Methods that differ in the number of steps alone share their cost and, where parts are timed, their parts. A
    method that fails is left out, and its error noted in `faults`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        methods: Sequence[Method],
        *,
        by_parts: bool,
        faults: dict[str, str],
        progress: Progress | None = None,
    ) -> None:
        self.pipeline, self.methods, self.by_parts = pipeline, methods, by_parts
        self.faults, self.progress = faults, progress
        self.costs: dict[Setup, Cost] = {}
        self._parts: dict[str, Parts] = {}
        self._watch = Stopwatch(pipeline.device)
        self._shared = {id(module) for module in pipeline.components.values()}
        self._compiled_decoders: set[int] = set()
        # Of the current turn:
        self._timed_decoders: set[str] = set()
        self._timed_setups: dict[Setup, Parts] = {}

    def run(self, rounds: int) -> ImageTiming:
        """Warm up in a first turn, which also measures costs, then time `rounds` turns or more.

        On a busy machine as many turns follow again, until the intervals are narrow.
        """
        self._turn(self._warm_up, 0, rounds)
        more, turns = Patience(rounds, TURN_PATIENCE, precision=TURN_PRECISION), 0
        while more.another_round(self._precision):
            turns += 1
            self._timed_decoders.clear()
            self._timed_setups.clear()
            self._turn(self._time, turns, rounds)
        return ImageTiming(self._watch.timing(), self._parts, rounds)

    def _precision(self) -> float:
        return ImageTiming(self._watch.timing(), self._parts, 0).precision() if self._parts else 0.0

    def _turn(self, action: Callable[[Method], None], turns_before: int, rounds: int) -> None:
        release_graphs()  # of the last turn's end
        gc.collect()
        gc.freeze()  # so that each method's collection takes no half second for what was there before
        try:
            self._each_method(action, turns_before, rounds)
        finally:
            gc.unfreeze()

    def _each_method(self, action: Callable[[Method], None], turns_before: int, rounds: int) -> None:
        total = max(rounds, turns_before) + 1
        for number, method in enumerate(self.methods, start=1):
            if self.progress is not None:
                self.progress("time", turns_before * len(self.methods) + number, total * len(self.methods))
            if method.name in self.faults:
                continue
            try:
                action(method)
            except Exception as error:
                self.faults[method.name] = fault(error)
                self._parts.pop(method.name, None)
            gc.collect()  # patched denoisers refer to themselves

    def _warm_up(self, method: Method) -> None:
        if method.setup in self.costs or method.engine is not None:
            return
        with method.prepared(self.pipeline) as ready:
            self.costs[method.setup], latents = measure_cost(ready, method)
            if id(ready.vae) not in self._compiled_decoders:
                self._compiled_decoders.add(id(ready.vae))
                decode_latents(ready, latents)  # compiles what is compiled at its first call

    def _time(self, method: Method) -> None:
        if method.engine is not None:
            self._time_engine(method.engine, method)
        elif self.by_parts:
            self._time_parts(method)
        else:
            self._time_image(method)

    def _time_engine(self, loaded: Loaded, method: Method) -> None:
        drawn_steps = 1 + _TIMES if self.by_parts else method.steps
        with loaded(self.pipeline) as engine:
            self.costs[method.setup] = Cost(dtype=engine.dtype)
            self._parts[method.name] = engine.time(
                self._watch, method.name, drawn_steps=drawn_steps, steps=method.steps
            )

    def _time_image(self, method: Method) -> None:
        with method.prepared(self.pipeline) as ready:
            self._parts[method.name] = time_image(self._watch, method.name, image_job(ready, method), self._shared)

    def _time_parts(self, method: Method) -> None:
        if method.setup not in self._timed_setups:
            with method.prepared(self.pipeline) as ready:
                self._timed_setups[method.setup] = self._time_first_steps(ready, method)
        self._parts[method.name] = _in_its_steps(self._timed_setups[method.setup], method)

    def _time_first_steps(self, ready: DiffusionPipeline, method: Method) -> Parts:
        """Time the first steps, and the decoder once in a turn."""
        start = time.perf_counter()
        latents, calls = first_steps(ready, method, _TIMES)
        self._watch.meter.mark()
        text_encoder = f"{method.name}: text encoder"
        self._watch.add(text_encoder, start, calls[0][0])
        decoder = decoder_key(method.name, ready, self._shared)
        if decoder not in self._timed_decoders:
            self._timed_decoders.add(decoder)
            self._watch.time(decoder, partial(decode_latents, ready, latents))
        steps = add_calls(self._watch, method.name, image_job(ready, method), calls)
        return {"text encoder": (text_encoder, 1), **steps, "VAE decoder": (decoder, 1)}


def image_job(ready: DiffusionPipeline, method: Method) -> ImageJob:
    """Describe how a method's prepared pipeline generates an image."""
    return ImageJob(
        ready,
        partial(generate, ready, ["a photograph"], steps=method.steps, cfg_cutoff=method.cfg_cutoff),
        calls=method.steps,
        kinds=lambda step: f"UNet, {method.kinds(step)}",
        data_dependent=method.kinds is data_dependent,
    )


def _in_its_steps(parts: Parts, method: Method) -> Parts:
    """Return the parts of a method in its number of steps, given those of the method with which it shares them."""
    counts = Counter(f"UNet, {method.kinds(step)}" for step in range(method.steps)) | {"scheduler": method.steps}
    return {part: (key, counts.get(part, 1)) for part, (key, _) in parts.items() if counts.get(part, 1)}
