"""Few-step students: latent consistency distillation (LCM, arXiv 2310.04378), and the scheduler that samples them.

A consistency function maps a latent at any time step to the x_0 where its guided trajectory ends. The student learns
to return for a time step what it returns for the one before, to which the teacher's solver leads; or what the solver
itself reaches in some steps, which costs more calls of the teacher and takes far fewer steps of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import LCMScheduler
from torch import Tensor

from asdm import checks
from asdm.diffusion.parameterization import DiffusionParameterization, Parameterization
from asdm.distillation.losses import pseudo_huber, squared_error
from asdm.distillation.stages import Stage
from asdm.distillation.teaching import WHOLE, Batch, Noised, TeachingTask
from asdm.distillation.training_set import TrainingSet
from asdm.errors import AsdmError
from asdm.families import Denoiser
from asdm.training.task import BatchSlice

SPACING = 1.5  # exponent of the places of the solver's steps on the way to the end
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


@checks.arguments(config=checks.a(Mapping), solver_steps=checks.whole())
def lcm_scheduler(config: Mapping[str, Any], solver_steps: int) -> LCMScheduler:
    """Return the sampler of a consistency-distilled student: the noise schedule and the prediction type of the
    teacher's scheduler, whose `config` is given; its time steps are among the `solver_steps` that were trained.

    Raises:
        AsdmError: more solver steps than the schedule has time steps.
    """
    total = config.get("num_train_timesteps", 1000)
    if solver_steps > total:
        raise AsdmError(f"solver_steps={solver_steps}: the schedule has {total} time steps; give as many at most")
    kept = {name: config[name] for name in _NOISE_SCHEDULE if name in config}
    # The offset, which this scheduler does not read, is what Stable Diffusion pipelines ask for with a warning.
    return LCMScheduler(original_inference_steps=solver_steps, steps_offset=1, **kept)


def ddim_step(
    parameterization: Parameterization, prediction: Tensor, noisy: Tensor, timesteps: Tensor, earlier: Tensor
) -> Tensor:
    """Return latents (batch, channels, h, w) at time steps `earlier` (batch,), from a prediction for `noisy` at
    `timesteps` (DDIM, arXiv 2010.02502, Eq. 12, without noise)."""
    original = parameterization.to_x0(prediction, noisy, timesteps)
    here, there = (_powers(parameterization, steps) for steps in (timesteps, earlier))
    noise = (noisy - here.signal.sqrt() * original) / here.noise.sqrt()
    return there.signal.sqrt() * original + there.noise.sqrt() * noise


def consistent_original(sampler: LCMScheduler, original: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Return the consistency function (batch, channels, h, w) of an x_0 estimate `original`: c_skip x_t + c_out x_0,
    which is x_t itself at time step 0 (LCM, Sec. 4.1)."""
    scalings = sampler.get_scalings_for_boundary_condition_discrete(timesteps)
    c_skip, c_out = (scaling.view(-1, 1, 1, 1) for scaling in scalings)
    return c_skip * noisy + c_out * original


class _Powers(NamedTuple):
    """Squares (batch, 1, 1, 1) of the signal's and the noise's coefficient."""

    signal: Tensor
    noise: Tensor


def _powers(parameterization: Parameterization, timesteps: Tensor) -> _Powers:
    signal, noise = parameterization.signal_power(timesteps), parameterization.noise_power(timesteps)
    return _Powers(signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1))


class ConsistencyTask(TeachingTask):
    """Latent consistency distillation with skipping steps (LCM, Sec. 4.3) and a fixed guidance scale, which the student
    takes over: its samples need no guidance, hence one branch a step.

    The target is the student itself without gradient, as in LCM-LoRA (arXiv 2311.05556) and after arXiv 2310.14189,
    Sec. 3.2, not an average of its past: no third network, and nothing more to resume.

    Raises:
        AsdmError: more solver steps than the schedule has time steps, or a teacher of flow matching.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        parameterization: Parameterization,
        examples: TrainingSet,
        stage: Stage,
        guidance_scale: float,
    ):
        super().__init__(teacher, student, parameterization, examples, stage)
        if not isinstance(parameterization, DiffusionParameterization):
            raise AsdmError(
                f"stage {stage.name}: LCM samples by a DDPM's schedule, and the teacher predicts "
                f"{parameterization.description}; use scope joint"
            )
        total, solver_steps = parameterization.num_timesteps, stage.consistency.solver_steps
        self.guidance_scale = guidance_scale
        self.sampler = lcm_scheduler(parameterization.config, solver_steps)
        self.skipped = total // solver_steps
        self.sampler.set_timesteps(stage.consistency.student_steps or solver_steps)
        self.visited = self.sampler.timesteps.cpu().flip(0)  # rising, as the sampled ones are

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Time steps (count,) that the solver stops at, or the sampler visits, as `LCMScheduler` counts them."""
        sampled = super().timesteps(count, generator)
        return self.visited[sampled * len(self.visited) // self.parameterization.num_timesteps]

    def forward(self, batch: Batch, generator: torch.Generator, part: BatchSlice = WHOLE) -> dict[str, Tensor]:
        settings = self.stage.consistency
        noised = self.noised(batch[0], generator, part)
        estimate = self._consistent(noised)
        with torch.no_grad():
            target = self._end(noised) if settings.teacher_steps else self._consistent(self._solved(noised))
        if settings.loss == "huber":
            loss = pseudo_huber(estimate, target, settings.huber_c)
        else:
            loss = squared_error(estimate, target)
        return {"loss": loss, "consistency": loss}

    def _consistent(self, noised: Noised) -> Tensor:
        noise_pred = self.student_pred(noised).float()
        original = self.parameterization.to_x0(noise_pred, noised.noisy, noised.timesteps)
        return consistent_original(self.sampler, original, noised.noisy, noised.timesteps)

    def _solved(self, noised: Noised) -> Noised:
        """One step of the teacher's guided solver further (LCM, Sec. 4.2)."""
        earlier = (noised.timesteps - self.skipped).clamp(min=0)
        noisy = ddim_step(self.parameterization, self._guided(noised), noised.noisy, noised.timesteps, earlier)
        return replace(noised, noisy=noisy, timesteps=earlier)

    def _end(self, noised: Noised) -> Tensor:
        """Return the x_0 (batch, channels, h, w) that the teacher's guided solver reaches in `teacher_steps`, which
        are denser at low noise: DPM-Solver++ of second order (arXiv 2211.01095, Algorithm 2)."""
        count = self.stage.consistency.teacher_steps
        places = [(noised.timesteps * (left / count) ** SPACING).long() for left in range(count, 0, -1)]
        powers = [_powers(self.parameterization, place) for place in places]
        logs = [(power.signal / power.noise).log() / 2 for power in powers]
        estimates: list[Tensor] = []
        for step, timesteps in enumerate(places):
            noised = replace(noised, timesteps=timesteps)
            estimates.append(self.parameterization.to_x0(self._guided(noised), noised.noisy, timesteps))
            if step + 1 == count:
                break
            further, before = logs[step + 1] - logs[step], logs[step] - logs[max(step - 1, 0)]
            slope = torch.where(before > 0, further / (2 * before), 0.0)
            estimate = estimates[-1] + slope * (estimates[-1] - estimates[max(step - 1, 0)])
            here, there = powers[step], powers[step + 1]
            kept = (there.noise / here.noise).sqrt()
            noisy = kept * noised.noisy + (there.signal.sqrt() - kept * here.signal.sqrt()) * estimate
            noised = replace(noised, noisy=noisy)
        return estimates[-1]

    def _guided(self, noised: Noised) -> Tensor:
        return self.guided_teacher_pred(noised, self.guidance_scale)
