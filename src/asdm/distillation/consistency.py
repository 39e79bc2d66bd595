"""Few-step students: latent consistency distillation (LCM, arXiv 2310.04378), and the scheduler that samples them.

A consistency function maps a latent at any time step to the x0 where its guided trajectory ends. The student learns to
give for a time step what it gives for the one before, to which the teacher's solver leads; or what the solver itself
comes to in some steps, which costs more calls of the teacher and takes far fewer steps of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler, LCMScheduler, UNet2DConditionModel
from torch import Tensor

from asdm import checks
from asdm.diffusion.conditioning import predicted_original
from asdm.distillation.losses import pseudo_huber, squared_error
from asdm.distillation.stages import Stage
from asdm.distillation.teaching import WHOLE, Batch, Noised, TeachingTask, TrainingSet
from asdm.errors import AsdmError
from asdm.training.loop import BatchSlice

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
    """The sampler of a consistency-distilled student: the noise schedule and the prediction type of the teacher's
    scheduler, whose `config` is given; its time steps are among the `solver_steps` that were trained.

    Raises:
        AsdmError: more solver steps than the schedule has time steps.
    """
    total = config.get("num_train_timesteps", 1000)
    if solver_steps > total:
        raise AsdmError(f"solver_steps={solver_steps}: the schedule has {total} time steps; give as many at most")
    kept = {name: config[name] for name in _NOISE_SCHEDULE if name in config}
    # The offset, which this scheduler does not read, is what Stable Diffusion pipelines ask for with a warning.
    return LCMScheduler(original_inference_steps=solver_steps, steps_offset=1, **kept)


def ddim_step(schedule: DDPMScheduler, noise_pred: Tensor, noisy: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
    """Latents (batch, 4, h, w) at time steps `earlier` (batch,), from a prediction for `noisy` at `timesteps`
    (DDIM, arXiv 2010.02502, Eq. 12, without noise)."""
    alphas = schedule.alphas_cumprod.to(noisy.device)
    here, there = (alphas[t].view(-1, 1, 1, 1) for t in (timesteps, earlier))
    original = predicted_original(schedule, noise_pred, noisy, timesteps)
    noise = (noisy - here.sqrt() * original) / (1 - here).sqrt()
    return there.sqrt() * original + (1 - there).sqrt() * noise


def consistent_original(sampler: LCMScheduler, noise_pred: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """The consistency function (batch, 4, h, w): c_skip x_t + c_out x0, x_t itself at time step 0 (LCM, Sec. 4.1)."""
    scalings = sampler.get_scalings_for_boundary_condition_discrete(timesteps)
    c_skip, c_out = (scaling.view(-1, 1, 1, 1) for scaling in scalings)
    return c_skip * noisy + c_out * predicted_original(sampler, noise_pred, noisy, timesteps)


class ConsistencyTask(TeachingTask):
    """Latent consistency distillation with skipping steps (LCM, Sec. 4.3) and a fixed guidance scale, which the student
    takes over: its samples need no guidance, hence one branch a step.

    The target is the student itself without gradient, as in LCM-LoRA (arXiv 2311.05556) and after arXiv 2310.14189,
    Sec. 3.2, not an average of its past: no third network, and nothing more to resume.

    Raises:
        AsdmError: more solver steps than the schedule has time steps.
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        schedule: DDPMScheduler,
        examples: TrainingSet,
        stage: Stage,
        guidance_scale: float,
    ):
        super().__init__(teacher, student, schedule, examples, stage)
        total, solver_steps = schedule.config.num_train_timesteps, stage.consistency.solver_steps
        self.guidance_scale = guidance_scale
        self.sampler = lcm_scheduler(schedule.config, solver_steps)
        self.skipped = total // solver_steps
        self.sampler.set_timesteps(stage.consistency.student_steps or solver_steps)
        self.visited = self.sampler.timesteps.cpu().flip(0)  # rising, as what is drawn

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Of those that the solver stops at, or the sampler visits, as `LCMScheduler` counts them."""
        drawn = super().timesteps(count, generator)
        return self.visited[drawn * len(self.visited) // self.schedule.config.num_train_timesteps]

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
        return consistent_original(self.sampler, noise_pred, noised.noisy, noised.timesteps)

    def _solved(self, noised: Noised) -> Noised:
        """One step of the teacher's guided solver further (LCM, Sec. 4.2)."""
        earlier = (noised.timesteps - self.skipped).clamp(min=0)
        noisy = ddim_step(self.schedule, self._guided(noised), noised.noisy, noised.timesteps, earlier)
        return replace(noised, noisy=noisy, timesteps=earlier)

    def _end(self, noised: Noised) -> Tensor:
        """The x0 (batch, 4, h, w) that the teacher's guided solver comes to in `teacher_steps`, which are denser where
        there is little noise: DPM-Solver++ of second order (arXiv 2211.01095, Algorithm 2)."""
        alphas = self.schedule.alphas_cumprod.to(noised.noisy.device)
        count = self.stage.consistency.teacher_steps
        places = [(noised.timesteps * (left / count) ** SPACING).long() for left in range(count, 0, -1)]
        logs = [(alphas[place] / (1 - alphas[place])).log().view(-1, 1, 1, 1) / 2 for place in places]
        estimates: list[Tensor] = []
        for step, timesteps in enumerate(places):
            noised = replace(noised, timesteps=timesteps)
            estimates.append(predicted_original(self.schedule, self._guided(noised), noised.noisy, timesteps))
            if step + 1 == count:
                break
            further, before = logs[step + 1] - logs[step], logs[step] - logs[max(step - 1, 0)]
            slope = torch.where(before > 0, further / (2 * before), 0.0)
            estimate = estimates[-1] + slope * (estimates[-1] - estimates[max(step - 1, 0)])
            here, there = (alphas[place].view(-1, 1, 1, 1) for place in (timesteps, places[step + 1]))
            kept = ((1 - there) / (1 - here)).sqrt()
            noised = replace(noised, noisy=kept * noised.noisy + (there.sqrt() - kept * here.sqrt()) * estimate)
        return estimates[-1]

    def _guided(self, noised: Noised) -> Tensor:
        """The teacher's guided prediction (batch, 4, h, w), both branches in one call; one that embeds the scale needs
        no second branch."""
        if self.embeds_guidance:
            return self.teacher_pred(noised).float()
        count = len(noised.noisy)
        rows = torch.arange(count, device=noised.noisy.device).repeat(2)
        with_text = torch.arange(2 * count, device=rows.device) < count
        empty = self.examples.empty_caption.to(rows.device, torch.float32)
        both = replace(
            noised,
            noisy=noised.noisy[rows],
            timesteps=noised.timesteps[rows],
            captions=noised.captions[rows].where(with_text, empty),
        )
        conditional, unconditional = self.teacher_pred(both).float().chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
