"""Tables of figures that can be read in a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from asdm import analyze
from asdm.benchmark.results import BenchmarkRow
from asdm.cli.tables import benchmark_table, profile_table


def printed(table):
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def row(**figures):
    return BenchmarkRow(
        place="demo",
        name="a student + OpenVINO + caching, calibrated, 1.5x, 12 steps",
        group="stack",
        steps=12,
        speedup=12.59,
        speedup_interval=(12.1, 13.0),
        seconds=174.29,
        seconds_interval=(160.0, 180.0),
        parts={"UNet, whole": 6.523},
        gflops=246.4,
        unet_megabytes=3438.0,
        peak_megabytes=273.7,
        **figures,
    )


@pytest.mark.parametrize("judged", [True, False])
def test_no_number_of_a_benchmark_is_cut_short(judged):
    quality = {
        "teacher_distance": {"seen": 0.1276, "held_out": 0.1942},
        "concept_top5": {"seen": 1.0},
        "image_to_image": {"exact_pair": {"held_out": 0.5625}},
    }
    failed = BenchmarkRow(place="demo", name="T-GATE", group="baseline", steps=25, error="ImportError: none such")
    text = printed(benchmark_table([row(**(quality if judged else {})), failed]))
    expected = ["0.1276", "0.1942", "100%", "–", "56%"] if judged else ["6523", "246", "–", "3438", "274"]
    for figure in ["174.29", "12.59x", "±4%", *expected]:
        assert figure in text
    assert "…" not in text and "ImportError" in text


def test_image_to_image_is_shown_on_the_last_split_that_has_it():
    distances = {"seen": 0.1, "held_out": 0.2, "open": 0.3}
    exact = {"exact_pair": {"seen": 0.75, "held_out": 0.5}}
    text = printed(benchmark_table([row(teacher_distance=distances, image_to_image=exact)]))
    assert "50%" in text and "75%" not in text


@pytest.mark.parametrize("judged", [True, False])
def test_a_program_whose_memory_and_images_are_unknown_has_dashes(judged):
    program = BenchmarkRow(
        place="demo", name="OpenVINO GenAI", group="baseline", steps=25, speedup=3.0, seconds=58.13,
        seconds_interval=(58.0, 59.0), parts={"UNet, whole": 2.25}, dtype="float32",
    )  # fmt: skip
    others = [row(teacher_distance={"seen": 0.1})] if judged else [row()]
    (line,) = (line for line in printed(benchmark_table([*others, program])).splitlines() if "58.13" in line)
    assert line.count("–") == (2 if judged else 4) and ("2250" in line) == (not judged)


def test_no_figure_of_a_map_is_cut_short(pipeline):
    redundancy = analyze(pipeline, sensitivity="taylor", timesteps=1, samples=1, latency_rounds=1)
    text = printed(profile_table(redundancy))
    assert "…" not in text
    for unit in redundancy.units:
        (line,) = (
            line for line in text.splitlines() if line.split()[:1] == [unit.name.replace("transformer_blocks", "tb")]
        )
        assert f"{unit.sensitivity:.5f}" in line
    quiet, busy = (redundancy.model_copy(update={"latency_ms": 1.0, "latency_doubt": doubt}) for doubt in (0.0, 1.0))
    assert "Plans go by MACs" in printed(profile_table(busy)) and "Plans" not in printed(profile_table(quiet))
