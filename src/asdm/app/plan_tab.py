"""The tab Plan: a model's units by sensitivity, edits by hand or by the programme, and a trial of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from asdm.app.compare import LONGEST_PROMPT, draw_comparison, request_of, require_within, save_comparison
from asdm.app.files import new_folder
from asdm.app.handlers import COMPUTING, Page, bar, beginning, sentences, session_of, show_notes, ticket_id
from asdm.app.plan_board import PlanBoard, diagram, summary_of
from asdm.app.trial import computed_profile, trial_student
from asdm.errors import AsdmError
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.plan import PruningPlan

DIAGRAM_CSS = """
.empty {padding: 64px 0 40px; text-align: center}
.u {display: flex; flex-direction: column; gap: 8px; align-items: center}
.level {display: flex; flex-wrap: wrap; gap: 8px 40px; justify-content: center; width: 100%}
.block {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 4px 8px;
  background: var(--block-background-fill)}
.block h4 {margin: 0 0 4px; font-size: 12px; font-weight: 600; color: var(--body-text-color)}
.units {display: flex; flex-wrap: wrap; gap: 6px}
.unit {display: inline-flex; gap: 1px}
.cell {min-width: 26px; height: 30px; padding: 0 6px; border: 2px solid transparent; border-radius: 4px;
  font-size: 12px; font-weight: 600; cursor: pointer; position: relative}
.cell:hover, .cell:focus-visible {outline: 2px solid var(--body-text-color); z-index: 1}
.cell.changed {border: 2px dashed #ff3b3b}
.cell.removed {border-color: #ff3b3b}
.cell.removed::after {content: ""; position: absolute; inset: 0; background:
  linear-gradient(to top right, transparent 47%, #ff3b3b 47%, #ff3b3b 53%, transparent 53%),
  linear-gradient(to bottom right, transparent 47%, #ff3b3b 47%, #ff3b3b 53%, transparent 53%)}
.legend {margin-top: 10px; font-size: 12px; text-align: center; color: var(--body-text-color)}
.legend .scale {display: inline-block; width: 120px; height: 10px; margin: 0 6px; border-radius: 3px}
.about {min-height: 2.8em; margin-top: 6px; font-size: 13px; text-align: center; overflow-wrap: anywhere;
  color: var(--body-text-color)}
"""
# The text of a hovered unit stands below the diagram too: touch screens show no titles. Each click makes the diagram
# again, which must lose neither that text nor the keyboard's place.
DIAGRAM_JS = """
const unitOf = event => event.target.closest('[data-unit]');
let last = null, clicked = false;
const restore = () => {
  const unit = last && element.querySelector(`[data-unit="${CSS.escape(last)}"]`);
  const about = element.querySelector('.about');
  if (!unit || !about) return;
  if (about.textContent !== unit.dataset.about) about.textContent = unit.dataset.about;
  if (clicked && !element.contains(document.activeElement)) {
    clicked = false;
    unit.focus({preventScroll: true});
  }
};
const show = event => {
  const unit = unitOf(event);
  if (!unit) return;
  last = unit.dataset.unit;
  restore();
};
element.addEventListener('click', event => {
  const unit = unitOf(event);
  if (!unit) return;
  clicked = true;
  trigger('click', {unit: unit.dataset.unit});
});
new MutationObserver(restore).observe(element, {childList: true, subtree: true});
element.addEventListener('mouseover', show);
element.addEventListener('focusin', show);
"""
EMPTY = "<p class='empty'>Compute the profile of a model, or load one that asdm analyze wrote.</p>"
LARGEST_SLIDER = 10.0
ANALYSIS, TRIAL = "analysis", "trial"  # kinds of work
TEACHER_AND_TRIAL = ("teacher", "trial")


def plan_tab(page: Page) -> None:
    """Lay out the tab and connect it."""
    board = gr.State(None)
    offered = page.settings.models
    with gr.Row(elem_classes="actions"):
        model = gr.Dropdown(
            offered, value=offered[0], label="Model", allow_custom_value=page.settings.is_loopback, min_width=160
        )
        analyse = gr.Button("Compute its profile", variant="primary", elem_id="analyse", min_width=180)
        load = gr.UploadButton("Load a profile", file_types=[".json"], elem_id="load-profile", min_width=180)
        cancel = gr.Button("Cancel", min_width=180)
    status = gr.Markdown("", elem_id="plan-status")
    picture = gr.HTML(
        EMPTY, html_template='${value}<div class="about"></div>', css_template=DIAGRAM_CSS, js_on_load=DIAGRAM_JS,
        elem_id="diagram", container=True, padding=True,
    )  # fmt: skip
    summary = gr.Markdown("", elem_id="plan-summary")
    with gr.Row(elem_classes="actions"):
        speedup = gr.Slider(1.05, 3, value=1.5, step=0.05, label="Speed-up", min_width=200, scale=3)
        best = gr.Button("Best plan for it", elem_id="best", min_width=180)
        clear = gr.Button("Clear", min_width=180)
    edits = gr.Dropdown([], value=[], multiselect=True, label="Edits of the plan", elem_id="edits")
    with gr.Row():
        upload = gr.UploadButton("Load a plan", file_types=[".json"], elem_id="load-plan", min_width=180)
        save = gr.DownloadButton("Save the plan", elem_id="save-plan", interactive=False, min_width=180)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            trial_inputs, attempt, result = _trial_inputs(page)
        with gr.Column(scale=3, min_width=320):
            trial = gr.ImageSlider(
                label=f"Left: {TEACHER_AND_TRIAL[0]}, right: {TEACHER_AND_TRIAL[1]}", type="filepath",
                interactive=False, height=400, max_height=400, buttons=["fullscreen"], elem_id="trial",
            )  # fmt: skip
    views = [board, picture, summary, edits, speedup, save]
    _connect_profiles(page, model, [analyse, load, cancel], status, views)
    _connect_edits(page, [best, clear, upload], views)
    _connect_trial(page, attempt, [board, model, *trial_inputs], [trial, result])


def _trial_inputs(page: Page) -> tuple[list[Any], Any, Any]:
    """Return the widgets of a trial's prompt, seed and steps; its button; and the place of its result."""
    with gr.Group():
        prompt = gr.Textbox(label="Prompt of the trial", lines=2, max_length=LONGEST_PROMPT, elem_id="trial-prompt")
        with gr.Row():
            number: dict[str, Any] = {"value": 0, "precision": 0, "minimum": 0, "min_width": 100}
            seed = gr.Number(label="Seed", info="of the noise", **number)
            steps = gr.Number(label="Steps", info="0: usual", maximum=page.settings.limits.steps, **number)
    attempt = gr.Button("Try the untrained student", variant="primary", elem_id="try")
    return [prompt, seed, steps], attempt, gr.Markdown("", elem_id="trial-summary")


def views_of(board: PlanBoard, folder: Path, with_speedup: bool = False) -> tuple[Any, ...]:
    """Return the values of all that shows a board: board, diagram, summary, edits, slider, file of the plan."""
    edits = gr.Dropdown(choices=board.labels, value=board.chosen_labels)
    most = max(1.1, min(LARGEST_SLIDER, int(board.reachable * 20 - 1e-6) / 20)) if with_speedup else 0
    slider = gr.Slider(maximum=most, value=min(1.5, most)) if with_speedup else gr.skip()
    if board.chosen or board.others:
        place = new_folder(folder) / "plan.json"
        board.plan().save(place)
        file = gr.DownloadButton(value=str(place), interactive=True)
    else:
        file = gr.DownloadButton(value=None, interactive=False)
    return board, diagram(board), summary_of(board), edits, slider, file


def parsed_file(kind: Any, path: str) -> Any:
    """Read an uploaded profile or plan. It is parsed as JSON.

    Raises:
        AsdmError: it is none.
    """
    try:
        return kind.load(path)
    except (RecursionError, OSError) as error:
        raise AsdmError(f"{Path(path).name}: cannot be read ({type(error).__name__})") from None


def _required(board: PlanBoard | None) -> PlanBoard:
    if board is None:
        raise AsdmError("no profile yet; compute one or load one first")
    return board


def _connect_profiles(page: Page, model: Any, buttons: list[Any], status: Any, views: list[Any]) -> None:
    analyse, load, cancel = buttons
    place = ticket_id()

    def cancelled(request: gr.Request) -> None:
        page.workbench.cancel(session_of(request), ANALYSIS, TRIAL)

    @sentences
    def compute(request: gr.Request, report: gr.Progress = gr.Progress(), *values: Any) -> tuple[Any, ...]:
        name, id = values
        ticket, progress = page.workbench.ticket(session_of(request), ANALYSIS, id), bar(report)
        progress(0, "waiting")
        with page.workbench.computing(ticket) as notes:
            progress(0, "loading the model")
            profile = computed_profile(page.library.load(name), ticket, progress)
        show_notes(notes)
        line = f"Analysed in {profile.seconds:.0f} s. Click units to remove them."
        return line, *views_of(PlanBoard.of(profile), page.folder, with_speedup=True)

    @sentences
    def load_profile(path: str) -> tuple[Any, ...]:
        profile = parsed_file(RedundancyMap, path)
        return "Loaded. Click units to remove them.", *views_of(PlanBoard.of(profile), page.folder, with_speedup=True)

    private: dict[str, Any] = {"api_visibility": "private"}
    analyse.click(beginning(page, ANALYSIS), outputs=place, queue=False, show_progress="hidden", **private).then(
        compute, [model, place], [status, *views], show_progress_on=[views[1]], **private, **COMPUTING
    )
    load.upload(load_profile, load, [status, *views], show_progress="hidden", **private)
    cancel.click(cancelled, queue=False, **private)


def _connect_edits(page: Page, buttons: list[Any], views: list[Any]) -> None:
    best, clear, upload = buttons
    board, picture, _, edits, speedup, _ = views

    @sentences
    def toggle(event: gr.EventData, now: PlanBoard | None) -> tuple[Any, ...]:
        return views_of(_required(now).toggle(str(event.unit)), page.folder)

    @sentences
    def choose(now: PlanBoard | None, labels: list[str]) -> tuple[Any, ...]:
        return views_of(_required(now).with_labels(labels), page.folder)

    @sentences
    def best_plan(now: PlanBoard | None, wanted: float) -> tuple[Any, ...]:
        return views_of(_required(now).best(wanted), page.folder)

    @sentences
    def cleared(now: PlanBoard | None) -> tuple[Any, ...]:
        return views_of(PlanBoard.of(_required(now).redundancy), page.folder)

    @sentences
    def load_plan(now: PlanBoard | None, path: str) -> tuple[Any, ...]:
        return views_of(_required(now).with_plan(parsed_file(PruningPlan, path)), page.folder)

    settings: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    # Clicks that come faster than the answers are done in turn.
    picture.click(toggle, board, views, trigger_mode="multiple", concurrency_limit=1, **settings)
    edits.input(choose, [board, edits], views, **settings)
    best.click(best_plan, [board, speedup], views, **settings)
    speedup.release(best_plan, [board, speedup], views, **settings)
    clear.click(cleared, board, views, **settings)
    upload.upload(load_plan, [board, upload], views, **settings)


def _connect_trial(page: Page, attempt: Any, inputs: list[Any], outputs: list[Any]) -> None:
    place = ticket_id()

    @sentences
    def draw(request: gr.Request, report: gr.Progress = gr.Progress(), *values: Any) -> tuple[Any, ...]:
        now, name, prompt, seed, steps, id = values
        plan = _required(now).plan()
        limits, progress = page.settings.limits, bar(report)
        ticket = page.workbench.ticket(session_of(request), TRIAL, id)
        wanted = request_of({"prompt": prompt, "seed": seed, "steps": steps}, limits)
        progress(0, "waiting")
        with page.workbench.computing(ticket) as notes:
            teacher = page.library.load(name)
            require_within(limits, wanted, teacher, teacher)
            progress(0, "building the student")
            student = trial_student(teacher, plan, ticket, progress)
            drawn = draw_comparison(teacher, student, wanted, limits, ticket, progress, TEACHER_AND_TRIAL)
            saved = save_comparison(drawn, page.folder, TEACHER_AND_TRIAL)
        show_notes(notes)
        return (str(saved.teacher), str(saved.student)), saved.summary

    private: dict[str, Any] = {"api_visibility": "private"}
    attempt.click(beginning(page, TRIAL), outputs=place, queue=False, show_progress="hidden", **private).then(
        draw, [*inputs, place], outputs, show_progress_on=[outputs[0]], **private, **COMPUTING
    )
