"""Take the page's pictures for the README: one of each tab, with what the embedded pipeline and the results say."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from asdm.errors import AsdmError
from tools.page.serving import serving
from tools.page.visitor import Visitor, browsing

LARGEST_BYTES = 300_000
PROMPT, CACHE_SPEEDUP, PLAN_SPEEDUP = "red apple, noto", 2, 1.5
BENCHMARK, PLACE = "benchmark.json", "demo"


def take_screenshots(
    folder: Path,
    results: Path,
    *,
    tabs: Sequence[str] = (),
    student: str | None = None,
    profile: Path | None = None,
) -> list[Path]:
    """Take the pictures in a browser; return their files.

    Args:
        results: the folder of the benchmark that the tab Evidence shows.
        tabs: of `TABS`, all by default.
        student: the second model of the tab Compare; by default the embedded pipeline with feature caching.
        profile: of the embedded pipeline, as `asdm analyze` writes it; by default the page computes it.

    Raises:
        AsdmError: an unknown tab, the page has faults in the browser, or a picture is larger than `LARGEST_BYTES`.
    """
    for name in tabs:
        if name not in TABS:
            raise AsdmError(f"{name}: no such tab; name one of {', '.join(TABS)}")
    models = ["--model", "demo", *(["--model", student] if student else [])]
    taken = []
    with serving(results, *models) as served, browsing(served.address) as visit:
        for name in tabs or TABS:
            visitor = visit()
            TABS[name](visitor, student, profile)
            taken.append(_picture(visitor, folder / f"app-{name}.png"))
            if visitor.faults:
                raise AsdmError(f"the page has faults: {'; '.join(visitor.faults)[:500]}")
    return taken


def _compare(visitor: Visitor, student: str | None, _profile: Path | None) -> None:
    if student is None:
        visitor.press("Size, feature caching, LoRA")
        visitor.fill("Feature caching", CACHE_SPEEDUP)
        visitor.press("Size, feature caching, LoRA")
    for seed in range(3):
        visitor.compare(PROMPT, seed=seed)


def _plan(visitor: Visitor, _student: str | None, profile: Path | None) -> None:
    visitor.open_tab("Plan")
    if profile is None:
        visitor.press("Compute its profile")
    else:
        visitor.upload("load-profile", profile)
    visitor.window.locator("#diagram [data-unit]").first.wait_for()
    visitor.fill("Speed-up", PLAN_SPEEDUP)
    visitor.press("Best plan for it")
    removed = visitor.window.locator("#diagram [aria-pressed=true]").first
    removed.wait_for()
    removed.hover()
    visitor.attempt(PROMPT)
    removed.hover()


def _evidence(visitor: Visitor, _student: str | None, _profile: Path | None) -> None:
    visitor.open_tab("Evidence")
    visitor.choose("benchmark", BENCHMARK)
    visitor.window.locator("#pareto .main-svg").first.wait_for()
    if PLACE not in visitor.window.locator("#benchmark-model input").input_value():
        visitor.choose("benchmark-model", PLACE)
    visitor.point_at("pareto")


TABS: dict[str, Callable[[Visitor, str | None, Path | None], None]] = {
    "compare": _compare,
    "plan": _plan,
    "evidence": _evidence,
}


def _picture(visitor: Visitor, file: Path) -> Path:
    """Save the whole page, with 256 colours where all of them make too large a file."""
    visitor.window.wait_for_timeout(1500)  # until nothing moves any more
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        taken = Path(folder) / "taken.png"
        visitor.window.screenshot(path=taken, full_page=True)
        with Image.open(taken) as image:
            full = image.convert("RGB")
        full.save(file, optimize=True)
    if file.stat().st_size > LARGEST_BYTES:
        full.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    if file.stat().st_size > LARGEST_BYTES:
        raise AsdmError(f"{file}: {file.stat().st_size} bytes; a picture of the README has at most {LARGEST_BYTES}")
    return file
