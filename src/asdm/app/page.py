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
from asdm.app.files import KEPT_SECONDS
from asdm.app.handlers import Page, session_of
from asdm.app.plan_tab import plan_tab
from asdm.app.settings import AppSettings
from asdm.errors import AsdmError, one_line

_FONTS = ["system-ui", "sans-serif"]  # none is fetched from elsewhere
CSS = """
.gradio-container {max-width: 1180px !important; width: 100% !important; margin: 0 auto}
.tile img {width: 100% !important; height: 100% !important; object-fit: contain}
#history .grid-wrap {min-height: 0; height: auto}
#history .grid-container {display: flex; overflow-x: auto; padding: 4px}
#history .gallery-item {flex: 0 0 112px}
.actions {align-items: flex-end}
.gradio-container input[role=combobox] {padding-right: 20px; text-overflow: ellipsis}  /* beside the arrow */
/* A message says the error; gradio's badge would hide the result before it. */
[data-testid=status-tracker]:has(> .error) {display: none !important}
@media (max-width: 700px) {
  /* One column, in which the result comes before the settings. */
  .merged {display: contents !important}
  .merged > * {flex: 1 1 100% !important; min-width: 0 !important}
  .late {order: 1}
  .gradio-container > main {padding: 8px !important}
}
"""


def theme() -> Any:
    """Return the page's theme."""
    return gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=["ui-monospace", "monospace"])


def build_page(page: Page) -> gr.Blocks:
    """Return the page with its tabs."""
    with gr.Blocks(title="asdm", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS)) as blocks:
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
    return blocks.queue(max_size=page.settings.limits.waiting, default_concurrency_limit=4)


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Make the folder of the page's files.

    Raises:
        AsdmError: the disk is full, or cannot be written to.
    """
    try:
        return tempfile.TemporaryDirectory(prefix="asdm-app-", ignore_cleanup_errors=True)
    except OSError as error:
        raise AsdmError(
            f"no folder for temporary files ({one_line(error)}); set TMPDIR to one on a disk with space"
        ) from None


def serve(settings: AppSettings) -> None:
    """Serve the page until it is interrupted. The requests in work end at their next step."""
    with _temporary_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "gradio")  # uploads and copies go with the server
        page = Page(settings, Path(folder) / "results")
        try:
            build_page(page).launch(
                server_name=settings.host,
                server_port=settings.port,
                share=False,
                quiet=True,
                show_error=False,
                max_file_size=settings.limits.upload_megabytes * 2**20,
                ssr_mode=False,
                footer_links=[],
                run_history=False,
                theme=theme(),
                css=CSS,
            )
        finally:
            page.workbench.cancel_all()
