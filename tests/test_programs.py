"""Programs with loops of their own in the benchmark: equal steps, a row for each, and a sentence where one fails."""

import time
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from asdm.benchmark.engine import Engine
from asdm.benchmark.method import Method
from asdm.benchmark.methods import methods
from asdm.benchmark.programs import _genai_folder, programs
from asdm.benchmark.run import time_methods
from asdm.families import UNetFamily
from asdm.pipelines import random_models
from asdm.pipelines.random_models import random_pipeline
from asdm.student.build import empty_student
from asdm.student.plan import PruningPlan
from conftest import tiny_pipeline, tiny_sdxl_pipeline

TEXT, STEP, DECODER = 0.2, 0.02, 0.1  # seconds of the fake program's parts


def sleeping(drawn, more_reports=0):
    """A program that sleeps, and notes the steps of each image."""

    def draw(steps, on_step):
        drawn.append(steps)
        time.sleep(TEXT)
        for _ in range(steps + more_reports):
            time.sleep(STEP)
            on_step()
        time.sleep(DECODER)

    @contextmanager
    def loaded(_pipeline):
        yield Engine(draw, "q8_0")

    return loaded


@contextmanager
def failing(_pipeline):
    raise RuntimeError("does not run\nhere")
    yield


@pytest.mark.parametrize(("longest", "drawn_steps"), [(100, 6), (0, 3)])
def test_a_program_is_timed_in_the_same_steps_and_its_failure_is_a_row(pipeline, longest, drawn_steps):
    drawn = []
    entries = [
        Method("original", "original", steps=6),
        Method("program", "baseline", steps=6, engine=sleeping(drawn)),
        Method("broken", "baseline", steps=6, engine=failing),
        Method("other steps", "baseline", steps=6, engine=sleeping([], more_reports=1)),
        Method("last", "ours", steps=6),
    ]
    rows = time_methods(pipeline, entries, place="tiny", rounds=1, longest=longest)
    original, program, broken, other, last = rows
    assert drawn[:2] == [1, drawn_steps]  # an untimed step, then all of them, or as many as are timed of the others
    assert (program.steps, program.dtype, program.error, program.gmacs) == (original.steps, "q8_0", None, None)
    assert set(program.parts) == {"text encoder and first step", "UNet, whole", "VAE decoder"}
    assert program.seconds == pytest.approx(TEXT + 6 * STEP + DECODER, rel=0.5) and program.speedup > 0
    assert program.extrapolated == (longest == 0)
    assert broken.error == "RuntimeError: does not run here" and broken.speedup is None
    assert f"reported {drawn_steps + 1} steps in an image of {drawn_steps}" in other.error
    assert last.error is None and last.speedup > 0


def test_programs_stand_among_the_methods_where_images_are_not_judged():
    found = {method.name: method for method in programs(8)}
    assert all(method.steps == 8 and method.group == "baseline" and method.engine for method in found.values())
    assert set(found) <= {method.name for method in methods(8)}
    assert not set(found) & {method.name for method in methods(8, data="demo")}
    assert not set(found) & {method.name for method in methods(8, graphs=False)}  # they compute on the CPU
    assert all(len(method.in_steps([8, 4])) == 2 for method in found.values())


def test_a_program_that_cannot_run_says_why(pipeline):
    """stable-diffusion.cpp knows no UNet of the tiny pipeline's widths."""
    entries = [method for method in programs(4) if "GenAI" not in method.name]
    rows = {row.name: row.error for row in time_methods(pipeline, entries, place="tiny", rounds=1)}
    assert "transformers < 5.6" in rows.pop("optimum-intel")
    reason = (
        "reads UNets of the widths" if find_spec("stable_diffusion_cpp") else "pip install 'asdm-diffusion[benchmark]'"
    )
    assert len(rows) == 2 and all(reason in error for error in rows.values())


@pytest.mark.slow
def test_stable_diffusion_cpp_runs_in_the_benchmark(monkeypatch):
    """BK-SDM's smallest shape, with random weights."""
    pytest.importorskip("stable_diffusion_cpp")
    family = UNetFamily()
    with torch.device("meta"):
        unet = family.model_class(**random_models.UNETS["sd15"])
    edit = family.preset("bk-tiny", family.units(unet)).edit
    student = empty_student(unet, PruningPlan.for_unet(unet, [edit]))
    config = {key: value for key, value in student.config.items() if not key.startswith("_") and key != "edits"}
    monkeypatch.setitem(random_models.UNETS, "bk-tiny", config | {"sample_size": 8})
    pipeline = random_pipeline("bk-tiny", torch.float32)
    entries = [Method("original", "original", steps=4), *(each for each in programs(4) if "cpp" in each.name)]
    original, *rows = time_methods(pipeline, entries, place="small", rounds=2)
    assert [(row.error, row.dtype, row.steps) for row in rows] == [(None, "f16", 4), (None, "q8_0", 4)]
    assert all(row.speedup > 0 and row.parts["UNet, whole"] > 0 for row in rows) and original.error is None


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_openvino_genai_runs_in_the_benchmark_and_draws_what_torch_draws(make):
    genai = pytest.importorskip("openvino_genai")
    pytest.importorskip("openvino_tokenizers")
    pipeline = make()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline.register_modules(scheduler=PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1))  # as SD 1.5's
    entries = [Method("original", "original", steps=4), *(each for each in programs(4) if "GenAI" in each.name)]
    _, row = time_methods(pipeline, entries, place="tiny", rounds=2)
    assert (row.error, row.steps) == (None, 4) and row.dtype in ("float32", "bfloat16")
    model = genai.Text2ImagePipeline(str(_genai_folder(pipeline)), "CPU", INFERENCE_PRECISION_HINT="f32")
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4, "width": 16, "height": 16}
    found = model.generate("an octopus", generator=genai.TorchGenerator(7), **settings).data[0]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    expected = pipeline("an octopus", latents=latents, output_type="np", **settings).images[0]
    assert expected.std() > 0.05  # an image that shows a difference
    assert np.abs(np.asarray(found) / 255 - expected).mean() < 0.01
