"""Full-size Stable Diffusion shapes with random weights: minutes long, run by `make slow`."""

import resource

import pytest

from asdm import analyze, compress, load_pipeline


@pytest.mark.slow
def test_sd15_is_analysed_within_10_gigabytes_and_near_the_necessary_calls():
    redundancy = analyze(load_pipeline("random:sd15"), compensate="none", timesteps=2)
    assert len(redundancy.units) == 86
    assert redundancy.unet_forwards < 1.25 * redundancy.necessary_forwards
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 10e6  # kilobytes


@pytest.mark.slow
def test_sd15_is_pruned_to_a_measured_speedup(tmp_path):
    made = compress("random:sd15", tmp_path / "faster", speedup=1.6, steps=0)
    assert made.plan.figures.measured_speedup >= 1.6
    assert made.evaluation.speed_of("pruned").unet_speedup >= 1.6
    student = load_pipeline(tmp_path / "faster").unet
    assert sum(p.numel() for p in student.parameters()) < 859e6
