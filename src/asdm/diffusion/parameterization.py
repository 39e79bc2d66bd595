"""What a denoiser predicts, on which noise schedule: epsilon, v, x0 and flow matching behind one interface.

`parameterization_of` makes one from a scheduler. Nothing else asks a scheduler for its prediction type.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from asdm.errors import AsdmError

TimestepSampling = Literal["uniform", "uniform_angle"]


# A schedule may end without any signal, where noise says nothing of x_0; diffusers' Euler solver stops short of it.
_LEAST_SIGNAL = 2**-12


class Parameterization(ABC):
    """A forward process x_t = a_t x_0 + s_t noise, and what the denoiser predicts of it.

    Time steps (batch,) are as the denoiser reads them, latents (batch, channels, height, width). `num_timesteps` is the
    schedule's length in these units; `config` is the scheduler's.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config, self.num_timesteps = config, int(config["num_train_timesteps"])

    @property
    @abstractmethod
    def description(self) -> str:
        """What is predicted, on which schedule, in a few words; written beside checkpoints."""

    @abstractmethod
    def signal_power(self, timesteps: Tensor) -> Tensor:
        """a_t^2 (batch,), in float32 on the time steps' device."""

    @abstractmethod
    def noise_power(self, timesteps: Tensor) -> Tensor:
        """s_t^2 (batch,), in float32 on the time steps' device."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents x_t."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser is trained to predict."""

    @abstractmethod
    def to_x0(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return the x_0 estimate of a prediction for `noisy`."""

    @abstractmethod
    def sample_timesteps(
        self,
        count: int,
        generator: torch.Generator,
        sampling: TimestepSampling = "uniform",
        min_fraction: float = 0.0,
    ) -> Tensor:
        """Training time steps (count,), one at random from each of `count` equal parts of the schedule, in random
        order: the loss varies less from batch to batch than with independent samples.

        The parts are equal in time, or in the angle whose tangent is noise over signal: the sampled latents are the
        integral of the v-prediction over that (arXiv 2202.00512, App. D), and so is their error.

        Args:
            min_fraction: no time step below this fraction of the schedule is sampled.
        """

    @abstractmethod
    def _x0_error(self, snr: Tensor) -> Tensor:
        """Squared error of x_0 for each squared error of the prediction (batch,), by signal-to-noise ratio."""

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Noise over signal (batch,): s_t / a_t."""
        return (self.noise_power(timesteps) / self.signal_power(timesteps)).sqrt()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Return the signal-to-noise ratio (batch,): a_t^2 / s_t^2."""
        return self.signal_power(timesteps) / self.noise_power(timesteps)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Loss weights (batch,) of Min-SNR-gamma (arXiv 2303.09556, Sec. 3.4), for what the denoiser predicts."""
        snr = self.snr(timesteps).clamp(min=1e-8)  # zero at the end of some schedules
        return snr.clamp(max=gamma) / self._x0_error(snr)


class DiffusionParameterization(Parameterization):
    """The discrete, variance-preserving process of DDPM: a_t^2 is the cumulative alpha, s_t^2 = 1 - a_t^2."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.schedule = DDPMScheduler.from_config(config)
        self.num_timesteps = self.schedule.config.num_train_timesteps

    @property
    def description(self) -> str:
        ends_at_zero = bool(self.schedule.config.rescale_betas_zero_snr)
        return f"{self.schedule.config.prediction_type}{', to zero SNR' if ends_at_zero else ''}"

    def signal_power(self, timesteps: Tensor) -> Tensor:
        return self.schedule.alphas_cumprod.to(timesteps.device)[timesteps]

    def noise_power(self, timesteps: Tensor) -> Tensor:
        return 1 - self.signal_power(timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, timesteps)

    def sample_timesteps(
        self,
        count: int,
        generator: torch.Generator,
        sampling: TimestepSampling = "uniform",
        min_fraction: float = 0.0,
    ) -> Tensor:
        places, total = _stratified(count, generator), self.num_timesteps
        first = int(min_fraction * total)
        if sampling == "uniform_angle":
            angles = self.schedule.alphas_cumprod.cpu().sqrt().acos()  # adding noise moves the schedule to a device
            least = angles[first] if first else 0.0
            return torch.searchsorted(angles, least + places * (angles[-1] - least)).clamp(max=total - 1)
        return (first + places * (total - first)).long().clamp(max=total - 1)

    def _coefficients(self, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, to be multiplied with latents like `noisy`."""
        power = self.signal_power(timesteps.to(noisy.device)).to(noisy.dtype).view(-1, 1, 1, 1)
        return power.sqrt(), (1 - power).sqrt()


class EpsilonParameterization(DiffusionParameterization):
    """The denoiser predicts the noise (arXiv 2006.11239)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def to_x0(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise = self._coefficients(noisy, timesteps)
        return (noisy - noise * prediction) / signal.clamp(min=_LEAST_SIGNAL)

    def _x0_error(self, snr: Tensor) -> Tensor:
        return snr


class VelocityParameterization(DiffusionParameterization):
    """The denoiser predicts v = a_t noise - s_t x_0 (arXiv 2202.00512, App. D)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.get_velocity(latents, noise, timesteps)

    def to_x0(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        signal, noise = self._coefficients(noisy, timesteps)
        return signal * noisy - noise * prediction

    def _x0_error(self, snr: Tensor) -> Tensor:
        return snr + 1


class SampleParameterization(DiffusionParameterization):
    """The denoiser predicts x_0."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return latents

    def to_x0(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return prediction

    def _x0_error(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)


class FlowParameterization(Parameterization):
    """Rectified flow (arXiv 2209.03003, Eq. 1; 2403.03206, Eq. 13): x_t = (1 - t) x_0 + t noise, and the denoiser
    predicts noise - x_0. It reads t times `num_timesteps`; `shift` moves the time steps towards noise (2403.03206,
    Eq. 23)."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        # A dynamic shift depends on the size of each image, and sampling applies it.
        self.shift = 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))

    @property
    def description(self) -> str:
        return "flow" if self.shift == 1 else f"flow, shifted by {self.shift:g}"

    def signal_power(self, timesteps: Tensor) -> Tensor:
        return (1 - timesteps.float() / self.num_timesteps).square()

    def noise_power(self, timesteps: Tensor) -> Tensor:
        return (timesteps.float() / self.num_timesteps).square()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        time = self._time(latents, timesteps)
        return (1 - time) * latents + time * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def to_x0(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        return noisy - self._time(noisy, timesteps) * prediction

    def sample_timesteps(
        self,
        count: int,
        generator: torch.Generator,
        sampling: TimestepSampling = "uniform",
        min_fraction: float = 0.0,
    ) -> Tensor:
        places = _stratified(count, generator)
        if sampling == "uniform_angle":
            least = math.atan2(min_fraction, 1 - min_fraction)
            tangents = (least + places * (math.pi / 2 - least)).tan()
            times = tangents / (1 + tangents)
        else:
            first = min_fraction / (self.shift - (self.shift - 1) * min_fraction)  # before the shift
            unshifted = first + places * (1 - first)
            times = self.shift * unshifted / (1 + (self.shift - 1) * unshifted)
        return times * self.num_timesteps

    def _x0_error(self, snr: Tensor) -> Tensor:
        return (1 + snr.sqrt()).square()  # 1 / t^2

    def _time(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """t, to be multiplied with latents like these."""
        return (timesteps.to(latents.device).float() / self.num_timesteps).to(latents.dtype).view(-1, 1, 1, 1)


_DIFFUSION: dict[str, type[DiffusionParameterization]] = {
    "epsilon": EpsilonParameterization,
    "v_prediction": VelocityParameterization,
    "sample": SampleParameterization,
}
_FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


def parameterization_of(scheduler: Any) -> Parameterization:
    """Return what a pipeline's scheduler says of its denoiser.

    Raises:
        AsdmError: its noise levels are neither a DDPM's nor flow matching's (EDM's, of Playground v2.5).
    """
    config = scheduler.config
    if isinstance(scheduler, _FLOW_SCHEDULERS):
        return FlowParameterization(config)
    if config.get("prediction_type") == "flow_prediction":
        return FlowParameterization({**config, "shift": config.get("flow_shift", 1.0)})
    reads_log_sigma = config.get("timestep_type") == "continuous"
    if reads_log_sigma or not {"beta_schedule", "trained_betas"} & config.keys():
        raise AsdmError(
            f"{type(scheduler).__name__}: its noise levels are not those of Stable Diffusion's training; use "
            "a checkpoint with a DDPM's schedule"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in _DIFFUSION:
        allowed = ", ".join(_DIFFUSION)
        raise AsdmError(f"prediction_type={kind}: must be one of {allowed}; correct the scheduler's config")
    return _DIFFUSION[kind](config)


def noise_level(scheduler: Any, timestep: float) -> float:
    """Sigma, noise over signal, at a time step (interpolated for one that is not whole); the time step itself for
    schedulers without cumulative alphas. Features are nearer to linear in sigma than in the time step."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return timestep
    below = min(max(int(timestep), 0), len(alphas) - 1)
    above = min(below + 1, len(alphas) - 1)
    sigmas = [math.sqrt((1 - alpha) / max(alpha, 1e-6)) for alpha in (float(alphas[below]), float(alphas[above]))]
    return sigmas[0] + min(max(timestep - below, 0.0), 1.0) * (sigmas[1] - sigmas[0])


def _stratified(count: int, generator: torch.Generator) -> Tensor:
    """Places (count,) in [0, 1), one in each of `count` equal parts, in random order."""
    return (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
