"""A browser that uses the page as a person does: by labels, clicks and files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asdm.errors import AsdmError, needs_extra

SECONDS = 600  # that a person waits for anything
PHONE, DESKTOP = (390, 844), (1280, 900)  # pixels of the window


class Visitor:
    """A window of a browser on the page, with what went wrong in it.

    `faults`: messages of the browser's console, and addresses elsewhere that the page asked for.
    """

    def __init__(self, window: Any, address: str):
        self.window, self.faults = window, list[str]()
        window.set_default_timeout(1000 * SECONDS)
        window.on("request", lambda request: self._require_from(address, request.url))
        window.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        window.on("pageerror", lambda error: self.faults.append(str(error)))
        window.goto(address)
        window.locator("#prompt textarea").wait_for()

    def _require_from(self, address: str, url: str) -> None:
        if url.startswith("http") and not url.startswith(address):
            self.faults.append(f"asks {url}")

    def open_tab(self, *names: str) -> None:
        """Open a tab, and one inside it."""
        for name in names:
            self.window.get_by_role("tab", name=name, exact=True).click()

    def fill(self, label: str, value: object) -> None:
        """Write into the visible field with this label."""
        self.window.get_by_label(label, exact=False).locator("visible=true").first.fill(str(value))

    def choose(self, field: str, option: str) -> None:
        """Choose an option of a list.

        Args:
            field: the list's `elem_id`.
        """
        self.window.locator(f"#{field} input").click()
        self.window.get_by_role("option", name=option, exact=True).click()

    def press(self, button: str) -> None:
        """Press the visible button with this text, or the head of the settings with this title."""
        text = re.compile(rf"^\s*{re.escape(button)}\s*▼?\s*$")
        self.window.locator("button:visible:not([role=tab], [tabindex='-1'])", has_text=text).click()

    def shown(self, text: str) -> str:
        """Wait for a visible text, and return all of its element's."""
        found = self.window.get_by_text(text).locator("visible=true").first
        found.wait_for()
        return str(found.inner_text())

    def compare(self, prompt: str, steps: int = 0, seed: int = 0) -> None:
        """Compare two models in the tab Compare, and wait for the images."""
        self.window.locator("#prompt textarea").fill(prompt)
        self.fill("Steps", steps)
        self.fill("Seed", seed)
        before = self.pictures("#slider")
        self.press("Compare")
        self.window.wait_for_function(
            """before => { const found = [...document.querySelectorAll('#slider img')].map(image => image.src);
            return found.length > 1 && found.join() !== before.join() }""",
            arg=before,
        )

    def attempt(self, prompt: str, steps: int = 0) -> None:
        """Try the plan's student in the tab Plan, and wait for its image."""
        self.window.locator("#trial-prompt textarea, #trial-prompt input").first.fill(prompt)
        self.fill("Steps", steps)
        self.press("Try the untrained student")
        self.window.locator("#trial-summary").get_by_text("Mean difference").wait_for()

    def pictures(self, inside: str) -> list[str]:
        """Return the addresses of the images inside an element."""
        return [str(image.get_attribute("src")) for image in self.window.locator(f"{inside} img").all()]

    def drag(self, handle: Any, pixels: float) -> None:
        """Drag an element to the right, or to the left by less than 0 pixels."""
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.window.mouse.move(*middle)
        self.window.mouse.down()
        self.window.mouse.move(middle[0] + pixels, middle[1], steps=5)
        self.window.mouse.up()

    def point_at(self, plot: str, number: int = 0) -> str:
        """Hold the mouse over a point of a plot; return the text that appears.

        Args:
            plot: the plot's `elem_id`.
        """
        point = self.window.locator(f"#{plot} .scatterlayer .point").nth(number)
        text = self.window.locator(f"#{plot} .hoverlayer text").first
        point.scroll_into_view_if_needed()
        for _ in range(SECONDS):
            box = point.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            self.window.mouse.move(x - 20, y - 20)
            self.window.mouse.move(x, y, steps=4)
            self.window.wait_for_timeout(1000)
            if text.is_visible():
                return str(text.text_content())
        raise AsdmError(f"{plot}: its points say nothing")

    def upload(self, button: str, file: Path) -> None:
        """Choose a file for an upload button.

        Args:
            button: its `elem_id`.
        """
        with self.window.expect_file_chooser() as chooser:
            self.window.locator(f"#{button}").click()
        chooser.value.set_files(file)

    def download(self, button: str, to: Path) -> Path:
        """Press a download button, and return where its file is now."""
        with self.window.expect_download() as found:
            self.press(button)
        found.value.save_as(to)
        return to

    @property
    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self.window.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextmanager
def browsing(address: str) -> Iterator[Callable[..., Visitor]]:
    """Start Debian's chromium for the block; yield a function that opens the page as someone whom the server does not
    know. It takes the window's size and whether the person prefers dark pages.

    Raises:
        AsdmError: there is no playwright, or no chromium.
    """
    with needs_extra("test", "the page in a browser"):
        from playwright.sync_api import sync_playwright
    chromium = shutil.which("chromium")
    if chromium is None:
        raise AsdmError("chromium: not installed; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def visit(size: tuple[int, int] = DESKTOP, dark: bool = False) -> Visitor:
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                color_scheme="dark" if dark else "light",
                has_touch=size == PHONE,
            )
            return Visitor(context.new_page(), address)

        try:
            yield visit
        finally:
            browser.close()
