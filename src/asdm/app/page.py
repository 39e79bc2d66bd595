"""The page: its tabs, its looks, and the server that serves it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from asdm.app.compare_tab import compare_tab
from asdm.app.evidence_tab import evidence_tab
from asdm.app.handlers import Page, session_of
from asdm.app.plan_tab import plan_tab
from asdm.app.settings import AppSettings

_FONTS = ["system-ui", "sans-serif"]  # none is fetched from elsewhere
CSS = """
.gradio-container {max-width: 1180px !important; width: 100% !important; margin: 0 auto}
.tile img {width: 100% !important; height: 100% !important; object-fit: contain}
@media (max-width: 500px) {.gradio-container {padding: 4px !important}}
"""
CACHE_SECONDS = 24 * 3600  # after which a generated file is deleted


def theme() -> Any:
    """Return the page's theme."""
    return gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=["ui-monospace", "monospace"])


def build_page(settings: AppSettings, folder: Path) -> gr.Blocks:
    """Return the page.

    Args:
        folder: for the files that the page makes.
    """
    page = Page(settings, folder)
    with gr.Blocks(title="asdm", analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as blocks:
        gr.Markdown("# asdm\nDiffusion pipelines, pruned and distilled: compare them, plan them, look at the evidence.")
        with gr.Tab("Compare", id="compare"):
            compare_tab(page)
        with gr.Tab("Plan", id="plan"):
            plan_tab(page)
        with gr.Tab("Evidence", id="evidence") as evidence:
            evidence_tab(page, evidence)

        def closed(request: gr.Request) -> None:
            page.workbench.cancel(session_of(request))

        blocks.unload(closed)
    return blocks.queue(max_size=settings.limits.waiting, default_concurrency_limit=4)


def serve(settings: AppSettings, *, in_background: bool = False) -> gr.Blocks:
    """Serve the page until it is interrupted.

    Args:
        in_background: return at once; `close()` of what is returned ends it.
    """
    folder = tempfile.TemporaryDirectory(prefix="asdm-app-")
    blocks = build_page(settings, Path(folder.name))
    try:
        blocks.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=False,
            quiet=True,
            show_error=False,
            max_file_size=settings.limits.upload_megabytes * 2**20,
            ssr_mode=False,
            footer_links=[],
            run_history=False,
            prevent_thread_lock=in_background,
            theme=theme(),
            css=CSS,
        )
    finally:
        if not in_background:
            folder.cleanup()
    return blocks
