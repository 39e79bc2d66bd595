"""A student learns to sample in a few steps without guidance, and its folder says so to whoever loads it."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, LCMScheduler
from typer.testing import CliRunner

from asdm import AsdmError, PruningPlan, Stage, build_student, distill, generate, load_pipeline, save_pipeline
from asdm.cli import app
from asdm.diffusion.generation import default_guidance, default_steps
from asdm.diffusion.parameterization import parameterization_of
from asdm.distillation.consistency import ConsistencyTask, consistent_original, ddim_step, lcm_scheduler
from asdm.distillation.pipelines import distill_pipeline
from asdm.distillation.recipes import recipe_stages
from asdm.distillation.stages import Consistency, parse_stages
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import prepare
from asdm.training.task import BatchSlice
from conftest import tiny_inpainting_pipeline, tiny_pipeline, tiny_sdxl_pipeline, tiny_unet

KINDS = ("epsilon", "v_prediction", "sample")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stage(**changes):
    settings = {"name": "lcm", "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0, "caption_dropout": 0}
    return Stage(**{**settings, "scope": "consistency", **changes})


def pruned(unet):
    return build_student(unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block.resnets.1"}]))


def noisy_and_prediction(batch=1):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, 4, 8, 8, generator=generator) for _ in range(2))


def consistent(sampler, noise_pred, noisy, timesteps):
    original = parameterization_of(sampler).to_x0(noise_pred, noisy, timesteps)
    return consistent_original(sampler, original, noisy, timesteps)


def task_of(pipeline, student, folder, tmp_path, **changes):
    examples = prepare(pipeline, folder, tmp_path / "prepared")
    return make_task(pipeline, student, examples, stage(**changes))


def calls(module):
    """The batch sizes that a UNet is called with from now on."""
    sizes = []
    module.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(len(kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_the_consistency_function_is_the_identity_at_time_step_0(kind):
    noisy, noise_pred = noisy_and_prediction()
    sampler = LCMScheduler(**BETAS, prediction_type=kind)
    assert torch.equal(consistent(sampler, noise_pred, noisy, torch.tensor([0])), noisy)
    later = consistent(sampler, noise_pred, noisy, torch.tensor([19]))
    assert not torch.allclose(later, noisy, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_the_sampler_evaluates(kind):
    noisy, noise_pred = noisy_and_prediction()
    teachers = DPMSolverMultistepScheduler(**BETAS, prediction_type=kind, num_train_timesteps=1000)
    sampler = lcm_scheduler(teachers.config, 50)
    sampler.set_timesteps(4)
    for timestep in sampler.timesteps:
        expected = sampler.step(noise_pred, timestep, noisy).denoised
        assert torch.allclose(consistent(sampler, noise_pred, noisy, timestep.view(1)), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_solvers_step_is_ddims(kind):
    noisy, noise_pred = noisy_and_prediction(batch=3)
    parameterization = parameterization_of(DDPMScheduler(**BETAS, prediction_type=kind))
    ddim = DDIMScheduler(**BETAS, prediction_type=kind, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(50)
    timesteps = torch.tensor([999, 499, 19])
    stepped = ddim_step(parameterization, noise_pred, noisy, timesteps, (timesteps - 20).clamp(min=0))
    for row, timestep in enumerate(timesteps):
        one = slice(row, row + 1)
        expected = ddim.step(noise_pred[one], timestep, noisy[one]).prev_sample
        assert torch.allclose(stepped[one], expected, rtol=1e-4, atol=1e-4)


def test_training_above_a_time_step_visits_those_of_the_sampler_there(pipeline, data_folder, tmp_path):
    task = task_of(pipeline, tiny_unet(), data_folder, tmp_path, min_timestep_fraction=0.5)
    visited = {int(t) for seed in range(20) for t in task.timesteps(64, torch.Generator().manual_seed(seed))}
    assert visited == {t for t in task.sampler.timesteps.tolist() if t >= 500}


@pytest.mark.parametrize(("solver_steps", "student_steps"), [(50, 0), (30, 0), (50, 4)])
def test_training_visits_the_time_steps_of_the_sampler(pipeline, data_folder, tmp_path, solver_steps, student_steps):
    settings = Consistency(solver_steps=solver_steps, student_steps=student_steps)
    task = task_of(pipeline, tiny_unet(), data_folder, tmp_path, consistency=settings)
    task.sampler.set_timesteps(student_steps or solver_steps)
    visited = {int(t) for seed in range(20) for t in task.timesteps(64, torch.Generator().manual_seed(seed))}
    assert visited == set(task.sampler.timesteps.tolist())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_reach_the_student_and_nothing_else(pipeline, data_folder, tmp_path, precision):
    student = pruned(pipeline.unet)
    task = task_of(pipeline, student, data_folder, tmp_path)
    assert isinstance(task, ConsistencyTask)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses = task((torch.arange(4), 0), torch.Generator().manual_seed(0))
    losses["loss"].backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    assert student.conv_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pipeline.unet.parameters())


def test_the_target_has_no_gradient(pipeline, data_folder, tmp_path):
    """As if the target were given: the gradient is that of the student's first call alone."""
    student = pruned(pipeline.unet)
    task = task_of(pipeline, student, data_folder, tmp_path, consistency=Consistency(loss="l2"))
    with_grad = []
    student.register_forward_hook(lambda *_: with_grad.append(torch.is_grad_enabled()))
    task((torch.arange(4), 0), torch.Generator().manual_seed(0))
    assert with_grad == [True, False]


def test_the_teacher_is_guided_in_one_call(pipeline, data_folder, tmp_path):
    task = task_of(pipeline, tiny_unet(), data_folder, tmp_path, guidance_scale=3)
    noised = task.noised(torch.arange(2), torch.Generator().manual_seed(0), BatchSlice())
    with torch.no_grad():
        conditional = task.teacher_pred(noised)
        empty = replace(noised, captions=task.examples.empty_caption[[0, 0]].to(torch.float32))
        unconditional = task.teacher_pred(empty)
        sizes = calls(pipeline.unet)
        solved = task._solved(noised)
    assert sizes == [4]
    guided = unconditional + 3 * (conditional - unconditional)
    earlier = noised.timesteps - 20
    assert torch.equal(solved.timesteps, earlier.clamp(min=0))
    expected = ddim_step(task.parameterization, guided, noised.noisy, noised.timesteps, solved.timesteps)
    assert torch.allclose(solved.noisy, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_teacher_steps_the_target_is_where_dpm_solver_comes_to(data_folder, tmp_path, kind):
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    student = pruned(pipeline.unet)
    task = task_of(pipeline, student, data_folder, tmp_path, consistency=Consistency(teacher_steps=4))
    noised = task.noised(torch.arange(2), torch.Generator().manual_seed(0), BatchSlice())
    noised = replace(noised, timesteps=torch.tensor([999, 999]))
    solver = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, final_sigmas_type="zero")
    solver.set_timesteps(timesteps=[999, 648, 353, 124])
    noisy = noised.noisy
    with torch.no_grad():
        for timestep in solver.timesteps:
            guided = task._guided(replace(noised, noisy=noisy, timesteps=timestep.repeat(2)))
            noisy = solver.step(guided, timestep, noisy).prev_sample
        assert torch.allclose(task._end(noised), noisy, rtol=1e-3, atol=1e-3)
        sizes = calls(student)
        task((torch.arange(4), 0), torch.Generator().manual_seed(0))
    assert sizes == [4]  # its own estimate is no target


def test_the_guidance_that_is_taken_over_is_the_teachers_usual_one(pipeline, data_folder, tmp_path):
    assert task_of(pipeline, tiny_unet(), data_folder, tmp_path).guidance_scale == default_guidance(pipeline) == 3
    assert task_of(pipeline, tiny_unet(), data_folder, tmp_path, guidance_scale=2).guidance_scale == 2


@pytest.mark.parametrize("make", [tiny_sdxl_pipeline, tiny_inpainting_pipeline])
def test_other_families_learn_it_too(data_folder, tmp_path, make):
    pipeline = make()
    rows = []
    distill(pipeline, make().unet, data_folder, tmp_path / "run", stages=[stage(steps=1)], progress=rows.append)
    assert 0 < rows[0]["loss"] < 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_loss(data_folder, tmp_path, kind):
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    task = task_of(pipeline, pruned(pipeline.unet), data_folder, tmp_path)
    optimizer = torch.optim.Adam(task.trained().values(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = task((torch.arange(4), 0), torch.Generator().manual_seed(0))["loss"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


def test_settings_out_of_range_are_told(pipeline, data_folder, tmp_path):
    with pytest.raises(AsdmError, match="solver_steps=1001: the schedule has 1000 time steps"):
        task_of(pipeline, tiny_unet(), data_folder, tmp_path, consistency=Consistency(solver_steps=1001))
    with pytest.raises(AsdmError, match="student_steps=51: more than solver_steps=50"):
        task_of(pipeline, tiny_unet(), data_folder, tmp_path, consistency=Consistency(student_steps=51))
    with pytest.raises(AsdmError, match="student_blocks goes with scope joint"):
        parse_stages([{"name": "a", "steps": 3, "scope": "consistency", "student_blocks": ["mid_block"]}])
    with pytest.raises(AsdmError, match=r"consistency\.loss='l1'"):
        parse_stages([{"name": "a", "steps": 3, "scope": "consistency", "consistency": {"loss": "l1"}}])


def test_the_recipe_is_one_stage_without_dropped_captions():
    (chosen,) = recipe_stages("lcm", tiny_unet(), 200)
    assert (chosen.scope, chosen.steps, chosen.caption_dropout) == ("consistency", 200, 0)


@pytest.mark.slow
def test_a_distilled_folder_draws_in_4_steps_without_guidance(data_folder, tmp_path):
    teacher = tiny_pipeline()
    teacher.scheduler = DPMSolverMultistepScheduler(**{**BETAS, "beta_end": 0.011}, prediction_type="v_prediction")
    model = save_pipeline(teacher, tmp_path / "model")
    (tmp_path / "recipe.json").write_text(json.dumps([stage(steps=2).model_dump(mode="json")]))
    arguments = ["distill", model, model, "--data", data_folder, "--out", tmp_path / "lcm"]
    told = CliRunner().invoke(app, [str(a) for a in [*arguments, "--recipe", tmp_path / "recipe.json"]])
    import traceback

    traceback.print_exception(*told.exc_info)
    assert told.exit_code == 0, told.output
    index = json.loads((tmp_path / "lcm" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]

    pipeline = load_pipeline(tmp_path / "lcm")
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.beta_end, config.original_inference_steps) == ("v_prediction", 0.011, 50)
    assert (default_steps(pipeline), default_guidance(pipeline)) == (4, 1)
    sizes = calls(pipeline.unet)
    images = generate(pipeline, ["pear"])
    assert sizes == [1] * 4
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()
    told = CliRunner().invoke(app, ["generate", str(tmp_path / "lcm"), "pear", "--out", str(tmp_path / "drawn")])
    assert told.exit_code == 0 and (tmp_path / "drawn" / "pear.png").is_file()


def test_a_few_step_student_that_is_distilled_again_samples_by_its_teachers_scheduler(pipeline, data_folder, tmp_path):
    student = tiny_pipeline()
    student.scheduler = lcm_scheduler(pipeline.scheduler.config, 50)
    joint = Stage(name="joint", steps=1, batch_size=2)
    distill_pipeline(pipeline, student, data_folder, tmp_path / "run", stages=[joint])
    assert type(student.scheduler) is DDIMScheduler and student.scheduler.config == pipeline.scheduler.config
    assert (default_steps(student), default_guidance(student)) == (25, 3)


def test_other_pipelines_keep_25_steps_with_guidance(pipeline):
    assert (default_steps(pipeline), default_guidance(pipeline)) == (25, 3)
    sizes = calls(pipeline.unet)
    generate(pipeline, ["pear"])
    assert sizes == [2] * 25
