"""One sampling of some prompts, recorded step by step: the scheduler, the latents, and the features at each cut."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm.caching.session import cached_value, on_input
from asdm.data.calibration import DEFAULT_PROMPTS
from asdm.data.sources import open_data
from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.generation import default_guidance, faults_in_one_line, pipeline_arguments
from asdm.diffusion.parameterization import noise_level
from asdm.errors import AsdmError
from asdm.families import BlockIO, CacheCut, Denoiser, denoiser_of, family_of

FEATURES_KEPT = 2**17  # values of one output at one step: enough for its norms


@dataclass(frozen=True)
class Sampling:
    """One sampling of some prompts by the pipeline's own scheduler, with guidance, which can start at any step."""

    pipeline: DiffusionPipeline
    scheduler: Any  # before the first step; copied for each use
    timesteps: Tensor
    arguments: dict[str, Any]  # of the denoiser's call, but the sample and the time step
    timestep_shape: torch.Size
    beside: Tensor | None  # what an inpainting model reads behind the latents
    latents: Tensor
    branches: int  # 2 with guidance
    guidance_scale: float
    seed: int

    def predict(self, scheduler: Any, latents: Tensor, index: int) -> Tensor:
        """Return the guided prediction at a step."""
        timestep = self.timesteps[index]
        sample = scheduler.scale_model_input(torch.cat([latents] * self.branches), timestep)
        if self.beside is not None:
            sample = torch.cat([sample, self.beside], dim=1)
        denoiser = denoiser_of(self.pipeline)
        output: Tensor = denoiser(sample, **self.arguments, timestep=timestep.expand(self.timestep_shape))[0]
        prediction = output[:, : latents.shape[1]]  # without a learned variance
        if self.branches == 1:
            return prediction
        empty, text = prediction.chunk(2)
        return empty + self.guidance_scale * (text - empty)

    def step(self, scheduler: Any, prediction: Tensor, latents: Tensor, index: int) -> Tensor:
        """Return latents after a step, with the same noise each time the step is taken."""
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
class Recording:
    """A sampling of full steps: what was there before each step, and the values that each cut would cache."""

    schedulers: list[Any] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    features: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # depth -> step -> value, before each probe
    products: dict[int, np.ndarray] = field(default_factory=dict)  # depth -> scalar products (steps, steps)
    sigmas: list[float] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.zeros(0))

    def distance(self, latents: Tensor) -> float:
        """Mean squared distance from the final latents, relative to their mean square."""
        return float((latents - self.final).float().square().mean() / self.final.float().square().mean())


class _FirstCall(Exception):
    """Carries the arguments of a pipeline's first call of its denoiser out of it."""


def prepare_sampling(
    pipeline: DiffusionPipeline,
    steps: int,
    data: str | Path | None,
    samples: int | None,
    guidance_scale: float | None,
    seed: int,
) -> Sampling:
    """Return a sampling of captions from `data`, or of this package's prompts. The pipeline itself prepares the
    arguments."""
    channels, height, width = latent_shape(pipeline)
    samples = samples or (4 if height <= 32 else 1)
    captions = [example.caption for example in open_data(data).sample(samples, seed)] if data is not None else []
    prompts = [(captions or DEFAULT_PROMPTS)[i % len(captions or DEFAULT_PROMPTS)] for i in range(samples)]
    guidance = default_guidance(pipeline) if guidance_scale is None else guidance_scale
    denoiser = denoiser_of(pipeline)
    noise = torch.randn(samples, channels, height, width, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(denoiser.device, denoiser.dtype)
    extra = {
        name: [value] * samples if "image" in name else value for name, value in pipeline_arguments(pipeline).items()
    }
    given = _first_call(pipeline, prompts, num_inference_steps=steps, guidance_scale=guidance, latents=noise, **extra)
    sample = given.pop(next(iter(given)))
    timestep = given.pop("timestep")
    scheduler = pipeline.scheduler
    return Sampling(
        pipeline=pipeline,
        scheduler=scheduler,
        timesteps=scheduler.timesteps,
        arguments=given,
        timestep_shape=torch.as_tensor(timestep).shape,
        beside=sample[:, channels:] if sample.shape[1] > channels else None,
        latents=noise * scheduler.init_noise_sigma,
        branches=len(sample) // samples,
        guidance_scale=guidance,
        seed=seed,
    )


def _first_call(pipeline: DiffusionPipeline, prompts: list[str], **settings: Any) -> dict[str, Any]:
    """Return the arguments of the first call of the denoiser, by name, the sample first."""

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCall(args, kwargs)

    handle = denoiser_of(pipeline).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with faults_in_one_line(pipeline):
            pipeline(prompts, **settings)
    except _FirstCall as call:
        return family_of(denoiser_of(pipeline)).call_arguments(*call.args)
    finally:
        handle.remove()
    raise AsdmError("the pipeline did not call its denoiser; nothing can be calibrated")


def record(
    sampling: Sampling, cuts: dict[int, CacheCut], probes: Collection[int], report: Callable[[str], None]
) -> Recording:
    """Sample once with full steps.

    Args:
        cuts: by depth.
        probes: steps before which features are kept whole.
    """
    recording = Recording()
    parts: dict[int, list[Tensor]] = {depth: [] for depth in cuts}
    scheduler, latents = copy.deepcopy(sampling.scheduler), sampling.latents
    for index, timestep in enumerate(sampling.timesteps):
        recording.schedulers.append(copy.deepcopy(scheduler))
        recording.latents.append(latents)
        recording.sigmas.append(noise_level(sampling.scheduler, float(timestep)))
        with _values_at(denoiser_of(sampling.pipeline), cuts) as values:
            prediction = sampling.predict(scheduler, latents, index)
        for depth, value in values.items():
            parts[depth].append(_subset(value))
            if index + 1 in probes:
                recording.features.setdefault(depth, {})[index] = value
        recording.predictions.append(prediction)
        latents = sampling.step(scheduler, prediction, latents, index)
        report("record")
    recording.final = latents
    for depth, vectors in parts.items():
        features = torch.stack(vectors).cpu().double()  # which not all devices have
        recording.products[depth] = (features @ features.T / features.shape[1]).numpy()
    return recording


def _subset(value: Tensor) -> Tensor:
    """Return some values of a tensor, always from the same places."""
    values = value.flatten()
    if len(values) <= FEATURES_KEPT:
        return values.float().clone()
    places = torch.randint(len(values), (FEATURES_KEPT,), generator=torch.Generator().manual_seed(0))
    return values[places.to(values.device)].float()


@contextmanager
def _values_at(denoiser: Denoiser, cuts: dict[int, CacheCut]) -> Iterator[dict[int, Tensor]]:
    """What would be cached at each cut, by depth, in a call within the block."""
    values: dict[int, Tensor] = {}
    fresh: dict[int, Tensor] = {}
    handles = []
    for depth, cut in cuts.items():
        (border,) = cut.read
        io = family_of(denoiser).block_io(denoiser, border)
        if cut.relative_to is not None:
            handles.append(on_input(denoiser, cut.relative_to, partial(fresh.__setitem__, depth)))

        def keep(_module: nn.Module, _args: Any, output: Any, depth: int = depth, io: BlockIO = io) -> None:
            values[depth] = cached_value(io, output, fresh.get(depth))

        handles.append(denoiser.get_submodule(border).register_forward_hook(keep))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()
