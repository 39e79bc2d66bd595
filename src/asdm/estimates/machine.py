"""A quick measurement of this machine with a pipeline, by which work is converted to seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline

from asdm.diffusion.conditioning import decode_latents, encode_images, latent_shape
from asdm.estimates.work import Network, StepTime, StepWork, Work
from asdm.families import denoiser_call, denoiser_of, family_of
from asdm.measure.hooks import preserve_module_state
from asdm.measure.latency import seconds_of
from asdm.measure.modules import timing_modules

QUICK = 0.25  # seconds of a call, up to which a few calls are timed instead of one, and a larger batch is, too
PAIR, MANY = 2, 16  # samples in the timed calls
SIDE = 32  # of the latents that the VAE is timed with, at most: its time is proportional to the pixels


class MachineSpeed:
    """The seconds of a pipeline's networks on this machine, as busy as it is now. Each is measured when it is needed.

    `student_share` is what a call of the student takes, as a part of the teacher's.
    """

    def __init__(self, pipeline: DiffusionPipeline, student_share: float = 1.0):
        self.pipeline, self.student_share = pipeline, student_share
        self._layer_seconds: dict[str, float] = {}

    def times(self, steps: Sequence[StepWork]) -> list[StepTime]:
        """Return how long steps take, without those that compute nothing."""
        times = (StepTime(step.name, self.seconds(step.least), self.seconds(step.most, is_busy=True)) for step in steps)
        return [time for time in times if time.most > 0]

    def seconds(self, work: Work, *, is_busy: bool = False) -> float:
        """Return the seconds of some work.

        Args:
            is_busy: measurements go on until they are precise or their patience ends.
        """
        found = work.seconds
        found += sum(count * self.call_seconds(*kind) for kind, count in work.forwards.items())
        if work.encodes:
            found += work.encodes * self._encode_seconds
        if work.decodes:
            found += work.decodes * self._decode_seconds
        if is_busy:
            for rounds, patience in work.repeated:
                once = self.seconds(rounds)
                found += max(patience, 2 * once) - once if patience else 0.0
        return found

    def call_seconds(self, network: Network, batch: int) -> float:
        """Return the seconds of a forward pass with so many samples; between and beyond those timed in proportion."""
        share = self.student_share if network == "student" else 1.0
        if batch <= PAIR or self._pair_seconds > QUICK:
            return share * self._pair_seconds * batch / PAIR
        if batch >= MANY:
            return share * self._many_seconds * batch / MANY
        part = (batch - PAIR) / (MANY - PAIR)
        return share * (self._pair_seconds + part * (self._many_seconds - self._pair_seconds))

    def layer_shares(self) -> dict[str, float]:
        """Return each layer's part of the time of a call."""
        seconds = self._pair_seconds
        return {name: spent / seconds for name, spent in self._layer_seconds.items()}

    @cached_property
    def _pair_seconds(self) -> float:
        denoiser = denoiser_of(self.pipeline)
        layers = family_of(denoiser).layers(denoiser)
        with timing_modules(denoiser, layers, denoiser.device) as spent:
            seconds = _timed(self.pipeline, denoiser_call(denoiser, PAIR))
        self._layer_seconds = {name: median(values[1:]) if values[1:] else 0.0 for name, values in spent.items()}
        return seconds

    @cached_property
    def _many_seconds(self) -> float:
        return max(self._pair_seconds, _timed(self.pipeline, denoiser_call(denoiser_of(self.pipeline), MANY)))

    @cached_property
    def _decode_seconds(self) -> float:
        channels, side, part = self._small_latents
        latents = torch.zeros(1, channels, side, side, device=self.pipeline.device)
        return _timed(self.pipeline, lambda: decode_latents(self.pipeline, latents)) / part

    @cached_property
    def _encode_seconds(self) -> float:
        _, side, part = self._small_latents
        pixels = side * self.pipeline.vae_scale_factor
        image = torch.zeros(1, 3, pixels, pixels)
        return _timed(self.pipeline, lambda: encode_images(self.pipeline.vae, image)) / part

    @property
    def _small_latents(self) -> tuple[int, int, float]:
        """Channels and side of the latents that the VAE is timed with, and their part of a native latent's area."""
        channels, height, width = latent_shape(self.pipeline)
        side = min(height, width, SIDE)
        return channels, side, side * side / (height * width)


@torch.no_grad()
def _timed(pipeline: DiffusionPipeline, call: Callable[[], Any]) -> float:
    """Return the seconds of a call after a first one: the median of three where it is quick."""
    denoiser = denoiser_of(pipeline)
    with preserve_module_state(denoiser, pipeline.vae):
        denoiser.eval()
        call()
        first = seconds_of(call, pipeline.device)
        return first if first > QUICK else median([first, *(seconds_of(call, pipeline.device) for _ in range(2))])
