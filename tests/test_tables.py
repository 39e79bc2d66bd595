"""Tables of figures that can be read in a terminal of 80 columns."""

import contextlib
import io

import pytest
from rich.console import Console

from asdm import analyze
from asdm.benchmark.results import BenchmarkRow
from asdm.cli.output import show
from asdm.cli.progress import ProgressReport
from asdm.cli.tables import benchmark_table, profile_table, protocol_table, speed_table
from asdm.evaluation.protocol.metrics import METRICS
from asdm.evaluation.protocol.results import ProtocolMetrics, ProtocolResults
from asdm.evaluation.results import Evaluation, SpeedMetrics
from asdm.measure.latency import Latency


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def printed(table):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show(table)
    return out.getvalue()


def evaluation(*names, interval=(1.0, 1.0)):
    took = Latency(460.6, 450.0, 470.0, 5)
    rows = [
        SpeedMetrics(
            name=name, unet_parameters=2_450_000, unet_megabytes=9.8, gmacs=0.027, gmacs_without_attention=0.02,
            unet=took, unet_speedup=1.0, unet_speedup_interval=interval,
            pipeline=took, pipeline_speedup=1.0, pipeline_speedup_interval=interval,
            pipeline_extrapolated=False, steps=25,
        )
        for name in names
    ]  # fmt: skip
    shared = {"date": "2026-11-29", "machine": "any", "threads": 2, "dtype": "float32"}
    return Evaluation(**shared, steps=25, guidance_scale=7.5, seed=0, speed=rows, quality=[])


def by_protocol(*names):
    values = {metric.field: 0.5 for metric in METRICS.values()}
    sampled = {"images": 4, "side": 64, "steps": 25, "guidance_scale": 7.5, "scheduler": "DDIMScheduler"}
    rows = [ProtocolMetrics(name=name, **sampled, **values) for name in names]
    shared = {
        "protocol": "demo",
        "title": "demo",
        "date": "2026-11-29",
        "machine": "any",
        "dtype": "float32",
        "seed": 0,
    }
    return ProtocolResults(**shared, prompts=4, stored_side=64, real_images=4, networks={}, notes=[], rows=rows)


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


def test_names_keep_their_place_beside_what_is_not_measurable():
    text = printed(speed_table(evaluation("teacher", "faster/pruned", interval=(0.5, 1.9))))
    first = [line.split()[0] for line in text.splitlines() if "460.6" in line]
    assert first[0] == "teacher" and "faster/pruned".startswith(first[1]) and len(first[1]) >= 10
    assert text.count("measurable") == 4 and text.count("0.027") == 2 and "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_long_names_of_models_leave_room_for_the_metrics():
    names = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "/home/me/students/asdm-fast-distilled")
    text = printed(protocol_table(by_protocol(*names)))
    assert all(metric.title in text for metric in METRICS.values()) and "(lower is better)" in text
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_a_table_that_needs_more_than_80_columns_is_whole():
    splits = ("seen", "held_out", "open", "another")
    text = printed(
        benchmark_table([row(**{key: dict.fromkeys(splits, 0.25) for key in ("teacher_distance", "concept_top5")})])
    )
    assert text.count("0.2500") == text.count("25%") == 4 and "a student" in text


def test_names_and_errors_in_brackets_are_printed_as_they_are(capfd):
    failed = BenchmarkRow(place="m", name="OpenVINO", group="runtime", steps=4, error="E: [/usr/x.so] [json]")
    assert "[/usr/x.so]" in printed(benchmark_table([row(), failed]))
    assert "st[v1]" in printed(speed_table(evaluation("st[v1]", "st[/v2]")))
    report = ProgressReport()
    report("images: st[/v1]", 0, 2, "[bold]")
    report.stop()
    assert "images: st[/v1]" in capfd.readouterr().err


@pytest.mark.parametrize("width", [60, 80])
def test_a_long_note_leaves_the_progress_its_count_and_time(width, monkeypatch):
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True)
    monkeypatch.setattr("asdm.cli.progress.errors", terminal)
    report = ProgressReport()
    report("analyse", 12, 70, "gri_attention down_blocks.0.attentions.1.transformer_blocks.0.attn1 (regions 2, pool 2)")
    report.stop()
    assert "12/70" in terminal.file.getvalue() and "-:--:--" in terminal.file.getvalue()
