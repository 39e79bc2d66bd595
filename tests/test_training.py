"""The loop resumes exactly, keeps the last good weights, and a student learns from its teacher."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from asdm import AsdmError, PruningPlan, Stage, build_student, distill, prepare_data
from asdm.data.batches import ShuffledBatches
from asdm.distillation.estimate import estimate
from asdm.distillation.losses import feature_losses, output_loss, relative_error
from asdm.distillation.stages import LossWeights, parse_stages
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import prepare
from asdm.families import denoiser_call
from asdm.families.unet_structure import removable_units
from asdm.measure import machine as runtime
from asdm.measure.hooks import outputs_of
from asdm.measure.latency import Latency
from asdm.measure.machine import fast_training
from asdm.measure.macs import counting_macs
from asdm.measure.memory import peak_megabytes
from asdm.training.checkpoints import TrainingState, checkpoint_step
from asdm.training.launch import make_accelerator
from asdm.training.log import read_log
from asdm.training.loop import LoopSettings, train
from asdm.training.optimizers import make_optimizer
from asdm.training.task import TrainingTask
from conftest import predict, tiny_pipeline, tiny_sdxl_pipeline, tiny_transformer, tiny_unet, unet_inputs


class Regression(TrainingTask):
    """Fit a line through noisy points; the noise is the step's."""

    def __init__(self, fault_at=None, explodes_at=10**9):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.calls, self.fault_at, self.explodes_at = 0, fault_at, explodes_at

    def forward(self, batch, generator):
        self.calls += 1
        noise = torch.randn(batch.shape, generator=generator)
        fit = (self.layer(batch + 0.1 * noise) - self.frozen(batch)).square().mean()
        penalty = self.layer.weight.square().mean()
        if self.calls == self.fault_at:
            penalty = penalty * float("nan")
        if self.calls >= self.explodes_at:
            penalty = penalty * 1e6
        return {"loss": fit + 0.01 * penalty, "fit": fit, "penalty": penalty}


def batch_at(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


SETTINGS = LoopSettings(steps=12, learning_rate=0.05, warmup_steps=3, ema_decay=0.9, checkpoint_every=5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer):
    settings = replace(SETTINGS, optimizer=optimizer)
    whole = Regression()
    assert train(whole, batch_at, settings, tmp_path / "whole")
    interrupted = Regression()

    def stop_at_seven(row):
        if row["step"] == 7:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(interrupted, batch_at, settings, tmp_path / "parts", progress=stop_at_seven)
    assert checkpoint_step(tmp_path / "parts") == 5
    resumed = Regression()
    steps = []
    assert train(resumed, batch_at, settings, tmp_path / "parts", progress=lambda row: steps.append(row["step"]))
    assert steps == list(range(6, 13))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert read_log(tmp_path / "whole" / "log.jsonl") == read_log(tmp_path / "parts" / "log.jsonl")


class WideRegression(Regression):
    """With weights that are large enough to have moments of 8 bits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 1024), nn.Linear(1024, 4))

    def forward(self, batch, generator):
        return {"loss": (self.layer(batch) - self.frozen(batch)).square().mean()}


def test_moments_of_8_bits_are_stored_as_such_and_resumed_exactly(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = replace(SETTINGS, optimizer="adamw8bit", learning_rate=0.01, ema_decay=0.0)
    whole, parts = WideRegression(), WideRegression()
    assert train(whole, batch_at, settings, tmp_path / "whole")
    assert not train(parts, batch_at, settings, tmp_path / "parts", stop_after_seconds=0)
    moments = load_file(tmp_path / "parts" / "checkpoint-0000001" / "optimizer.safetensors")
    assert sum(tensor.dtype == torch.uint8 for tensor in moments.values()) == 4
    resumed = WideRegression()
    assert train(resumed, batch_at, settings, tmp_path / "parts")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_finished_run_is_not_run_again(tmp_path):
    first, second = Regression(), Regression()
    train(first, batch_at, SETTINGS, tmp_path)
    train(second, batch_at, SETTINGS, tmp_path)
    assert second.calls == 0
    assert torch.equal(first.layer.weight, second.layer.weight)


def test_only_what_needs_a_gradient_is_trained_and_stored(tmp_path):
    task = Regression()
    frozen = task.frozen.weight.clone()
    train(task, batch_at, SETTINGS, tmp_path)
    assert torch.equal(task.frozen.weight, frozen)
    stored = load_file(tmp_path / "checkpoint-0000012" / "weights.safetensors")
    assert set(stored) == {"layer.weight", "layer.bias"}


def test_a_loss_that_is_not_finite_stops_with_its_name_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(AsdmError, match="penalty is not finite at step 8"):
        train(Regression(fault_at=8), batch_at, SETTINGS, tmp_path)
    assert checkpoint_step(tmp_path) == 5
    weights = load_file(tmp_path / "checkpoint-0000005" / "weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize(
    ("fault_at", "message"), [(1, "step 1: the weights or the data hold"), (3, "no checkpoint was")]
)
def test_a_run_that_has_nothing_to_fall_back_to_says_so(tmp_path, fault_at, message):
    with pytest.raises(AsdmError, match=message):
        train(Regression(fault_at=fault_at), batch_at, SETTINGS, tmp_path)


def test_a_student_that_begins_as_its_teacher_does_not_explode(tmp_path):
    class FromZero(Regression):
        def forward(self, batch, generator):
            losses = super().forward(batch, generator)
            return losses | {"loss": losses["loss"] * (0 if self.calls < 2 else 1e-4)}

    assert train(FromZero(), batch_at, SETTINGS, tmp_path)


def test_a_loss_that_explodes_stops_with_its_name_before_bad_weights_are_kept(tmp_path):
    with pytest.raises(AsdmError, match=r"penalty explodes \(the loss is .* and was .*\) at step 11"):
        train(Regression(explodes_at=9), batch_at, SETTINGS, tmp_path)
    assert checkpoint_step(tmp_path) == 5  # and not 10
    with pytest.raises(AsdmError, match=r"penalty explodes .* at step 12"):
        train(Regression(explodes_at=12), batch_at, SETTINGS, tmp_path / "last")


@pytest.mark.parametrize("fault", [{"fault_at": 11}, {"explodes_at": 11}])
def test_a_checkpoint_is_kept_once_a_loss_has_judged_it(tmp_path, fault):
    """What ruins the weights may be the step before the tenth is saved."""
    with pytest.raises(AsdmError, match="penalty"):
        train(Regression(**fault), batch_at, SETTINGS, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000005"]


def test_a_checkpoint_that_was_not_judged_when_the_run_was_killed_is_judged_then(tmp_path):
    def kill(row):
        if row["step"] == 10:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(Regression(), batch_at, SETTINGS, tmp_path, progress=kill)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    with pytest.raises(AsdmError, match="penalty"):
        train(Regression(fault_at=1), batch_at, SETTINGS, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-0000005"]


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    class Rootless(Regression):
        def forward(self, batch, generator):
            losses = super().forward(batch, generator)
            if self.calls == 7:  # the root's derivative at 0 is infinite
                losses["loss"] = losses["loss"] + (0 * self.layer.weight).abs().sum().sqrt()
            return losses

    task = Rootless()
    with pytest.raises(AsdmError, match="the gradient is not finite at step 7"):
        train(task, batch_at, SETTINGS, tmp_path)
    assert torch.isfinite(task.layer.weight).all() and checkpoint_step(tmp_path) == 5


class Overflowing(Regression):
    """The gradient of these calls is not finite, although the loss is."""

    def __init__(self, calls):
        super().__init__()
        self.overflowing = calls

    def forward(self, batch, generator):
        losses = super().forward(batch, generator)
        if self.calls in self.overflowing:
            losses["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return losses


def train_with_loss_scale(task, settings, folder):
    accelerator = make_accelerator("cpu")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return train(task, batch_at, settings, folder, accelerator=accelerator)


@pytest.mark.parametrize(
    ("first", "steps", "stopped_at", "newest"),
    [
        (1, 40, 17, 0),  # the scale is 1 after sixteen steps
        (7, 40, 23, 5),
        (1, 12, 12, 0),
        (1, 2, 2, 0),
        (10, 12, 12, 10),
    ],
)
def test_float16_whose_gradient_stays_infinite_stops(tmp_path, first, steps, stopped_at, newest):
    task = Overflowing(range(first, 99))
    with pytest.raises(AsdmError, match=rf"float16 is not finite \(.*\) at step {stopped_at};.* mixed_precision bf16"):
        train_with_loss_scale(task, replace(SETTINGS, steps=steps), tmp_path)
    assert task.calls == stopped_at and checkpoint_step(tmp_path) == newest


def test_float16_may_skip_steps_until_its_loss_scale_fits(tmp_path):
    assert train_with_loss_scale(Overflowing([*range(1, 5), 12]), SETTINGS, tmp_path)
    assert checkpoint_step(tmp_path) == SETTINGS.steps


def test_ctrl_c_keeps_no_weights_that_explode(tmp_path):
    def interrupt(row):
        if row["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Regression(explodes_at=6), batch_at, replace(SETTINGS, checkpoint_every=3), tmp_path, progress=interrupt)
    assert checkpoint_step(tmp_path) == 3


def test_the_scale_of_float16s_losses_is_kept(tmp_path):
    def state(scaler):
        layer = nn.Linear(2, 2)
        return TrainingState(dict(layer.named_parameters()), torch.optim.AdamW(layer.parameters()), None, scaler)

    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (2.0**7, 2.0**16)]
    state(scalers[0]).save(tmp_path, 1)
    state(scalers[1]).load_newest(tmp_path)
    assert scalers[1].state_dict() == scalers[0].state_dict()


def test_ctrl_c_saves_the_step_it_was_at(tmp_path):
    def interrupt(row):
        if row["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Regression(), batch_at, SETTINGS, tmp_path, progress=interrupt)
    assert checkpoint_step(tmp_path) == 7


def test_learning_rate_warms_up_and_decays():
    rates = [SETTINGS.learning_rate_at(step) for step in range(12)]
    assert rates[:3] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert SETTINGS.learning_rate_at(12) == pytest.approx(0)


def test_a_learning_rate_may_fall_over_the_last_steps_alone():
    course = {"schedule": "constant_then_linear", "learning_rate": 1e-3, "warmup_steps": 10, "falling_steps": 100}
    short, long = (LoopSettings(steps=steps, **course) for steps in (500, 900))
    assert [short.learning_rate_at(step) for step in range(400)] == [long.learning_rate_at(step) for step in range(400)]
    assert short.learning_rate_at(4) == pytest.approx(5e-4)
    assert short.learning_rate_at(399) == 1e-3
    assert short.learning_rate_at(450) == pytest.approx(5e-4)
    assert short.learning_rate_at(499) == pytest.approx(1e-5)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_training import Regression, batch_at
from asdm.families.unet_structure import removable_units
from asdm.training.loop import LoopSettings, train
settings = LoopSettings(steps=100_000, learning_rate=0.01, ema_decay=0.9, checkpoint_every=3)
train(Regression(), batch_at, settings, Path({folder!r}))
"""


def test_kill_minus_nine_leaves_a_whole_checkpoint(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    for _ in range(2):
        before = checkpoint_step(tmp_path)
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while checkpoint_step(tmp_path) <= before + 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        reached = checkpoint_step(tmp_path)
        assert reached > before + 6
        newest = tmp_path / f"checkpoint-{reached:07d}"
        for name in ("weights", "optimizer", "ema"):
            assert load_file(newest / f"{name}.safetensors")
    settings = LoopSettings(steps=reached + 4, learning_rate=0.01, ema_decay=0.9, checkpoint_every=3)
    assert train(Regression(), batch_at, settings, tmp_path)


def test_every_epoch_sees_every_image_once():
    batches = ShuffledBatches(count=10, batch_size=4, seed=1)
    seen = torch.cat([batches(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_losses_are_relative_to_the_teachers_power():
    teacher = torch.randn(2, 3, 4, 4)
    assert relative_error(teacher, teacher) == 0
    assert relative_error(torch.zeros_like(teacher), teacher) == pytest.approx(1.0)
    assert output_loss(1.1 * teacher, teacher) == pytest.approx(0.01, rel=1e-3)
    by_block = feature_losses({"a": 100 * teacher, "b": teacher[:1]}, {"a": 110 * teacher, "b": teacher})
    assert set(by_block) == {"a"}
    assert by_block["a"] == pytest.approx((10 / 110) ** 2, rel=1e-3)


def quick_stage(**changes):
    settings = {
        "name": "joint",
        "steps": 30,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "ema_decay": 0,
        "checkpoint_every": 10,
    }
    return Stage(**{**settings, **changes})


@pytest.mark.parametrize("make", [tiny_pipeline, pytest.param(tiny_sdxl_pipeline, marks=pytest.mark.slow)])
def test_distillation_brings_the_student_nearer_to_its_teacher(make, data_folder, tmp_path):
    pipeline = make()
    cut = [unit.name for unit in removable_units(pipeline.unet) if unit.kind == "resnet"][1::2]
    edits = [{"edit": "remove", "unit": name} for name in cut]
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    inputs = unet_inputs(pipeline.unet)
    reference = predict(pipeline.unet, **inputs)
    before = relative_error(predict(student, **inputs), reference)
    teacher_weights = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    stage = quick_stage(steps=60, learning_rate=5e-4, losses=LossWeights(task=0))
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[stage])
    rows = read_log(tmp_path / "run" / "00-joint" / "log.jsonl")
    for term in ("output", "feature"):
        first, last = (sum(row[term] for row in part) for part in (rows[:5], rows[-5:]))
        assert last < 0.7 * first, term
    assert relative_error(predict(student, **inputs), reference) < before
    assert all(torch.equal(tensor, teacher_weights[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert {"task", "output", "feature", "feature/mid_block", "feature/up_blocks.0"} <= set(rows[0])
    assert not any(module._forward_hooks for module in student.modules())


def test_a_teacher_is_as_it_was_after_its_student_has_learnt(pipeline, data_folder, tmp_path):
    pipeline.unet.train().requires_grad_(True)
    pipeline.unet.conv_in.requires_grad_(False)
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
    stage = quick_stage(steps=2, student_blocks=["down_blocks.1", "mid_block"], checkpointing=True)
    distill(pipeline, build_student(pipeline.unet, plan), data_folder, tmp_path / "run", stages=[stage])
    assert all(module.training for module in pipeline.unet.modules())
    assert not pipeline.unet.is_gradient_checkpointing
    frozen = {name for name, p in pipeline.unet.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_in.weight", "conv_in.bias"}


def test_an_untouched_student_has_nothing_to_learn_from_the_teacher(pipeline, data_folder, tmp_path):
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet))
    distill(pipeline, student, data_folder, tmp_path, stages=[quick_stage(steps=1)])
    row = read_log(tmp_path / "00-joint" / "log.jsonl")[0]
    assert row["output"] == 0
    assert row["feature"] == 0
    assert row["loss"] == row["task"] > 0


def test_loss_weights_are_heeded(pipeline, data_folder, tmp_path):
    student = build_student(
        pipeline.unet, PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
    )
    stage = quick_stage(steps=1, losses=LossWeights(task=0, output=2, feature=3))
    distill(pipeline, student, data_folder, tmp_path, stages=[stage])
    row = read_log(tmp_path / "00-joint" / "log.jsonl")[0]
    assert row["loss"] == pytest.approx(2 * row["output"] + 3 * row["feature"], rel=1e-5)


def test_a_half_precision_student_is_refused_and_a_half_precision_teacher_is_not(data_folder, tmp_path):
    teacher = tiny_pipeline()
    plan = PruningPlan.for_unet(teacher.unet, [{"edit": "remove", "unit": "mid_block"}])
    student = build_student(teacher.unet, plan)
    with pytest.raises(AsdmError, match="bfloat16 cannot be trained"):
        distill(teacher, build_student(teacher.unet, plan).bfloat16(), data_folder, tmp_path / "half")
    teacher.to(torch.bfloat16)
    distill(teacher, student, data_folder, tmp_path / "whole", stages=[quick_stage(steps=2)])
    assert student.dtype == torch.float32
    assert all(row["loss"] > 0 for row in read_log(tmp_path / "whole" / "00-joint" / "log.jsonl"))


def test_the_same_seed_gives_the_same_losses(data_folder, tmp_path):
    logs = []
    for run in ("first", "second"):
        pipeline = tiny_pipeline()
        plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
        distill(
            pipeline, build_student(pipeline.unet, plan), data_folder, tmp_path / run, stages=[quick_stage(steps=4)]
        )
        logs.append(read_log(tmp_path / run / "00-joint" / "log.jsonl"))
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"steps": 2}, 0, r"begun with other settings \(steps\)"),
        ({"optimizer": "muon"}, 0, r"\(optimizer\)"),
        ({"losses": LossWeights(task=0)}, 0, r"\(losses\)"),
        ({}, 1, r"\(seed\)"),
        ({"learning_rate": 1e-4, "steps": 5}, 0, None),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(pipeline, data_folder, tmp_path, changes, seed, message):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])

    def run(stage, seed=0):
        distill(pipeline, build_student(pipeline.unet, plan), data_folder, tmp_path, stages=[stage], seed=seed)

    run(quick_stage(steps=4))
    with pytest.raises(AsdmError, match=message) if message else nullcontext():
        run(quick_stage(**{"steps": 4, **changes}), seed)
    assert checkpoint_step(tmp_path / "00-joint") == (5 if message is None else 4)


@pytest.mark.parametrize(
    ("changes", "fsdp", "message"),
    [
        ({"batch_size": 3}, "false", r"batch_size=3: not a multiple of 2"),
        ({"trained": "lora"}, "true", "trained=lora: not under FSDP"),
        ({"optimizer": "muon"}, "true", "optimizer=muon: not under FSDP"),
    ],
)
def test_a_later_stage_that_processes_cannot_share_is_refused_before_the_first(
    pipeline, data_folder, tmp_path, monkeypatch, changes, fsdp, message
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
    stages = [quick_stage(steps=1, name="first"), quick_stage(steps=1, **changes)]
    with pytest.raises(AsdmError, match=message):
        distill(pipeline, build_student(pipeline.unet, plan), data_folder, tmp_path, stages=stages)
    assert not (tmp_path / "prepared").exists()


def test_a_stage_is_of_the_stages_before_it(pipeline, data_folder, tmp_path):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])

    def run(first):
        stages = [quick_stage(steps=1, name=first), quick_stage(steps=1, name="last")]
        distill(pipeline, build_student(pipeline.unet, plan), data_folder, tmp_path, stages=stages)

    run("first")
    with pytest.raises(AsdmError, match=r"01-last: begun with other settings \(stages_before\)"):
        run("other")


def test_a_run_goes_on_with_its_own_images_alone(pipeline, data_folder, tmp_path):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])

    def run():
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
        prepare_data(pipeline, data_folder, tmp_path / "prepared")
        student = build_student(pipeline.unet, plan)
        distill(pipeline, student, tmp_path / "prepared", tmp_path / "run", stages=[quick_stage(steps=1)])

    run()
    run()
    Image.new("RGB", (16, 16), "red").save(data_folder / "0.png")
    with pytest.raises(AsdmError, match=r"begun with other settings \(images\)"):
        run()


def test_two_runs_do_not_train_in_one_folder(pipeline, data_folder, tmp_path):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])

    def run(progress=None):
        student = build_student(pipeline.unet, plan)
        distill(pipeline, student, data_folder, tmp_path, stages=[quick_stage(steps=2)], progress=progress)

    def meanwhile(row):
        with pytest.raises(AsdmError, match="another run is at work there"):
            run()

    run(meanwhile)
    run()  # the first one's lock is gone with it


def test_checkpoints_of_another_teacher_or_student_are_not_gone_on_from(pipeline, data_folder, tmp_path):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
    distill(pipeline, build_student(pipeline.unet, plan), data_folder, tmp_path / "run", stages=[quick_stage()])
    distill(pipeline, build_student(pipeline.unet, plan), data_folder, tmp_path / "run", stages=[quick_stage()])
    fine_tune, other = tiny_pipeline(), build_student(pipeline.unet, plan)
    with torch.no_grad():
        fine_tune.unet.conv_out.weight.add_(0.1)
        other.conv_in.weight.add_(0.1)
    with pytest.raises(AsdmError, match=r"begun with other settings \(teacher\)"):
        distill(fine_tune, build_student(pipeline.unet, plan), data_folder, tmp_path / "run", stages=[quick_stage()])
    with pytest.raises(AsdmError, match=r"begun with other settings \(student\)"):
        distill(pipeline, other, data_folder, tmp_path / "run", stages=[quick_stage()])
    with pytest.raises(AsdmError, match="the teacher's own UNet"):
        distill(pipeline, pipeline.unet, data_folder, tmp_path / "other", stages=[quick_stage()])


def test_a_teacher_of_another_kind_is_refused_before_anything_is_prepared(data_folder, tmp_path):
    student = build_student(tiny_sdxl_pipeline().unet, PruningPlan.for_unet(tiny_sdxl_pipeline().unet))
    with pytest.raises(AsdmError, match="the student's cross_attention_dim is 64, the teacher's 32"):
        distill(tiny_pipeline(), student, data_folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_blocks_of_a_half_precision_teacher_are_not_assembled_in_float32(data_folder, tmp_path):
    pipeline = tiny_pipeline()
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
    student = build_student(pipeline.unet, plan)
    with pytest.raises(AsdmError, match="the teacher is in torch"):
        stage = quick_stage(steps=1, student_blocks=["mid_block"])
        distill(pipeline.to(torch.bfloat16), student, data_folder, tmp_path, stages=[stage])


def test_held_out_images_are_not_trained_on(pipeline, data_folder, tmp_path):
    assert len(prepare(pipeline, data_folder, tmp_path / "prepared")) == 5


def test_images_of_captions_are_generated_with_the_seed_of_the_run(pipeline, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("a fish\n")
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet))
    stages = [quick_stage(steps=1, batch_size=1)]
    latents = []
    for seed in (0, 1):
        examples = distill(pipeline, student, captions, tmp_path / f"run-{seed}", stages=stages, seed=seed)
        latents.append(examples.prepared.batch([0])[0])
    assert not torch.equal(*latents)
    # Earlier versions prepared with seed 0, whatever that of the run.
    again = prepare(pipeline, captions, tmp_path / "run-0" / "prepared", seed=1)
    assert torch.equal(again.prepared.batch([0])[0], latents[0])
    with pytest.raises(AsdmError, match="prepared with seed=1, not 2"):
        prepare(pipeline, captions, tmp_path / "run-1" / "prepared", seed=2)


def test_a_cache_of_other_data_is_refused(pipeline, data_folder, tmp_path):
    prepare(pipeline, data_folder, tmp_path / "prepared")
    lines = (data_folder / "metadata.jsonl").read_text().splitlines()
    (data_folder / "metadata.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(AsdmError, match="prepared from other data"):
        prepare(pipeline, data_folder, tmp_path / "prepared")


def test_what_modules_put_out_is_kept_by_hooks_that_are_taken_off_again(unet):
    with pytest.raises(KeyError), outputs_of(unet, ["mid_block"]) as outputs:
        predict(unet)
        assert outputs["mid_block"].shape[1] == 64
        raise KeyError
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "not a list of stages"),
        ([{"name": "a"}], "steps"),
        ([{"name": "a", "steps": -1}], "steps=-1"),
        ([{"name": "a", "steps": 1, "rate": 2}], "rate=2"),
        ([{"name": "a", "steps": 1, "losses": {"task": 0, "output": 0, "feature": 0}}], "all weights are zero"),
        ([{"name": "a", "steps": 1}] * 2, "share a name"),
        (
            [
                {
                    "name": "a",
                    "steps": 1,
                    "losses": {"task": 0, "output": 0, "feature": 0, "semantic": 1},
                    "semantics": {"every": 2},
                }
            ],
            "leave the others nothing to learn",
        ),
    ],
)
def test_wrong_stages_are_named(content, message):
    with pytest.raises(AsdmError, match=message):
        parse_stages(content)


def test_stages_from_plain_data():
    stages = parse_stages(json.loads('[{"name": "joint", "steps": 3, "losses": {"task": 0.5}}]'))
    assert stages[0].losses == LossWeights(task=0.5)


def estimated(stage, **devices):
    pipeline = tiny_pipeline()
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "up_blocks.2.attentions.0"}])
    student = build_student(pipeline.unet, plan)
    stages = [Stage(name="joint", steps=10, batch_size=4, **stage)]
    return pipeline, student, estimate(pipeline, student, stages, **{"teraflops": 1.0, **devices})[0]


@pytest.mark.slow
def test_a_step_is_estimated_by_its_operations():
    pipeline, student, row = estimated({})
    macs = []
    for unet in (pipeline.unet, student):
        with counting_macs(unet) as count:
            denoiser_call(unet, batch_size=1)()
        macs.append(count.below())
    # A backward pass takes two forward ones, but for the first layers, and attention's, which computes scores again.
    assert row.step_teraflops == pytest.approx(4 * 2 * (macs[0] + 3 * macs[1]) / 1e12, rel=0.08)
    assert row.seconds == pytest.approx(10 * row.step_teraflops)
    with_sas, seldom = (
        estimated({"losses": LossWeights(semantic=1), "semantics": {"every": every}})[2].step_teraflops
        for every in (1, 4)
    )
    assert seldom - row.step_teraflops == pytest.approx((with_sas - row.step_teraflops) / 4)
    again = estimated({"checkpointing": True})[2]
    assert again.step_teraflops > 1.1 * row.step_teraflops


@pytest.mark.parametrize(
    ("losses", "factor"), [({"semantic": 1}, 1.0), ({"caption_semantic": 1, "caption_text": 1}, 1.2)]
)
def test_a_stage_of_semantic_losses_alone_is_estimated_without_its_encoder(losses, factor):
    alone = LossWeights(task=0, output=0, feature=0, **losses)
    _, _, row = estimated({"losses": alone, "semantics": {"encoder": "clip"}})  # of which there is none here
    _, _, plain = estimated({"losses": LossWeights(feature=0)})
    assert row.step_teraflops >= factor * plain.step_teraflops


def test_a_step_on_latents_of_8_channels_is_estimated():
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=tiny_unet(in_channels=8, out_channels=8))
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet))
    (row,) = estimate(pipeline, student, [Stage(name="joint", steps=1, batch_size=2)], teraflops=1.0)
    assert row.step_teraflops > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_unet(cross_attention_dim=48), "the student's cross_attention_dim is 48, the teacher's 32"),
        (tiny_transformer, "the student is a transformer, the teacher a UNet: it was not pruned from such a model"),
    ],
)
def test_no_estimate_is_made_for_another_models_student(make, message):
    with pytest.raises(AsdmError, match=message):
        estimate(tiny_pipeline(), make(), [Stage(name="joint", steps=1)], teraflops=1.0)


@pytest.mark.slow
def test_activations_are_estimated_as_a_step_needs_them(data_folder, tmp_path):
    pipeline, student, row = estimated({"caption_dropout": 0.0})
    task = make_task(pipeline, student, prepare(pipeline, data_folder, tmp_path / "prepared"), row.stage)
    for parameter in task.trained().values():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step():
        with torch.enable_grad():
            task((torch.arange(4), 0), torch.Generator())["loss"].backward()

    found = 1e6 * peak_megabytes(step)
    assert row.memory["activations"] == pytest.approx(found, rel=0.1)
    assert estimated({"accumulation": 2})[2].memory["activations"] < 0.7 * found
    assert estimated({"checkpointing": True})[2].memory["activations"] < 0.7 * found
    half = estimated({"mixed_precision": "bf16"})[2].memory["activations"]
    assert estimated({"mixed_precision": "bf16", "checkpointing": True})[2].memory["activations"] < 0.7 * half < found


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
def test_memory_is_estimated_by_parts(optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    _, student, row = estimated({"optimizer": optimizer})
    weights = dict(student.named_parameters())
    size = 4 * sum(p.numel() for p in weights.values())
    assert row.memory["student"] == row.memory["gradients"] == row.memory["average"] == size
    real = make_optimizer(weights, optimizer, 1e-3, (0.9, 0.99), 0.0, {})
    for parameter in weights.values():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    shared = ("step", "qmap1", "qmap2")
    moments = [t for state in real.state.values() for key, t in state.items() if key not in shared]
    assert row.memory["moments"] == sum(tensor.nbytes for tensor in moments)
    assert row.gigabytes == sum(row.memory.values()) / 1e9


@pytest.mark.slow
def test_processes_share_the_batch_and_where_asked_the_weights():
    one, two, sharing = (estimated({}, processes=n, sharded=s)[2] for n, s in ((1, False), (2, False), (2, True)))
    assert two.step_teraflops == pytest.approx(one.step_teraflops) and two.seconds == pytest.approx(one.seconds / 2)
    assert two.memory["activations"] < 0.7 * one.memory["activations"]
    assert two.memory["moments"] == one.memory["moments"] == 2 * sharing.memory["moments"]
    assert two.memory["gradients"] == 2 * one.memory["gradients"]  # with the buckets that are exchanged
    assert sharing.memory["teacher"] == one.memory["teacher"] and sharing.memory["gathered"] > 0


@pytest.mark.parametrize(("in_bfloat16", "expected"), [(1.0, "bf16"), (3.0, "no")])
def test_cpus_train_in_bfloat16_where_that_is_faster(monkeypatch, in_bfloat16, expected):
    """Instructions for it do not tell: there are CPUs that are slower with them."""

    def times(calls, **_):
        for call in calls.values():
            call()
        return {name: Latency(ms, ms, ms, 1) for name, ms in zip(calls, (2.0, in_bfloat16), strict=True)}

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(runtime, "measure_interleaved", times)
    runtime._bfloat16_trains_faster.cache_clear()
    try:
        assert make_accelerator("cpu", "auto").mixed_precision == expected
    finally:
        runtime._bfloat16_trains_faster.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert make_accelerator("cpu", "auto").mixed_precision == "no"


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_torch_before_2_11_says_whether_the_cpu_computes_in_bfloat16(monkeypatch, avx512, amx):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert runtime.computes_in_bfloat16() == (avx512 or amx)


@pytest.mark.parametrize("before", [False, True])
def test_denormal_numbers_are_zero_in_a_training_alone(before):
    torch.set_flush_denormal(before)
    try:
        with pytest.raises(RuntimeError), fast_training():
            assert torch.tensor([1e-40]).mul(1).item() == 0.0
            raise RuntimeError
        assert (torch.tensor([1e-40]).mul(1).item() == 0.0) == before
    finally:
        torch.set_flush_denormal(False)
