"""Which steps should compute and which inherit, under a speed-up target: found from one recorded sampling and a few
probes of what an error at one step does to the final latents.

The errors of copies and extrapolations follow from the recorded features alone; the best schedule under their weighted
sum is a shortest path. Inferred; no paper describes it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm import checks
from asdm.caching.session import (
    CacheSchedule,
    cache_features,
    computed_steps,
    cut_of,
    noise_level,
    part_computed,
    timed_calls,
)
from asdm.data.calibration import DEFAULT_PROMPTS
from asdm.data.prepared import require_usable
from asdm.data.sources import open_data
from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.generation import default_guidance, nothing_to_keep, require_steps
from asdm.errors import AsdmError
from asdm.families.tensors import fingerprint
from asdm.measure.latency import Ratio, Timing

Progress = Callable[[int, int, str], None]
FILE_NAME = "inheritance.json"
DAMPINGS = (0.0, 0.5, 0.75, 1.0)  # 0 is a copy
FEATURES_KEPT = 2**17  # of one layer's output at one step: enough for its norms


def calibrate_cache(
    pipeline: DiffusionPipeline,
    *,
    speedup: float,
    steps: int = 25,
    data: str | Path | None = None,
    samples: int | None = None,
    guidance_scale: float | None = None,
    depth: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CacheSchedule:
    """The schedule for `cache_features` that moves the final latents least at a speed-up of all UNet calls together.

    It takes about six samplings' time.

    Args:
        steps: sampling steps of the pipeline's own scheduler.
        data: whose captions are drawn (as for `analyze`); by default some prompts of this package.
        samples: prompts; by default 4 at up to 32x32 latents, else 1.
        guidance_scale: the pipeline's recommended one by default (`default_guidance`).
        depth: of the cut (`cache_features`), where it is given, as by graphs that were exported for one; else the
            best is chosen.

    Raises:
        AsdmError: the speed-up is out of reach, or there are fewer than four steps.
    """
    observations = observe_sampling(
        pipeline,
        steps=steps,
        data=data,
        samples=samples,
        guidance_scale=guidance_scale,
        depth=depth,
        seed=seed,
        speedup=speedup,
        progress=progress,
    )
    return observations.schedule(speedup)


@checks.arguments(
    pipeline=checks.PIPELINE,
    speedup=checks.SPEEDUP,
    data=checks.path,
    samples=checks.SAMPLES,
    guidance_scale=checks.GUIDANCE,
    depth=checks.whole(),
    seed=checks.SEED,
    progress=checks.function,
)
@torch.no_grad()
def observe_sampling(
    pipeline: DiffusionPipeline,
    *,
    steps: int = 25,
    data: str | Path | None = None,
    samples: int | None = None,
    guidance_scale: float | None = None,
    depth: int | None = None,
    seed: int = 0,
    speedup: float = 1.0,
    progress: Progress | None = None,
) -> Observations:
    """What schedules for any speed-up from `speedup` on follow from; arguments as for `calibrate_cache`."""
    require_steps(pipeline, steps)
    if steps < 4:
        raise AsdmError(f"steps={steps}: too few to inherit anything; allowed are 4 and more")
    if data is not None:
        require_usable(data)
    depths = sorted({1, 2, len(pipeline.unet.up_blocks[-1].resnets)}) if depth is None else [depth]
    times = {each: _timed(pipeline, each) for each in depths}
    costs = {each: (time["computing"].ms, time["inheriting"].ms) for each, time in times.items()}
    fastest = depths[0]
    part_computed(*costs[fastest], speedup)  # raises where it is out of reach
    costs = {each: cost for each, cost in costs.items() if each == fastest or speedup < cost[0] / cost[1]}
    sampling = _sampling(pipeline, steps, data, samples, guidance_scale, seed)
    count = len(sampling.timesteps)  # second-order schedulers visit a time step twice
    probes = _probes(count)
    report = _Report(progress, count + sum(count - 1 - probe for probe in probes))
    recorded = _record(sampling, {each: _border(pipeline, each) for each in costs}, report)
    weights = _weights(sampling, recorded, list(costs), probes, report)
    ratios = {each: times[each].speedup("computing", "inheriting") for each in costs}
    return Observations(sampling, recorded, weights, costs, ratios)


@dataclass(frozen=True)
class Observations:
    """One recorded sampling, and what follows from it.

    `weights` (steps,) of each depth: what the final distance is for a squared error 1 of the features at one step;
    `costs`: milliseconds of a whole call and of one that inherits, by depth; `ratios`: of the two, with intervals.
    """

    sampling: _Sampling
    recorded: _Recorded
    weights: dict[int, np.ndarray]
    costs: dict[int, tuple[float, float]]
    ratios: dict[int, Ratio]

    def schedule(self, speedup: float) -> CacheSchedule:
        """The best at each depth, as estimated; of the best two of these the better one, as tried on the prompts."""
        part_computed(*self.costs[min(self.costs)], speedup)
        best = []
        for depth, (whole, rest) in self.costs.items():
            if speedup < whole / rest:
                best.append(min(self._schedules(depth, speedup), key=_estimated))
        tried = [
            schedule.model_copy(update={"distance": self.distance(schedule=schedule)})
            for schedule in sorted(best, key=_estimated)[:2]
        ]
        chosen = min(tried, key=_estimated)
        evenly = sorted(computed_steps(chosen.steps, len(chosen.computed), "uniform"))
        uniform = self.distance(steps=evenly, depth=chosen.depth, order=0)
        return chosen.model_copy(update={"uniform_distance": uniform})

    def _schedules(self, depth: int, speedup: float) -> Iterator[CacheSchedule]:
        """The best at one depth for each damping, its distance as estimated."""
        whole, rest = self.costs[depth]
        count = len(self.sampling.timesteps)
        computed = min(count, max(1, math.floor(part_computed(whole, rest, speedup) * count + 1e-6)))
        low, high = (count / (computed + (count - computed) / bound) for bound in self.ratios[depth].interval)
        for damping in DAMPINGS:
            errors = extrapolation_errors(self.recorded.products[depth], self.recorded.sigmas, damping)
            chosen, distance = best_steps(errors * self.weights[depth], computed)
            yield CacheSchedule(
                fingerprint=fingerprint(self.sampling.pipeline.unet),
                steps=count,
                computed=tuple(chosen),
                depth=depth,
                order=1 if damping else 0,
                damping=damping or 1.0,
                whole_ms=whole,
                cached_ms=rest,
                speedup=count * whole / (computed * whole + (count - computed) * rest),
                speedup_interval=(low, high),
                distance=distance,
            )

    @torch.no_grad()
    def distance(self, **settings: Any) -> float:
        """Of the final latents from the whole sampling's, with `settings` of `cache_features`."""
        with cache_features(self.sampling.pipeline, **settings):
            scheduler = copy.deepcopy(self.recorded.schedulers[0])
            return self.recorded.distance(self.sampling.finish(scheduler, self.sampling.latents, 0))


def _estimated(schedule: CacheSchedule) -> float:
    return schedule.distance or 0.0


def extrapolation_errors(products: np.ndarray, sigmas: Sequence[float], damping: float) -> np.ndarray:
    """Squared norms (q, p, i) of the error at step i of what is extrapolated from the steps q < p < i; q = p: a copy.

    Args:
        products: the scalar products (steps, steps) of the features.
        sigmas: noise levels of the steps.
    """
    levels = np.asarray(sigmas, dtype=np.float64)
    q, p, i = np.ix_(*[np.arange(len(levels))] * 3)
    between = levels[p] - levels[q]
    ahead = np.divide(
        levels[i] - levels[p], between, out=np.zeros(between.shape[:2] + levels.shape), where=between != 0
    )
    g = damping * ahead
    square = np.diag(products)
    errors = square[i] + (1 + g) ** 2 * square[p] + g**2 * square[q]
    errors = errors - 2 * (1 + g) * products[p, i] + 2 * g * products[q, i] - 2 * g * (1 + g) * products[q, p]
    return np.maximum(errors, 0.0)


def best_steps(errors: np.ndarray, computed: int) -> tuple[list[int], float]:
    """The steps that compute, the first among them, so that the errors of all others are least, and that sum.

    What inherits from the same steps errs the same way, so square roots are added up there, and squares elsewhere.

    Args:
        errors: (q, p, i), what an inheriting step i adds where q and p are the last two that computed; q = p where
            there is one only.
        computed: how many compute.
    """
    count = len(errors)
    ahead = np.arange(count) > np.arange(count)[:, None]  # (p, i)
    run = np.zeros((count, count, count + 1))  # (q, p, next computed): of all steps between
    run[:, :, 1:] = np.cumsum(np.sqrt(errors) * ahead, axis=-1) ** 2
    rest = run[:, :, count].copy()  # (q, p): of all steps after p when p is the last that computes
    choices = []
    for _ in range(computed - 1):
        totals = np.where(ahead, run[:, :, :count] + rest, np.inf)  # (q, p, c): `rest` of (p, c)
        choices.append(totals.argmin(-1))
        rest = totals.min(-1)
    chosen, q, p = [0], 0, 0
    for choice in reversed(choices):
        q, p = p, int(choice[q, p])
        chosen.append(p)
    return chosen, float(rest[0, 0])


@dataclass(frozen=True)
class _Sampling:
    """One sampling of some prompts, step by step, by the pipeline's own scheduler with guidance."""

    pipeline: DiffusionPipeline
    scheduler: Any  # before the first step; copied for each use
    timesteps: Tensor
    arguments: dict[str, Any]
    beside: Tensor | None  # what an inpainting UNet reads behind the latents
    latents: Tensor
    copies: int
    guidance_scale: float
    seed: int

    def predict(self, scheduler: Any, latents: Tensor, index: int) -> Tensor:
        timestep = self.timesteps[index]
        sample = scheduler.scale_model_input(torch.cat([latents] * self.copies), timestep)
        if self.beside is not None:
            sample = torch.cat([sample, self.beside], dim=1)
        prediction: Tensor = self.pipeline.unet(sample, timestep, **self.arguments)[0]
        if self.copies == 1:
            return prediction
        empty, text = prediction.chunk(2)
        return empty + self.guidance_scale * (text - empty)

    def step(self, scheduler: Any, prediction: Tensor, latents: Tensor, index: int) -> Tensor:
        """Latents after a step, with the same noise each time the step is taken."""
        noise = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            noise["generator"] = torch.Generator().manual_seed(self.seed + index)
        following: Tensor = scheduler.step(prediction, self.timesteps[index], latents, **noise, return_dict=False)[0]
        return following

    def finish(
        self, scheduler: Any, latents: Tensor, index: int, report: Callable[[str], None] | None = None
    ) -> Tensor:
        """Final latents from those before step `index`."""
        for later in range(index, len(self.timesteps)):
            latents = self.step(scheduler, self.predict(scheduler, latents, later), latents, later)
            if report is not None:
                report("probe")
        return latents


@dataclass
class _Recorded:
    """A whole sampling: before each step the scheduler and the latents, and what the borders of the cuts answered."""

    schedulers: list[Any] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    features: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # depth -> step -> whole, before each probe
    products: dict[int, np.ndarray] = field(default_factory=dict)  # depth -> (steps, steps)
    sigmas: list[float] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.zeros(0))

    def distance(self, latents: Tensor) -> float:
        return float((latents - self.final).float().square().mean() / self.final.float().square().mean())


class _Report:
    """Progress in UNet calls."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, note: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, note)


class _FirstCall(Exception):
    """Carries the arguments of a pipeline's first UNet call out of it."""


def _sampling(
    pipeline: DiffusionPipeline,
    steps: int,
    data: str | Path | None,
    samples: int | None,
    guidance_scale: float | None,
    seed: int,
) -> _Sampling:
    channels, height, width = latent_shape(pipeline)
    samples = samples or (4 if height <= 32 else 1)
    captions = [example.caption for example in open_data(data).sample(samples, seed)] if data is not None else []
    prompts = [(captions or DEFAULT_PROMPTS)[i % len(captions or DEFAULT_PROMPTS)] for i in range(samples)]
    guidance = default_guidance(pipeline) if guidance_scale is None else guidance_scale
    noise = torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(pipeline.unet.device, pipeline.unet.dtype)
    extra = {name: [value] * samples if "image" in name else value for name, value in nothing_to_keep(pipeline).items()}

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCall(args, kwargs)

    handle = pipeline.unet.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, latents=noise, **extra)
        raise AsdmError("the pipeline made no UNet call; nothing can be calibrated")
    except _FirstCall as call:
        args, kwargs = call.args
    finally:
        handle.remove()
    sample = kwargs.pop("sample") if "sample" in kwargs else args[0]
    kwargs.pop("timestep", None)
    scheduler = pipeline.scheduler
    return _Sampling(
        pipeline=pipeline,
        scheduler=scheduler,
        timesteps=scheduler.timesteps,
        arguments=kwargs,
        beside=sample[:, channels:] if sample.shape[1] > channels else None,
        latents=noise * scheduler.init_noise_sigma,
        copies=len(sample) // samples,
        guidance_scale=guidance,
        seed=seed,
    )


def _probes(count: int) -> list[int]:
    """Steps at which an error's effect is looked at: close together where it changes much, first and last."""
    places = {1, count // 8, count // 4, count // 2, 3 * count // 4, count - 3, count - 2, count - 1}
    return sorted(place for place in places if place >= 1)


def _record(sampling: _Sampling, borders: dict[int, str], report: _Report) -> _Recorded:
    recorded = _Recorded()
    count = len(sampling.timesteps)
    kept_whole = {probe - 1 for probe in _probes(count)}
    parts: dict[int, list[Tensor]] = {depth: [] for depth in borders}
    scheduler, latents = copy.deepcopy(sampling.scheduler), sampling.latents
    for index in range(count):
        recorded.schedulers.append(copy.deepcopy(scheduler))
        recorded.latents.append(latents)
        recorded.sigmas.append(noise_level(sampling.scheduler, float(sampling.timesteps[index])))
        with _answers(sampling.pipeline.unet, borders) as answers:
            prediction = sampling.predict(scheduler, latents, index)
        for depth, answer in answers.items():
            parts[depth].append(_some(answer))
            if index in kept_whole:
                recorded.features.setdefault(depth, {})[index] = answer
        recorded.predictions.append(prediction)
        latents = sampling.step(scheduler, prediction, latents, index)
        report("record")
    recorded.final = latents
    for depth, vectors in parts.items():
        features = torch.stack(vectors).cpu().double()  # which not all devices have
        recorded.products[depth] = (features @ features.T / features.shape[1]).numpy()
    return recorded


def _some(answer: Tensor) -> Tensor:
    """So many values of a tensor, always those in the same places."""
    values = answer.flatten()
    if len(values) <= FEATURES_KEPT:
        return values.float().clone()
    places = torch.randint(len(values), (FEATURES_KEPT,), generator=torch.Generator().manual_seed(0))
    return values[places.to(values.device)].float()


@contextmanager
def _answers(unet: nn.Module, names: dict[int, str]) -> Iterator[dict[int, Tensor]]:
    """What the named modules answer within the block."""
    answers: dict[int, Tensor] = {}
    handles = []
    for depth, name in names.items():

        def keep(_module: nn.Module, _args: Any, output: Any, depth: int = depth) -> None:
            answers[depth] = output[0] if isinstance(output, tuple) else output

        handles.append(unet.get_submodule(name).register_forward_hook(keep))
    try:
        yield answers
    finally:
        for handle in handles:
            handle.remove()


def _weights(
    sampling: _Sampling,
    recorded: _Recorded,
    depths: list[int],
    probes: list[int],
    report: _Report,
) -> dict[int, np.ndarray]:
    """For each depth (steps,): what the final distance is for a squared error 1 of the features at one step.

    At each probe, the features of the step before are copied. The first depth's prediction goes on to the end;
    the other depths' errors of the prediction are taken to have the same effect, for their size.
    """
    effects: dict[int, list[float]] = {depth: [] for depth in depths}
    moved: dict[int, float] = {}  # probe -> final distance for a squared error 1 of the prediction
    for depth in depths:
        with cache_features(sampling.pipeline, steps=[0], depth=depth, order=0) as session:
            for probe in probes:
                latents, scheduler = recorded.latents[probe], copy.deepcopy(recorded.schedulers[probe])
                with session.forced(inheriting=False):
                    if probe == probes[0]:
                        sampling.predict(scheduler, latents, probe)  # so that all modules have answered
                session.answer_with(recorded.features[depth][probe - 1])
                with session.forced(inheriting=True):
                    prediction = sampling.predict(scheduler, latents, probe)
                error = float((prediction - recorded.predictions[probe]).float().square().mean())
                if depth == depths[0]:
                    following = sampling.step(scheduler, prediction, latents, probe)
                    with session.forced(inheriting=False):
                        final = sampling.finish(scheduler, following, probe + 1, report)
                    moved[probe] = recorded.distance(final) / max(error, 1e-20)
                products = recorded.products[depth]
                change = products[probe, probe] + products[probe - 1, probe - 1] - 2 * products[probe, probe - 1]
                effects[depth].append(moved[probe] * error / max(float(change), 1e-20))
    steps = np.arange(len(sampling.timesteps))
    return {depth: np.exp(np.interp(steps, probes, np.log(np.maximum(e, 1e-20)))) for depth, e in effects.items()}


def _border(pipeline: DiffusionPipeline, depth: int) -> str:
    (border,) = cut_of(pipeline.unet, "layer", depth).read
    return border


def _timed(pipeline: DiffusionPipeline, depth: int) -> Timing:
    with cache_features(pipeline, every=1, depth=depth, order=1) as session:
        return timed_calls(session, pipeline.unet)
