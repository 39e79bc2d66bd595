"""What a method needs on any machine: MACs, weights and peak memory of the first steps of a sampling."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.benchmark.method import Method
from asdm.diffusion.generation import default_guidance, pipeline_arguments, samples_per_call
from asdm.diffusion.guidance import CfgCutoff
from asdm.evaluation.image_timing import watching_calls
from asdm.evaluation.speed import weight_megabytes
from asdm.families import denoiser_of
from asdm.measure.latency import synchronise
from asdm.measure.macs import counting_macs
from asdm.measure.memory import peak_megabytes


@dataclass(frozen=True)
class Cost:
    """What a method needs on any machine, as far as it is known; `samples` in a denoiser call: two with guidance."""

    dtype: str
    gmacs: float | None = None
    unet_megabytes: float | None = None
    peak_megabytes: float | None = None
    samples: int = 2

    def metrics(self, whole_call: float, limits: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Return fields of a `BenchmarkRow`.

        Args:
            whole_call: seconds of a whole denoiser call.
            limits: as `machine_limits` measures them.
        """
        found: dict[str, Any] = {key: value for key, value in vars(self).items() if key != "samples"}
        if self.gmacs is not None:
            found["gflops"] = 2 * self.samples * self.gmacs / whole_call  # two operations a MAC
            if self.dtype in limits:
                found["limit_share"] = found["gflops"] / max(limits[self.dtype].values())
        return found


def measure_cost(ready: DiffusionPipeline, method: Method) -> tuple[Cost, Tensor]:
    """Measure what a method needs, and return the latents of its first steps.

    Args:
        ready: the pipeline that the method has prepared.
    """
    denoiser, macs = denoiser_of(ready), [0]
    latents: list[Tensor] = []
    with counting_macs(denoiser) as count:
        handle = denoiser.register_forward_hook(lambda *_: macs.append(count.below()))
        try:
            peak = peak_megabytes(lambda: latents.append(first_steps(ready, method, times=1)[0]))
        finally:
            handle.remove()
    cost = Cost(
        dtype=getattr(denoiser, "precision", str(denoiser.dtype).removeprefix("torch.")),
        gmacs=macs[1] / 1e9 or getattr(denoiser, "gmacs", None),
        unet_megabytes=weight_megabytes(denoiser),
        peak_megabytes=peak,
        samples=samples_per_call(ready, default_guidance(ready)),
    )
    return cost, latents[0]


class _Ended(Exception):
    """Ends a sampling early, with its latents so far."""

    def __init__(self, latents: Tensor):
        super().__init__()
        self.latents = latents


def first_steps(ready: DiffusionPipeline, method: Method, times: int) -> tuple[Tensor, list[tuple[float, float]]]:
    """Sample until each kind of denoiser call has occurred so often behind the first step, or as often as it does.

    Returns the latents, and the start and end of each denoiser call (`time.perf_counter`).
    """
    steps_of: dict[str, list[int]] = defaultdict(list)
    for step in range(1, method.steps):
        steps_of[method.kinds(step)].append(step)
    last = max((steps[:times][-1] for steps in steps_of.values()), default=0)
    guidance = None if method.cfg_cutoff == 1 else CfgCutoff(ready, method.cfg_cutoff)

    def step_done(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronise(ready.device)
        pipe._interrupt = step >= last  # diffusers' own way to end a sampling early
        return {} if guidance is None else guidance(pipe, step, timestep, tensors)

    def legacy_step_done(step: int, _timestep: Any, latents: Tensor) -> None:
        synchronise(ready.device)
        if step >= last:
            raise _Ended(latents)

    callbacks: dict[str, Any] = {
        "callback_on_step_end": step_done,
        "callback_on_step_end_tensor_inputs": ["latents"] if guidance is None else guidance.tensor_inputs,
    }
    if "callback" in inspect.signature(type(ready).__call__).parameters:  # PixArt's, which have no other
        callbacks = {"callback": legacy_step_done, "callback_steps": 1}
    with watching_calls(denoiser_of(ready), ready.device) as calls:
        try:
            latents = ready(
                ["a photograph"],
                num_inference_steps=method.steps,
                guidance_scale=default_guidance(ready),
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
                **callbacks,
                **pipeline_arguments(ready),
            ).images
        except _Ended as ended:
            latents = ended.latents
    return latents, calls
