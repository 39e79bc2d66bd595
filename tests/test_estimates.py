"""The estimate of a job: it counts the calls that the job makes, writes nothing, and asks before hours of work."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from asdm import AsdmError, Stage, compress, save_pipeline
from asdm.cli import estimates
from asdm.cli.app import app
from asdm.compression.settings import claim_folder, make_settings
from asdm.compression.steps import STEPS, Distil, Job
from asdm.estimates.forecast import Forecast, benchmarking, training
from asdm.estimates.machine import MachineSpeed
from asdm.estimates.work import StepTime, Work, calls
from asdm.evaluation import image_timing
from asdm.measure import latency
from conftest import tiny_pipeline, tiny_unet

BUDGET = {"speedup": None, "params": 0.8, "macs": None, "preset": None}
SETTINGS = {
    "sensitivity": None,
    "compensate": None,
    "refine": 1,
    "steps": 1,
    "recipe": "joint",
    "stages": None,
    "samples": 2,
    "image_to_image": 2,
    "sampling_steps": 4,
    "config": None,
    "seed": 0,
}


@pytest.fixture
def model(tmp_path):
    return str(save_pipeline(tiny_pipeline(), tmp_path / "model"))


@pytest.fixture
def made():
    """The denoiser calls that are made: a count by the number of samples."""
    found = Counter()

    def count(module, args):
        if isinstance(module, UNet2DConditionModel):
            found[None] += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    yield found
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "changes"),
    [
        (BUDGET, {}),
        (BUDGET | {"params": None, "speedup": 1.02}, {"sensitivity": "taylor", "refine": 0, "steps": 0}),
    ],
)
def test_each_step_makes_as_many_calls_as_estimated(tmp_path, data_folder, monkeypatch, made, budget, changes):
    monkeypatch.setattr(latency, "PATIENCE", 0.0)  # measurements end after the least number of rounds
    monkeypatch.setattr(image_timing, "IMAGES_PATIENCE", 0.0)
    settings = make_settings("tiny", budget, data=data_folder, **SETTINGS | changes)
    claim_folder(tmp_path / "out", settings)
    job = Job(settings, tmp_path / "out", tiny_pipeline(), lambda *_: None)
    compared = []
    for step in STEPS:
        forecast = Forecast(job.teacher, budget, settings.compensate, getattr(job, "plan", None))
        works = [] if isinstance(step, Distil) else step.work(job, forecast)
        made.clear()
        step.run(job)
        for work in works:
            compared.append(work.name)
            assert 0.95 * work.least.count <= made[None] <= 1.05 * work.most.count, work.name
            if work.name in ("analyse", "compensate", "evaluate"):
                assert work.least.count == work.most.count == made[None], work.name
    assert compared == ["analyse", "plan", "compensate", "evaluate"]


@pytest.mark.slow
def test_a_training_is_estimated_by_the_steps_that_are_left(pipeline, data_folder, tmp_path):
    stages = [Stage(name="first", steps=8, batch_size=2), Stage(name="second", steps=4, batch_size=2)]
    prepared, all_steps = training(pipeline, tiny_unet(1), stages, data=data_folder, folder=tmp_path)
    assert prepared.least == Work(encodes=5)  # one of the six images is held out
    assert all_steps.name == "distil 12 steps"
    (tmp_path / "00-first" / "checkpoint-000006").mkdir(parents=True)
    _, left = training(pipeline, tiny_unet(1), stages, data=data_folder, folder=tmp_path)
    assert left.name == "distil 6 steps"
    assert left.least.seconds > 0
    other = tiny_unet(1, cross_attention_dim=16)
    with pytest.raises(AsdmError, match="cross_attention_dim"):
        training(pipeline, other, stages, data=data_folder, folder=tmp_path)


def test_work_becomes_seconds_in_proportion(pipeline):
    speed = MachineSpeed(pipeline, student_share=0.5)
    pair = speed.call_seconds("teacher", 2)
    assert pair > 0
    assert speed.seconds(calls(3, 2)) == pytest.approx(3 * pair)
    assert speed.seconds(calls(3, 2, "student")) == pytest.approx(1.5 * pair)
    assert speed.call_seconds("teacher", 2) <= speed.call_seconds("teacher", 8) <= speed.call_seconds("teacher", 64)
    timed = calls(1, 2).timed(100.0)
    assert speed.seconds(timed) == pytest.approx(pair)
    assert speed.seconds(timed, is_busy=True) == pytest.approx(100)
    assert speed.seconds(Work(decodes=2)) > 0


@pytest.mark.slow
def test_a_compression_hears_its_estimate_before_anything_is_written(model, data_folder, tmp_path, capfd):
    heard = []

    def stop(times):
        heard.extend(times)
        raise KeyboardInterrupt

    short = {"steps": 3, "samples": 2, "sampling_steps": 2, "refine": 0, "data": data_folder}
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", params=0.8, estimated=stop, **short)
    names = [time.name for time in heard]
    assert names == ["analyse", "compensate", "prepare data", "distil 3 steps", "evaluate"]
    assert all(0 < time.least <= time.most for time in heard)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr().out == ""


def compress_command(model, out):
    return ["compress", model, "--out", str(out), "--params", "0.8", "--steps", "0", "--samples", "0"]


def test_estimate_prints_and_writes_nothing(model, tmp_path):
    told = CliRunner().invoke(app, [*compress_command(model, tmp_path / "out"), "--estimate"])
    assert told.exit_code == 0
    assert "analyse" in told.stdout and "evaluate" in told.stdout
    assert not (tmp_path / "out").exists()
    without_out = [each for each in compress_command(model, "") if each not in ("--out", "")]
    assert CliRunner().invoke(app, [*without_out, "--estimate"]).exit_code == 0
    assert "--out is missing" in str(CliRunner().invoke(app, without_out).exception)


def test_a_no_ends_a_long_command_before_it_begins(model, tmp_path, monkeypatch):
    monkeypatch.setattr(estimates, "LONG", 0.0)
    monkeypatch.setattr(estimates, "_can_ask", lambda: True)
    told = CliRunner().invoke(app, compress_command(model, tmp_path / "out"), input="n\n")
    assert told.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_a_question_is_asked_on_a_terminal_for_long_work_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(estimates.typer, "confirm", lambda *_, **__: asked.append(1) or True)
    long, short = [StepTime("distil", 9000.0, 9000.0)], [StepTime("distil", 60.0, 60.0)]
    estimates.announce(long, yes=False)  # there is no terminal
    assert not asked
    monkeypatch.setattr(estimates, "_can_ask", lambda: True)
    estimates.announce(short, yes=False)
    estimates.announce(long, yes=True)
    assert not asked
    estimates.announce(long, yes=False)
    assert asked == [1]


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (0.1, 0.1, "1 s"),
        (55, 60, "58 s"),
        (240, 250, "4 min"),
        (240, 540, "4 to 9 min"),
        (50, 300, "50 s to 5 min"),
        (111_600, 111_600, "31 h"),
        (9000, 9100, "2.5 h"),
    ],
)
def test_spans_are_rounded(least, most, words):
    assert estimates.span(least, most) == words


def test_a_benchmark_is_estimated_by_its_methods(pipeline):
    from asdm.benchmark.method import Method

    given = {"data": None, "samples": 2, "rounds": 1, "seed": 0, "call_ms": 1.0}
    one, _ = benchmarking(pipeline, [Method("original", "original", steps=4)], **given)
    two, _ = benchmarking(pipeline, [Method(name, "original", steps=4) for name in "ab"], **given)
    assert one.most.count == (1 + 2) * 4  # the first warms up, the last follows on a busy machine alone
    assert two.most.count == 2 * one.most.count
    assert two.least.forwards[("teacher", 2)] == pytest.approx(two.most.forwards[("teacher", 2)] / 3)
