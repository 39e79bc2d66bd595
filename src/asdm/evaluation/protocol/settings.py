"""How each pipeline samples in a job of many images: the protocol's settings, with what the caller changed of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from accelerate import PartialState
from diffusers import DiffusionPipeline

from asdm.devices import LONGEST_WAIT
from asdm.diffusion.conditioning import image_size, require_size
from asdm.diffusion.generation import is_few_step, require_steps
from asdm.evaluation.protocol.image_job import ImageSettings
from asdm.evaluation.protocol.protocols import Protocol
from asdm.evaluation.sampling import Sampling, common_guidance, sampling_of


def launch_state(pipeline: DiffusionPipeline) -> PartialState:
    """Return the processes of the launch, of which this one may be the only one."""
    return PartialState(cpu=pipeline.device.type == "cpu", timeout=LONGEST_WAIT)


def settings_of(
    pipeline: DiffusionPipeline, sampling: Sampling, size: int | None, seed: int, **stored: int | None
) -> ImageSettings:
    """Return how a pipeline generates the images of a job.

    Raises:
        AsdmError: the pipeline cannot sample in so many steps, or at this size.
    """
    require_steps(pipeline, sampling.steps)
    if size is not None:
        require_size(pipeline, size)
    side = size or image_size(pipeline)
    return ImageSettings(steps=sampling.steps, guidance_scale=sampling.guidance_scale, seed=seed, side=side, **stored)


@dataclass(frozen=True)
class Changes:
    """A protocol, and what the caller changed of it."""

    protocol: Protocol
    steps: int | None
    guidance_scale: float | None
    size: int | None
    seed: int

    def sampling(self, pipeline: DiffusionPipeline, pipelines: Iterable[DiffusionPipeline]) -> Sampling:
        """Return the steps and guidance of one of the pipelines."""
        guidance = self.protocol.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return sampling_of(pipeline, self.steps or self.protocol.steps, common_guidance(pipelines, guidance))

    def notes(self, name: str, pipeline: DiffusionPipeline, settings: ImageSettings) -> list[str]:
        """Say where a model's images differ from the published protocol's."""
        protocol, told = self.protocol, []
        if protocol.side is not None and settings.side != protocol.side:
            reason = "its own size" if self.size is None else "as requested"
            told.append(f"sampled at {settings.side} px, {reason}, not at {protocol.side}")
        if is_few_step(pipeline):
            told.append(f"a few-step model, in {settings.steps} steps at guidance {settings.guidance_scale:g}")
        else:
            if settings.steps != protocol.steps:
                told.append(f"{settings.steps} steps, not {protocol.steps}")
            if protocol.guidance_scale not in (None, settings.guidance_scale):
                told.append(f"guidance {settings.guidance_scale:g}, not {protocol.guidance_scale:g}")
        return [f"{name}: {each}" for each in told]
