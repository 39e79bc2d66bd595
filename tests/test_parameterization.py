"""Epsilon, v, x_0 and flow matching behind one interface; flow matching as diffusers' scheduler samples it."""

import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from asdm import AsdmError
from asdm.diffusion.parameterization import noise_level, parameterization_of

DIFFUSION = ("epsilon", "v_prediction", "sample")
SCHEDULERS = {
    **{kind: DDPMScheduler(prediction_type=kind) for kind in DIFFUSION},
    "flow": FlowMatchEulerDiscreteScheduler(),
    "shifted flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def generator():
    return torch.Generator().manual_seed(0)


def latents_and_noise(count=3):
    return torch.randn(2, count, 4, 8, 8, generator=generator())


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_original_is_estimated_from_any_prediction(kind):
    found = parameterization_of(SCHEDULERS[kind])
    latents, noise = latents_and_noise()
    timesteps = torch.tensor([10, 500, 900])
    noisy = found.add_noise(latents, noise, timesteps)
    target = found.target(latents, noise, timesteps)
    torch.testing.assert_close(found.to_x0(target, noisy, timesteps), latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_signal_and_noise_are_what_the_noisy_latents_consist_of(kind):
    found = parameterization_of(SCHEDULERS[kind])
    latents, noise = latents_and_noise()
    timesteps = torch.tensor([10, 500, 900])
    signal, added = (power(timesteps).sqrt().view(-1, 1, 1, 1) for power in (found.signal_power, found.noise_power))
    torch.testing.assert_close(found.add_noise(latents, noise, timesteps), signal * latents + added * noise)
    torch.testing.assert_close(found.sigma(timesteps), (added / signal).flatten())


@pytest.mark.parametrize("kind", DIFFUSION)
def test_a_schedule_of_ddpm_is_diffusers_own(kind):
    scheduler = SCHEDULERS[kind]
    found = parameterization_of(scheduler)
    latents, noise = latents_and_noise()
    timesteps = torch.tensor([0, 500, 999])
    assert torch.equal(found.add_noise(latents, noise, timesteps), scheduler.add_noise(latents, noise, timesteps))
    if kind == "v_prediction":
        expected = scheduler.get_velocity(latents, noise, timesteps)
        assert torch.equal(found.target(latents, noise, timesteps), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_what_its_scheduler_samples(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    found = parameterization_of(scheduler)
    latents, noise = latents_and_noise(count=1)
    scheduler.set_timesteps(8)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        time = timestep.view(1)
        assert found.noise_power(time).sqrt() == pytest.approx(float(sigma), rel=1e-5)
        noisy = found.add_noise(latents, noise, time)
        torch.testing.assert_close(noisy, scheduler.scale_noise(latents, time, noise))
    # One step along the velocity, from any time to the end, comes to the original.
    scheduler.set_timesteps(1)
    time = scheduler.timesteps
    noisy = found.add_noise(latents, noise, time)
    velocity = found.target(latents, noise, time)
    torch.testing.assert_close(velocity, noise - latents)
    stepped = scheduler.step(velocity, time[0], noisy).prev_sample
    torch.testing.assert_close(stepped, latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_time_steps_of_flow_are_those_of_its_schedule(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sampled = parameterization_of(scheduler).sample_timesteps(1000, generator()).sort(descending=True).values
    assert (sampled - scheduler.timesteps).abs().max() < 2 * shift


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("sampling", ["uniform", "uniform_angle"])
def test_no_time_step_is_sampled_below_the_least(kind, sampling):
    found = parameterization_of(SCHEDULERS[kind])
    part = found.sample_timesteps(1000, generator(), sampling, min_fraction=0.34)
    assert 340 <= part.min() < 346
    assert 990 <= part.max() < 1000


def test_angles_of_flow_are_even():
    found = parameterization_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    angles = found.sigma(found.sample_timesteps(1000, generator(), "uniform_angle")).atan().sort().values
    assert (angles - torch.linspace(0, math.pi / 2, 1000)).abs().max() < 0.01


def test_the_original_is_finite_where_a_schedule_of_noise_predictions_ends_without_signal():
    found = parameterization_of(DDPMScheduler(rescale_betas_zero_snr=True))
    timesteps = torch.tensor([500, 999])
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = found.add_noise(latents, noise, timesteps)
    assert found.signal_power(timesteps)[1] == 0
    assert found.to_x0(noise + 0.1, noisy, timesteps).isfinite().all()
    torch.testing.assert_close(found.to_x0(noise, noisy, timesteps)[0], latents[0], rtol=1e-3, atol=1e-4)


def test_min_snr_weights_follow_the_paper():
    betas = [0.01, 1 - 0.5 / 0.99, 1 - 0.1 / 0.5, 1.0]
    timesteps = torch.arange(3)

    def weights(kind, at):
        scheduler = DDPMScheduler(trained_betas=betas, num_train_timesteps=4, prediction_type=kind)
        return parameterization_of(scheduler).min_snr_weights(at, 5.0)

    snr = [alpha / (1 - alpha) for alpha in (0.99, 0.5, 0.1)]
    expected = [min(5.0, value) / value for value in snr]
    assert weights("epsilon", timesteps).tolist() == pytest.approx(expected, rel=1e-4)
    expected = [min(5.0, value) / (value + 1) for value in snr]
    assert weights("v_prediction", timesteps).tolist() == pytest.approx(expected, rel=1e-4)
    assert weights("sample", timesteps).tolist() == pytest.approx([min(5.0, value) for value in snr], rel=1e-4)
    assert weights("epsilon", torch.tensor([3])) == 1  # pure noise, where a schedule ends in it


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_min_snr_weighs_the_originals_error_alike_for_any_prediction(kind):
    found = parameterization_of(SCHEDULERS[kind])
    latents, noise = latents_and_noise()
    timesteps = torch.tensor([200, 500, 900])
    noisy, target = found.add_noise(latents, noise, timesteps), found.target(latents, noise, timesteps)
    wrong = found.to_x0(target + 0.1, noisy, timesteps) - latents
    by_original = found.snr(timesteps).clamp(max=5) * wrong.square().flatten(1).mean(1)
    torch.testing.assert_close(found.min_snr_weights(timesteps, 5.0) * 0.1**2, by_original, rtol=1e-3, atol=1e-6)


def test_what_is_written_beside_checkpoints_names_the_prediction_and_the_schedule():
    ends_in_noise = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    found = [parameterization_of(scheduler).description for scheduler in (*SCHEDULERS.values(), ends_in_noise)]
    assert found == [*DIFFUSION, "flow", "flow, shifted by 3", "v_prediction, to zero SNR"]
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)
    assert parameterization_of(solver).description == "flow, shifted by 2"


def test_noise_levels_of_another_process_are_refused():
    for scheduler in (EDMEulerScheduler(), EulerDiscreteScheduler(timestep_type="continuous")):
        with pytest.raises(AsdmError, match=f"{type(scheduler).__name__}: its noise levels are not those"):
            parameterization_of(scheduler)


def test_noise_levels_are_sigmas_between_time_steps_too():
    scheduler = SCHEDULERS["epsilon"]
    sigmas = parameterization_of(scheduler).sigma(torch.tensor([500, 501]))
    assert noise_level(scheduler, 500) == pytest.approx(float(sigmas[0]), rel=1e-5)
    assert noise_level(scheduler, 500.5) == pytest.approx(float(sigmas.mean()), rel=1e-5)
    assert noise_level(FlowMatchEulerDiscreteScheduler(), 250.0) == 250.0
