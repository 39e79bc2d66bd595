"""The benchmark times all in turns, draws the same prompts with each, and lets no contestant's failure hide."""

from contextlib import contextmanager

import pytest
import torch
from matplotlib import pyplot as plt

from asdm import PruningPlan, build_student
from asdm.evaluation.contest import (
    Contestant,
    ContestRow,
    contest_plot,
    contestants,
    fewer_steps,
    inheriting,
    pareto_front,
    run_contest,
    student,
)
from conftest import tiny_pipeline


class FakeJudge:
    def features(self, images):
        return torch.nn.functional.interpolate(images, 4).flatten(1) + 1


def test_a_contest_measures_everyone_and_tells_failures(pipeline, data_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("asdm.evaluation.contest.Judge", FakeJudge)
    entered = []

    @contextmanager
    def failing(given):
        entered.append(given)
        raise RuntimeError("does not run\nhere")
        yield given

    lean = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}]))
    entries = [
        Contestant("original", "original", steps=4),
        Contestant("same", "ours", steps=4),
        fewer_steps(2),
        inheriting(2),
        student("lean", lean, every=2),
        Contestant("broken", "peer", failing),
    ]
    made = run_contest(
        pipeline, entries, place="tiny", data=data_folder, samples=2, rounds=2, images_folder=tmp_path / "images"
    )
    rows = {row.name: row for row in made.rows}
    assert [row.name for row in made.rows] == [entry.name for entry in entries]
    assert rows["original"].speedup == 1 and rows["original"].teacher_distance["seen"] == pytest.approx(0, abs=1e-6)
    assert rows["same"].teacher_distance == pytest.approx(rows["original"].teacher_distance, abs=1e-6)
    assert rows["2 steps"].teacher_distance["seen"] > 0
    assert rows["broken"].error == "RuntimeError: does not run here" and rows["broken"].speedup is None
    assert len(entered) == 1  # it is not tried again
    assert all(row.images == 3 for name, row in rows.items() if name != "broken")
    made.save(tmp_path / "made.json")
    assert len(list((tmp_path / "images" / "seen" / "original").glob("*.png"))) == 2
    figure = contest_plot(made, "seen")
    assert any("lean" in text.get_text() for text in figure.axes[0].texts)
    plt.close(figure)


def test_the_front_holds_what_no_other_beats():
    def row(name, speedup, distance):
        return ContestRow(
            place="p", name=name, group="ours", steps=1, speedup=speedup, teacher_distance={"seen": distance}
        )

    rows = [row("base", 1, 0.0), row("good", 2, 0.1), row("worse", 1.5, 0.2), row("fast", 3, 0.3), row("far", 3, 0.4)]
    rows.append(ContestRow(place="p", name="broken", group="peer", steps=1, error="x"))
    assert [found.name for found in pareto_front(rows, "seen")] == ["base", "good", "fast"]


def test_our_contestants_leave_the_pipeline_as_it_was():
    pipeline = tiny_pipeline()
    modules = dict(pipeline.unet.named_modules())
    names = [entry.name for entry in contestants()]
    assert len(names) == len(set(names)) and names[0] == "original"
    for entry in contestants(4):
        if entry.group != "peer" and "x" not in entry.name.split()[-1]:
            with entry.prepared(pipeline) as ready:
                assert ready is pipeline
        assert dict(pipeline.unet.named_modules()) == modules
