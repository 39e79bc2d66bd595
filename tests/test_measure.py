"""Measurements on a busy machine: what they report holds on a quiet one, or they say that nothing can be measured."""

import multiprocessing
import random
import time
from types import SimpleNamespace

import pytest
import torch

import asdm
from asdm.evaluation import image_timing
from asdm.evaluation.image_timing import ImageJob, time_images
from asdm.evaluation.speed import measure_speed
from asdm.measure import latency, load
from asdm.measure.latency import Latency, Ratio, Timing, measure_interleaved
from asdm.measure.load import LoadMeter, busy_line
from asdm.planning.budget import make_plan
from asdm.planning.speedup import CORRECTIONS, measured_speedup, remeasure_plan
from conftest import tiny_pipeline


class Machine:
    """A machine of two cores by decree, on which another program computes now and then.

    `busy_for` and `quiet_for`: seconds of its bursts and of the pauses between; within a burst everything takes
    `slowdown` times as long, and the other program has one core and a half.
    """

    def __init__(self, monkeypatch, busy_for=0.0, quiet_for=1.0, slowdown=5.0, jitter=0.01):
        self.now = self.others = 0.0
        self.busy_for, self.period, self.slowdown = busy_for, busy_for + quiet_for, slowdown
        self.jitter, self.random = jitter, random.Random(0)
        monkeypatch.setattr(latency, "PATIENCE", 20.0)
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        for module in (latency, load, image_timing):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(load, "seconds_of_others", lambda: self.others)
        monkeypatch.setattr(load.psutil, "cpu_count", lambda: 2)
        monkeypatch.setattr(load.torch, "get_num_threads", lambda: 2)

    def call(self, seconds):
        def run():
            left = seconds * (1 + self.jitter * abs(self.random.gauss(0, 1)))
            while left > 1e-9:
                phase = self.now % self.period
                busy = phase < self.busy_for
                until = (self.busy_for if busy else self.period) - phase
                pace = self.slowdown if busy else 1.0
                spent = min(left * pace, max(until, 1e-6))
                self.now += spent
                self.others += 1.5 * spent if busy else 0.0
                left -= spent / pace

        return run


@pytest.mark.parametrize(("busy_for", "quiet_for"), [(0.0, 1.0), (0.7, 0.7), (1.3, 0.4), (0.2, 0.1)])
def test_bursts_of_other_work_do_not_change_a_ratio(monkeypatch, busy_for, quiet_for):
    machine = Machine(monkeypatch, busy_for, quiet_for)
    times = measure_interleaved({"slow": machine.call(0.06), "fast": machine.call(0.04)})
    ratio = times.speedup("slow", "fast")
    assert ratio.low <= 1.5 <= ratio.high and ratio.value == pytest.approx(1.5, rel=0.05)
    # Pauses as short as a round are too short to be told from bursts.
    assert ratio.is_measurable or quiet_for < 0.2
    assert times["slow"].low_ms <= 61 and times["slow"].rounds >= 5


def test_what_a_machine_that_is_always_busy_shows_is_not_reported(monkeypatch):
    machine = Machine(monkeypatch, busy_for=1e9, slowdown=8.0, jitter=0.8)
    times = measure_interleaved({"slow": machine.call(0.06), "fast": machine.call(0.04)}, patience=5.0)
    ratio = times.speedup("slow", "fast")
    assert ratio.low <= 1.5 <= ratio.high and not ratio.is_measurable
    assert str(ratio).startswith("not measurable now (")
    assert times["slow"].low_ms <= 60  # the quiet time is within the interval
    assert "1.5 of 2 cores" in busy_line(times.other_cores, times.contention_of("slow"))


def test_rounds_are_added_until_the_interval_is_narrow(monkeypatch):
    quiet = Machine(monkeypatch, jitter=0.001)
    few = measure_interleaved({"a": quiet.call(0.02), "b": quiet.call(0.01)}, rounds=3)
    noisy = Machine(monkeypatch, jitter=0.3)
    many = measure_interleaved({"a": noisy.call(0.02), "b": noisy.call(0.01)}, rounds=3)
    assert few["a"].rounds == 3 < many["a"].rounds
    assert many.precision() <= latency.PRECISION
    start = noisy.now
    hasty = measure_interleaved({"a": noisy.call(0.02), "b": noisy.call(0.01)}, rounds=3, precision=0, patience=1.0)
    assert hasty["a"].rounds > 3 and noisy.now - start < 1.5


def test_a_ratio_says_what_it_is_worth():
    assert str(Ratio(1.53, 1.5, 1.56)) == "1.53x (1.50–1.56)"
    assert str(Ratio(1.1, 0.9, 1.4)) == "not measurable now (0.90–1.40)"
    assert str(Ratio(1.0, 0.99, 1.01)) == "no difference (0.99–1.01)"
    assert str(Ratio(17.7, 0.03, 36.0)) == "not measurable now (0.03–36.00)"
    assert Latency.of([0.1]).low_ms < 100 < Latency.of([0.1]).high_ms  # a single round tells no interval
    alone = Timing({"a": [0.2], "b": [0.1]}).speedup("a", "b")
    assert not alone.is_measurable


def test_an_image_is_put_together_from_its_fastest_parts(monkeypatch):
    machine = Machine(monkeypatch, busy_for=0.5, quiet_for=0.5)
    encode, decode = machine.call(0.02), machine.call(0.1)

    def pipeline(unet_seconds, vae):
        unet = torch.nn.Identity()
        slow = machine.call(unet_seconds)
        unet.register_forward_hook(lambda *_: slow())
        return SimpleNamespace(unet=unet, vae=vae, device="cpu", components={"unet": unet, "vae": vae})

    def draw(made):
        def run():
            encode()
            for _ in range(10):
                made.unet(1)
            decode()

        return run

    vae = torch.nn.Identity()
    made = {"slow": pipeline(0.06, vae), "fast": pipeline(0.03, vae)}
    # the hook that is slow comes before the one that watches
    found = time_images({name: ImageJob(each, draw(each), calls=10) for name, each in made.items()}, rounds=5)
    ratio, true = found.speedup("slow", "fast"), (0.12 + 0.6) / (0.12 + 0.3)
    assert ratio.low <= true <= ratio.high and ratio.is_measurable and found.images >= 5
    assert found.by_part("slow")["UNet"] == pytest.approx(600, rel=0.02)
    assert found.latency("fast").ms == pytest.approx(420, rel=0.05)
    # However slow single images were: it cannot gain more than its parts do.
    parts = [found.by_part("slow")[part] / found.by_part("fast")[part] for part in ("UNet", "VAE decoder")]
    assert ratio.value <= max(parts) and parts[1] == 1


def test_the_load_of_other_processes_is_seen():
    with burning(1):
        time.sleep(0.3)
        meter = LoadMeter(threads=load.psutil.cpu_count())
        time.sleep(0.7)
        meter.mark()
        assert meter.other_cores() > 0.4 and meter.contention() > 0.1


class burning:
    """Within the block so many processes compute, always or on and off."""

    def __init__(self, count, on=1e9, off=0.0):
        context = multiprocessing.get_context("spawn")
        self.processes = [context.Process(target=_burn, args=(on, off), daemon=True) for _ in range(count)]

    def __enter__(self):
        for process in self.processes:
            process.start()
        time.sleep(0.5)

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()


def _burn(on, off):
    while True:
        end = time.perf_counter() + on
        while time.perf_counter() < end:
            sum(range(1000))
        time.sleep(off)


@pytest.fixture(scope="module")
def redundancy():
    """A profile whose latencies are those of the multiplications, as a busy machine's may say anything."""
    found = asdm.analyze(tiny_pipeline(), timesteps=1, samples=1)
    units = [unit.model_copy(update={"latency_ms": unit.gmacs}) for unit in found.units]
    return found.model_copy(update={"latency_ms": found.gmacs, "units": units})


def test_a_plan_that_cannot_be_measured_goes_by_the_map_and_is_measured_later(redundancy, monkeypatch):
    unet, notes = tiny_pipeline().unet, []
    wide, narrow = Ratio(2.0, 0.5, 8.0), Ratio(1.37, 1.36, 1.38)
    monkeypatch.setattr("asdm.planning.speedup.measured_speedup", lambda *_: wide)
    for doubt, basis in ((0.01, "latency"), (0.5, "macs")):
        known = redundancy.model_copy(update={"latency_doubt": doubt})
        plan = make_plan(known, speedup=1.3, unet=unet, progress=notes.append)
        assert plan.metrics.speedup_basis == basis and plan.metrics.measured_speedup is None
        assert plan.metrics.predicted_speedup >= 1.3 * CORRECTIONS[basis] * 0.999
        assert "not measurable now" in notes[-1] and "--remeasure" in notes[-1]
    with pytest.raises(asdm.AsdmError, match=r"not measurable now.*try again later"):
        remeasure_plan(plan, unet)
    monkeypatch.setattr("asdm.planning.speedup.measured_speedup", lambda *_: narrow)
    again = remeasure_plan(plan, unet)
    assert again.edits == plan.edits and again.metrics.speedup_basis == "measured"
    assert again.metrics.measured_speedup_interval == (1.36, 1.38)


def test_a_map_of_a_busy_machine_plans_by_macs(redundancy):
    plan = make_plan(redundancy.model_copy(update={"latency_doubt": 0.5, "latency_ms": 1e-3}), macs=0.7)
    assert plan.edits == make_plan(redundancy, macs=0.7).edits


@pytest.mark.slow
@pytest.mark.parametrize(("on", "off"), [(0.7, 0.7), (1.5, 0.5), (0.1, 0.1)])
def test_beside_a_process_that_computes_on_and_off_plans_and_evaluations_hold(on, off, monkeypatch):
    monkeypatch.setattr(latency, "PATIENCE", 20.0)
    monkeypatch.setattr(image_timing, "IMAGES_PATIENCE", 60.0)
    pipeline = asdm.load_pipeline("demo")
    with burning(2, on, off):
        busy = asdm.analyze(pipeline, sensitivity="taylor", samples=1, timesteps=1)
        plan = make_plan(busy, speedup=1.4, unet=pipeline.unet)
        student = asdm.with_unet(pipeline, asdm.build_student(pipeline.unet, plan))
        found = measure_speed({"teacher": pipeline, "pruned": student}, steps=25, guidance_scale=3.0, rounds=None)
    true = measured_speedup(pipeline.unet, plan, 20)
    assert true.value == pytest.approx(1.4, rel=0.1)
    row = found.rows[1]
    assert row.unet_ratio.low <= true.value <= row.unet_ratio.high
    if plan.metrics.measured_ratio is not None:
        assert plan.metrics.measured_ratio.low <= true.value <= plan.metrics.measured_ratio.high
    calm = measure_speed({"teacher": pipeline, "pruned": student}, steps=25, guidance_scale=3.0, rounds=None)
    assert row.pipeline_ratio.low <= calm.rows[1].pipeline_speedup <= row.pipeline_ratio.high
    assert found.contention > 0.1 > calm.contention
