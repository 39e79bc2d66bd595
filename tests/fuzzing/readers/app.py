"""Readers of what `asdm app` reads: uploads, and the files of its folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from asdm import PruningPlan, RedundancyMap
from asdm.app.compare import request_of
from asdm.app.evidence import (
    LOG,
    QUALITIES,
    REPORT,
    evidence_file,
    find_evidence,
    loss_figure,
    pareto_figure,
    places_of,
    read_losses,
    report_frame,
)
from asdm.app.plan_board import PlanBoard, diagram, summary_of
from asdm.app.settings import Limits
from asdm.benchmark.results import Benchmark
from fuzzing import inputs
from fuzzing.readers.base import plan, profile, reader, refusals, written
from fuzzing.readers.records import benchmark_files


def _shown(board: PlanBoard) -> None:
    """Show a board as the page does after each click."""
    assert "<button" in diagram(board)
    summary_of(board)
    assert len(board.labels) == len(board.choices)
    if board.chosen or board.others:
        PruningPlan.model_validate(json.loads(board.plan().to_json()))


@reader(4, lambda: inputs.json_files(profile()))
def uploaded_profiles(folder: Path, content: bytes) -> None:
    board = PlanBoard.of(RedundancyMap.load(written(folder, "profile.json", content)))
    _shown(board)
    unit = board.redundancy.units[0].name
    calls = [lambda: _shown(board.toggle(unit)), lambda: _shown(board.best(1.2))]
    refusals([*calls, lambda: _shown(board.with_labels(board.labels[:2]))])


@cache
def _board() -> PlanBoard:
    return PlanBoard.of(RedundancyMap.model_validate(profile()))


@reader(4, lambda: inputs.json_files(json.loads(plan().to_json())))
def uploaded_plans(folder: Path, content: bytes) -> None:
    _shown(_board().with_plan(PruningPlan.load(written(folder, "plan.json", content))))


@reader(4, lambda: st.tuples(st.sampled_from(["i.png", "i.jpg", "i.svg", "i.gif", "i"]), inputs.image_files()))
def uploaded_images(folder: Path, upload: tuple[str, bytes]) -> None:
    path = written(folder, *upload)
    request_of({"prompt": "a cat", "seed": 0, "image": str(path), "strength": 0.5}, Limits())


def _benchmarks() -> st.SearchStrategy[tuple[bytes, bytes]]:
    rows, runs = benchmark_files()
    changed = (inputs.json_files(rows), st.just(inputs.dumped(runs)))
    return st.one_of(st.tuples(*changed), st.tuples(st.just(inputs.dumped(rows)), inputs.json_files(runs)))


@reader(3, _benchmarks)
def benchmarks_on_the_page(folder: Path, contents: tuple[bytes, bytes]) -> None:
    for name, content in zip(("b.json", "b_run.json"), contents, strict=True):
        written(folder, f"results/{name}", content)
    (name,) = find_evidence(folder).benchmarks
    found = Benchmark.load(evidence_file(folder, name, ".json"))
    splits = list(dict.fromkeys(split for row in found.rows for split in row.teacher_distance))
    for place in places_of(found):
        rows = [row for row in found.rows if row.place == place]
        calls = [lambda q=quality, r=rows: pareto_figure(r, (splits or [""])[0], q).to_json() for quality in QUALITIES]
        refusals(calls)


@st.composite
def _logs(draw: st.DrawFn) -> bytes:
    row = {"step": 1, "loss": 0.5, "pixels": 0.25, "learning_rate": 0.1, "seconds": 1.0}
    lines = draw(st.lists(st.one_of(inputs.mutated(row).map(inputs.dumped), inputs.json_files(row)), max_size=5))
    return b"\n".join([inputs.dumped(row), *lines])


@reader(4, _logs)
def training_logs(folder: Path, content: bytes) -> None:
    written(folder, f"run/{LOG}", content)
    (name,) = find_evidence(folder).logs
    loss_figure(read_losses(evidence_file(folder, name, LOG))).to_json()


_REPORT = b"<html><body><p>A report.</p><img src='data:image/png;base64,AA=='></body></html>"
_SCRIPTS = [b"<script>fetch('https://127.0.0.1:9')</script>", b'"><script>x</script>', b"' srcdoc='<script>x</script>"]


@reader(2, lambda: st.one_of(inputs.damaged(_REPORT), st.sampled_from(_SCRIPTS), st.binary(max_size=60)))
def reports_on_the_page(folder: Path, content: bytes) -> None:
    written(folder, f"run/{REPORT}", content)
    (name,) = find_evidence(folder).reports
    frame = report_frame(evidence_file(folder, name, REPORT))
    assert frame.count("<") == 2, "what the report holds must stay within the frame's attribute"
    assert 'sandbox=""' in frame


_NAMES = [
    "../outside.json", "/etc/passwd", "results/../../outside.json", "link.json", "results", "\0.json",
    "x" * 300 + ".json", "results/./b.json", "~/b.json", "..",
]  # fmt: skip


@reader(1, lambda: st.one_of(st.sampled_from([*_NAMES, *inputs.HOSTILE_TEXTS]), st.text(max_size=20)))
def names_of_files_on_the_page(folder: Path, name: str) -> None:
    place = folder / "page"
    written(place, "results/b.json", b"[]")
    written(folder, "outside.json", b"[]")
    (place / "link.json").symlink_to(folder / "outside.json")
    found: Any = evidence_file(place, name, ".json")
    assert found.is_relative_to(place) and found.is_file()
