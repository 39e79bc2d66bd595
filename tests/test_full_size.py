"""Full-size Stable Diffusion shapes with random weights: minutes long, run by `make slow`."""

import resource
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from asdm import PruningPlan, analyze, build_student, compress, load_pipeline, with_unet
from asdm.data.calibration import calibration_calls
from asdm.distillation.estimate import estimate
from asdm.distillation.recipes import recipe_stages
from asdm.families import UNetFamily
from asdm.pipelines.random_models import UNETS


@pytest.mark.slow
def test_sd15_is_analysed_within_10_gigabytes_and_near_the_necessary_calls():
    redundancy = analyze(load_pipeline("random:sd15"), sensitivity="ablation", timesteps=2)
    assert len(redundancy.units) == 86
    assert redundancy.unet_forwards < 1.25 * redundancy.necessary_forwards
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 10e6  # kilobytes


@pytest.mark.slow
def test_sd15_is_pruned_to_a_measured_speedup(tmp_path):
    made = compress("random:sd15", tmp_path / "faster", speedup=1.6, steps=0)
    assert made.plan.metrics.measured_speedup >= 1.6
    assert made.evaluation.speed_of("pruned").unet_speedup >= 1.6
    student = load_pipeline(tmp_path / "faster").unet
    assert sum(p.numel() for p in student.parameters()) < 859e6


@pytest.mark.slow
@pytest.mark.parametrize("shape", UNETS)
def test_every_family_is_edited_at_full_size(shape):
    pipeline = load_pipeline(f"random:{shape}", dtype=torch.bfloat16)
    edits = [{"edit": "remove", "unit": unit} for unit in ("mid_block", "up_blocks.1.attentions.1")]
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    call = calibration_calls(with_unet(pipeline, student), None, ["a house"], timesteps=1, samples=1, seed=0)[0]
    with torch.no_grad():
        predictions = [unet(**call.arguments, return_dict=False)[0].float() for unet in (pipeline.unet, student)]
    assert predictions[0].shape == predictions[1].shape and predictions[1].isfinite().all()
    assert not torch.equal(*predictions)


@pytest.mark.slow
def test_students_of_sd15_become_one_file_below_2_gigabytes(tmp_path):
    """From a folder in float32."""
    for preset in ("bk-tiny", "bk-base"):
        steps = [
            ["plan", "random:sd15", "--preset", preset, "--out", tmp_path / "plan.json"],
            ["prune", "random:sd15", tmp_path / "plan.json", "--out", tmp_path / preset],
        ]
        for step in steps:
            subprocess.run([sys.executable, "-m", "asdm", *map(str, step)], check=True)
        file = str(tmp_path / f"{preset}.safetensors")
        export = ["-m", "asdm", "export", str(tmp_path / preset), "--to", "checkpoint", "--out", file]
        used = subprocess.run(
            [sys.executable, "-c", _WITH_PEAK, sys.executable, *export], check=True, capture_output=True, text=True
        )
        assert int(used.stdout.split()[-1]) < 2e6


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "gigabytes"), [("sd15", 8), ("sdxl", 16)])
def test_the_recipe_for_a_small_gpu_fits_it(shape, gigabytes):
    """By the estimate that a dry run prints, with 1 GB for the GPU's context."""
    with FakeTensorMode():  # no weights are made
        pipeline = load_pipeline(f"random:{shape}")
        names = [unit.name for unit in UNetFamily().units(pipeline.unet) if unit.block != "mid_block"]
        second = [name for name in names if name.endswith((".resnets.1", ".attentions.1"))]
        edits = [{"edit": "remove", "unit": name} for name in second]
        student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    (row,) = estimate(pipeline, student, recipe_stages("small-gpu", student, 1000), teraflops=50)
    assert row.memory["teacher"] == 0 and row.gigabytes + 1 < gigabytes


_WITH_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
