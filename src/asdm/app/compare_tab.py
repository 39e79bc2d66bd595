"""The tab Compare: two models, one prompt, both images and their difference."""

from __future__ import annotations

from typing import Any

import gradio as gr

from asdm.app.compare import (
    FIELDS,
    HISTORY,
    LONGEST_PROMPT,
    OWN_SCHEDULER,
    SavedComparison,
    draw_comparison,
    request_of,
    save_comparison,
    with_newest,
)
from asdm.app.handlers import COMPUTING, Page, bar, beginning, sentences, session_of, show_notes, ticket_id
from asdm.choices import IMAGE_STRENGTH, SCHEDULERS

WORK = "compare"


def compare_tab(page: Page) -> None:
    """Lay out the tab and connect it."""
    history = gr.State(())
    with gr.Row():
        with gr.Column(scale=2, min_width=320, elem_classes="merged"):
            models, fields, buttons = _inputs(page)
        with gr.Column(scale=3, min_width=320, elem_classes="merged"):
            outputs = _outputs()
    gr.Markdown(f"History of this session: the last {HISTORY}, the newest first. Click one to see it again.")
    gallery = gr.Gallery(
        label="History",
        show_label=False,
        columns=8,
        height="auto",
        object_fit="contain",
        fit_columns=False,
        elem_id="history",
        interactive=False,
        allow_preview=False,
        buttons=[],
    )
    _connect(page, models, fields, buttons, [*outputs, gallery, history])


def _inputs(page: Page) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the widgets of the models, of a request's fields in the order of `FIELDS`, and the buttons."""
    offered = page.settings.models
    free: dict[str, Any] = {"allow_custom_value": page.settings.is_loopback, "filterable": True}
    with gr.Group():
        models = [
            gr.Dropdown(offered, value=offered[0], label="First model (teacher)", elem_id="first-model", **free),
            gr.Dropdown(offered, value=offered[-1], label="Second model (student)", elem_id="second-model", **free),
        ]
        prompt = gr.Textbox(label="Prompt", lines=2, max_length=LONGEST_PROMPT, elem_id="prompt", autofocus=True)
        negative = gr.Textbox(label="Negative prompt", lines=1, max_length=LONGEST_PROMPT)
    with gr.Row():
        run = gr.Button("Compare", variant="primary", elem_id="compare")
        cancel = gr.Button("Cancel", elem_id="cancel-compare")
    return models, [prompt, negative, *_settings(page)], [run, cancel]


def _settings(page: Page) -> list[Any]:
    """Return the widgets of a request's fields after the prompts."""
    limits = page.settings.limits
    late: dict[str, Any] = {"elem_classes": "late"}
    usual: dict[str, Any] = {"info": "0: usual", "value": 0, "minimum": 0, "min_width": 100}
    with gr.Accordion("Sampler", open=True, **late), gr.Row():
        seed = gr.Number(label="Seed", info="of the noise", value=0, precision=0, minimum=0, min_width=100)
        steps = gr.Number(label="Steps", precision=0, maximum=limits.steps, **usual)
        guidance = gr.Number(label="Guidance", maximum=50, **usual)
        scheduler = gr.Dropdown(
            [OWN_SCHEDULER, *SCHEDULERS], value=OWN_SCHEDULER, label="Scheduler", info="by short name", min_width=200
        )
    with gr.Accordion("Size, feature caching, LoRA", open=False, **late):
        with gr.Row():
            width = gr.Number(label="Width", precision=0, step=8, maximum=limits.side, **usual)
            height = gr.Number(label="Height", precision=0, step=8, maximum=limits.side, **usual)
            cache = gr.Number(
                label="Feature caching", info="speed-up of the second model; 0: none", value=0, minimum=0, min_width=160
            )
        lora = gr.Textbox(
            label="LoRA", info="path of a .safetensors file on this machine, or PATH:SCALE",
            max_length=1000, elem_id="lora", visible=page.settings.is_loopback,
        )  # fmt: skip
    with gr.Accordion("Start from an image", open=False, **late):
        image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=200)
        strength = gr.Slider(0.05, 1, value=IMAGE_STRENGTH, step=0.05, label="Strength: how much may change")
    return [seed, steps, guidance, scheduler, width, height, cache, image, strength, lora]


def _outputs() -> list[Any]:
    """Return the widgets that show a comparison, in the order of `_shown`."""
    slider = gr.ImageSlider(
        label="Left: first model, right: second", type="filepath", interactive=False, height=420,
        max_height=420, elem_id="slider", buttons=["fullscreen"],
    )  # fmt: skip
    summary = gr.Markdown("Write a prompt and press Compare.", elem_id="summary")
    with gr.Row():
        pair = [
            gr.Image(
                label=label,
                type="filepath",
                interactive=False,
                height=200,
                min_width=100,
                buttons=["fullscreen"],
                elem_classes="tile",
            )
            for label in ("First", "Second", "Difference")
        ]
    with gr.Row():
        downloads = [
            gr.DownloadButton(label, size="sm", interactive=False, min_width=100)
            for label in ("First as PNG", "Second as PNG", "All in one PNG")
        ]
    return [slider, summary, *pair, *downloads]


def _shown(saved: SavedComparison) -> tuple[Any, ...]:
    """Return the values of `_outputs` for a comparison."""
    first, second, difference = str(saved.teacher), str(saved.student), str(saved.difference)
    downloads = [gr.DownloadButton(value=str(path), interactive=True) for path in (first, second, saved.both)]
    return (first, second), saved.summary, first, second, difference, *downloads


def _connect(page: Page, models: list[Any], fields: list[Any], buttons: list[Any], outputs: list[Any]) -> None:
    run, cancel = buttons
    gallery, history = outputs[-2:]

    place = ticket_id()

    @sentences
    def compare(request: gr.Request, report: gr.Progress = gr.Progress(), *values: Any) -> tuple[Any, ...]:
        first, second, *rest, id, earlier = values
        ticket, progress = page.workbench.ticket(session_of(request), WORK, id), bar(report)
        given = dict(zip(FIELDS, rest, strict=True))
        if given["lora"]:
            page.settings.require_own_machine("lora")
        wanted = request_of(given, page.settings.limits)
        progress(0, "waiting")
        with page.workbench.computing(ticket) as notes:
            progress(0, "loading the models")
            pipelines = page.library.load(first), page.library.load(second)
            comparison = draw_comparison(*pipelines, wanted, page.settings.limits, ticket, progress)
            saved = save_comparison(comparison, page.folder)
        show_notes(notes)
        kept = with_newest(earlier, saved)
        return *_shown(saved), [(str(one.student), one.caption) for one in kept], kept

    @sentences
    def show_earlier(chosen: gr.SelectData, kept: tuple[SavedComparison, ...]) -> tuple[Any, ...]:
        return _shown(kept[chosen.index])

    def cancelled(request: gr.Request) -> None:
        page.workbench.cancel(session_of(request), WORK)

    triggers = [run.click, fields[0].submit]
    # Programs may call these three, in this order.
    callable_by: dict[str, Any] = {"api_visibility": "undocumented"}
    started = gr.on(
        triggers, beginning(page, WORK), outputs=place, queue=False, show_progress="hidden", api_name="begin",
        **callable_by,
    )  # fmt: skip
    started.then(
        compare, [*models, *fields, place, history], outputs, show_progress_on=[outputs[0]], api_name="compare",
        **callable_by, **COMPUTING,
    )  # fmt: skip
    cancel.click(cancelled, queue=False, api_name="cancel", **callable_by)
    gallery.select(show_earlier, history, outputs[:-2], queue=False, api_visibility="private")
