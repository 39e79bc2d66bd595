"""The tab Evidence: a benchmark's Pareto plot, a compression's report, and the loss of a running training."""

from __future__ import annotations

from typing import Any

import gradio as gr

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
from asdm.app.handlers import Page, sentences
from asdm.benchmark.results import Benchmark
from asdm.errors import AsdmError

SECONDS = 5  # between two readings of a training's log
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def evidence_tab(page: Page, tab: Any) -> None:
    """Lay out the tab and connect it."""
    with gr.Row(equal_height=True):
        where = gr.Markdown(f"Files in `{page.settings.folder.name or page.settings.folder}`")
        refresh = gr.Button("Look again", size="sm", min_width=100, scale=0)
    with gr.Tab("Benchmark"):
        benchmark = gr.Dropdown([], label="Benchmark", elem_id="benchmark")
        with gr.Row():
            place = gr.Dropdown([], label="Model", min_width=120, elem_id="benchmark-model")
            split = gr.Dropdown([], label="Prompts", min_width=120)
            quality = gr.Dropdown(
                [(text, name) for name, text in QUALITIES.items()], label="Quality", min_width=260, scale=2
            )
        plot = gr.Plot(show_label=False, elem_id="pareto")
    with gr.Tab("Report"):
        report = gr.Dropdown([], label="Report of a compression", elem_id="report")
        frame = gr.HTML("", elem_id="report-frame")
    with gr.Tab("Training"):
        log = gr.Dropdown([], label="Training", elem_id="log")
        live = gr.Checkbox(True, label=f"Read again every {SECONDS} seconds")
        losses = gr.Plot(show_label=False, elem_id="losses")
    timer = gr.Timer(SECONDS, active=False)
    _connect_files(page, [tab, refresh, where], [benchmark, report, log])
    _connect_benchmark(page, [benchmark, place, split, quality], plot)
    _connect_report_and_log(page, [report, log, live], [frame, losses], timer)


def _connect_files(page: Page, triggers: list[Any], lists: list[Any]) -> None:
    tab, refresh, _ = triggers

    @sentences
    def look(*chosen: str | None) -> list[Any]:
        """List the files. What was chosen stays; else the newest benchmark is, as reports and logs may be large."""
        found = find_evidence(page.settings.folder)
        kinds = {"benchmarks": found.benchmarks, "reports": found.reports, "trainings": found.logs}
        newest = next(iter(found.benchmarks), None), None, None
        return [
            gr.Dropdown(
                choices=names,
                value=before if before in names else otherwise,
                info=None if names else f"no {kind} here",
            )
            for before, otherwise, (kind, names) in zip(chosen, newest, kinds.items(), strict=True)
        ]

    for event in (tab.select, refresh.click):
        event(look, lists, lists, show_progress="hidden", **_PRIVATE)


def _connect_benchmark(page: Page, choices: list[Any], plot: Any) -> None:
    benchmark, place, split, quality = choices

    def loaded(name: str | None) -> Benchmark:
        return Benchmark.load(evidence_file(page.settings.folder, name, ".json"))

    @sentences
    def opened(name: str | None) -> Any:
        if not name:  # there is none
            return gr.skip()
        found = loaded(name)
        places, splits = places_of(found), list(dict.fromkeys(s for row in found.rows for s in row.teacher_distance))
        judged = [row.place for row in found.rows if row.teacher_distance]  # of random weights only the speed is known
        first, kind = (judged or places or [""])[0], (splits or [""])[0]
        return (
            gr.Dropdown(choices=places, value=first),
            gr.Dropdown(choices=splits, value=kind),
            "teacher_distance",
            _figure(found, first, kind, "teacher_distance"),
        )

    @sentences
    def drawn(name: str | None, where: str, kind: str, metric: str) -> Any:
        return _figure(loaded(name), where, kind, metric)

    benchmark.change(opened, benchmark, [place, split, quality, plot], show_progress_on=plot, **_PRIVATE)
    for widget in (place, split, quality):
        widget.input(drawn, choices, plot, **_PRIVATE)


def _figure(benchmark: Benchmark, place: str, split: str, quality: str) -> Any:
    return pareto_figure([row for row in benchmark.rows if row.place == place], split, quality)


def _connect_report_and_log(page: Page, widgets: list[Any], outputs: list[Any], timer: Any) -> None:
    report, log, live = widgets
    frame, losses = outputs

    @sentences
    def read(name: str | None) -> str:
        return report_frame(evidence_file(page.settings.folder, name, REPORT))

    def figure_of(name: str | None) -> Any:
        return loss_figure(read_losses(evidence_file(page.settings.folder, name, LOG)))

    def followed(name: str | None, again: bool) -> Any:
        return gr.Timer(active=bool(again and name))

    @sentences
    def ticked(name: str | None) -> Any:
        try:
            return figure_of(name)
        except AsdmError:  # the log has no step yet, or has gone
            return gr.skip()

    report.input(read, report, frame, **_PRIVATE)
    log.input(sentences(figure_of), log, losses, **_PRIVATE)
    for widget in (log, live):
        widget.input(followed, [log, live], timer, **_PRIVATE)
    timer.tick(ticked, log, losses, show_progress="hidden", **_PRIVATE)
