"""The page of `asdm app` in a real browser, used as a person uses it, and many requests to it."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from asdm import load_pipeline
from asdm.generation.image import read_about
from conftest import lora_file, profile_by_hand, tiny_unet
from tools.page.screenshots import LARGEST_BYTES, take_screenshots
from tools.page.serving import serving
from tools.page.soak import field_values, soak
from tools.page.visitor import DESKTOP, PHONE, browsing

pytestmark = pytest.mark.slow
RESULTS = Path(__file__).parent.parent / "docs" / "results"
PROMPT, MANY_STEPS = "apple, noto", 1000


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    profile_by_hand(load_pipeline("demo")).save(file)
    return file


@pytest.fixture(scope="module")
def installed():
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine")


@pytest.fixture(scope="module")
def served(installed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("benchmark.json", "benchmark_run.json"):
        shutil.copy(RESULTS / name, folder)
    (folder / "report.html").write_text("<h1>the report</h1><script>document.body.textContent = 'hacked'</script>")
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in range(1, 30)))
    with serving(folder, "--max-steps", str(MANY_STEPS)) as found:
        yield found


@pytest.fixture
def visit(served):
    with browsing(served.address) as found:
        yield found


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False)])
def test_each_tab_is_used(visit, profile, tmp_path, size, dark):
    visitor = visit(size, dark)
    background = visitor.window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == dark
    for use in (use_compare, use_plan, use_evidence):
        use(visitor, profile, tmp_path)
        assert visitor.overflow == 0, "the page is wider than the window"
    (blocked,) = visitor.faults
    assert "Blocked script execution in 'about:srcdoc'" in blocked, "only the report's script may be complained of"


def use_compare(visitor, _profile, folder):
    """Compare twice, look at the first again, save the second's file, and make a mistake."""
    visitor.compare(PROMPT, steps=2)
    first = visitor.pictures("#slider")
    visitor.compare(PROMPT, steps=2, seed=7)
    assert visitor.shown("Mean difference") and visitor.pictures("#slider") != first
    about = read_about(visitor.download("Second as PNG", folder / "second.png"))
    assert about["prompt"] == PROMPT and about["seed"] == 7
    slider, history = visitor.window.locator("#slider"), visitor.window.locator("#history img")
    handle = slider.locator(".inner").first
    before = handle.bounding_box()
    visitor.drag(handle, -80)
    assert abs(handle.bounding_box()["x"] - before["x"]) > 40, "the slider does not move"
    history.nth(1).click()
    visitor.window.wait_for_function("src => document.querySelector('#slider img').src === src", arg=first[0])
    visitor.window.locator("#prompt textarea").fill(" ")
    visitor.press("Compare")
    visitor.shown("prompt: is empty; write what the image shows")
    visitor.window.wait_for_timeout(1000)
    assert slider.locator("img").first.is_visible() and not slider.get_by_text("Error").is_visible()
    assert slider.evaluate("""slider => {
        slider.scrollIntoView({block: 'center'});
        const box = slider.getBoundingClientRect();
        const top = document.elementFromPoint(box.x + box.width / 4, box.y + box.height / 2);
        return slider.contains(top) && !top.closest('[data-testid=status-tracker]');
    }"""), "the error covers the images"


def use_plan(visitor, profile, folder):
    """Load a profile, plan by hand and by the programme, save the plan, load it again, and try it."""
    window = visitor.window
    removed = window.locator("#diagram [aria-pressed=true]")
    visitor.open_tab("Plan")
    visitor.upload("load-profile", profile)
    unit = window.locator("#diagram [data-unit]").first
    unit.click()
    visitor.shown("1 edit ")
    assert removed.count() == 1 and "removed" in window.locator("#diagram .about").inner_text()
    assert unit.get_attribute("data-unit") in window.locator("#edits").inner_text()
    window.locator("#edits .token .token-remove").first.click()
    visitor.shown("0 edits")
    assert removed.count() == 0, "the list and the diagram show different plans"
    blocks = ["mid_block", "down_blocks.3"]
    at_once = "names => names.forEach(name => document.querySelector(`#diagram [data-unit='${name}']`).click())"
    window.evaluate(at_once, blocks)
    visitor.shown("2 edits")
    tokens = window.locator("#edits .token")
    assert [text.split()[0] for text in tokens.all_inner_texts()] == blocks
    window.locator("#diagram [data-unit='mid_block.resnets.0']").click()
    visitor.shown("1 edit ")
    assert tokens.count() == 1, "a click on a removed unit brings its block back"
    window.locator("#diagram [data-unit='down_blocks.3']").click()
    visitor.shown("0 edits")
    visitor.fill("Speed-up", 1.5)
    visitor.press("Best plan for it")
    visitor.shown("predicted by the profile's latencies")
    removed.nth(1).wait_for()
    best = sorted(one.get_attribute("data-unit") for one in removed.all())
    plan = visitor.download("Save the plan", folder / "plan.json")
    visitor.press("Clear")
    visitor.shown("0 edits")
    visitor.upload("load-plan", plan)
    removed.nth(1).wait_for()
    assert sorted(one.get_attribute("data-unit") for one in removed.all()) == best
    visitor.attempt(PROMPT, steps=2)
    assert len(visitor.pictures("#trial")) >= 2
    assert "teacher\ttrial" in window.locator("#trial-summary").inner_text()


def use_evidence(visitor, _profile, _folder):
    """Look at the newest benchmark, hover over a point, read a report, and see a training's loss."""
    window = visitor.window
    visitor.open_tab("Evidence")
    assert "x (" in visitor.point_at("pareto")
    visitor.open_tab("Report")
    visitor.choose("report", "report.html")
    assert window.frame_locator("#report-frame iframe").locator("body").inner_text().strip() == "the report"
    visitor.open_tab("Training")
    visitor.choose("log", "log.jsonl")
    window.locator("#losses .scatterlayer path").first.wait_for()


def test_a_lora_changes_both_images_and_a_wrong_one_is_refused(visit, tmp_path):
    visitor = visit()
    good = lora_file(load_pipeline("demo").unet, tmp_path / "good.safetensors")
    visitor.press("Size, feature caching, LoRA")

    def image(lora):
        visitor.fill("LoRA", lora)
        visitor.compare(PROMPT, steps=2)
        for which in ("First", "Second"):
            visitor.download(f"{which} as PNG", tmp_path / f"{which}.png")
        with Image.open(tmp_path / "First.png") as first, Image.open(tmp_path / "Second.png") as second:
            assert first.tobytes() == second.tobytes(), "the LoRA must be added to both"
            return first.tobytes(), read_about(tmp_path / "Second.png").get("loras", [])

    plain, none = image("")
    full, named = image(good)
    half, halved = image(f"{good}:0.5")
    assert len({plain, full, half}) == 3 and none == []
    assert [*named, *halved] == [{"name": "good", "scale": 1.0}, {"name": "good", "scale": 0.5}]
    lora_file(tiny_unet(), tmp_path / "other.safetensors")
    for name, told in {
        "other.safetensors": "other.safetensors: a LoRA for another model (down_blocks.0",
        "gone.safetensors": "gone.safetensors: no such LoRA file; name a .safetensors file",
        "First.png": "First.png: a LoRA must be a .safetensors file; other formats may run code when loaded",
        "good.safetensors:99": "good.safetensors:99: the scale must be from -10 to 10",
    }.items():
        visitor.fill("LoRA", tmp_path / name)
        visitor.press("Compare")
        visitor.shown(told)
    assert image("")[0] == plain, "a LoRA stays in the model"
    assert not visitor.faults


@pytest.mark.usefixtures("installed")
def test_a_page_for_other_machines_reads_no_lora(tmp_path):
    file = lora_file(load_pipeline("demo").unet, tmp_path / "good.safetensors")
    with serving(tmp_path, "--host", "0.0.0.0") as served, browsing(served.address) as visit:
        visitor = visit()
        visitor.press("Size, feature caching, LoRA")
        visitor.shown("Feature caching")
        assert visitor.window.locator("#lora").count() == 0
        client = pytest.importorskip("gradio_client").Client(served.address, verbose=False)
        client.predict(api_name="/begin")
        fields = field_values(prompt=PROMPT, steps=1, lora=str(file))
        with pytest.raises(Exception, match="this page reads no files of its machine"):
            client.predict("demo", "demo", *fields, api_name="/compare")


def long_drawing(visitor):
    """Start a drawing of very many steps; return the seconds that it would still take."""
    visitor.window.locator("#prompt textarea").fill(PROMPT)
    visitor.fill("Steps", MANY_STEPS)
    visitor.press("Compare")

    def step():
        return int(re.search(r"step (\d+) of", visitor.shown("first model, step"))[1])

    first, started = step(), time.monotonic()
    while (now := step()) < first + 5:
        time.sleep(0.1)
    return (2 * MANY_STEPS - now) * (time.monotonic() - started) / (now - first)


def test_cancelling_and_closing_free_the_work(visit):
    visitor, other = visit(), visit()
    left = long_drawing(visitor)
    started = time.monotonic()
    visitor.press("Cancel")
    visitor.shown("Cancelled.")
    assert time.monotonic() - started < 0.1 * left
    left = long_drawing(visitor)
    visitor.window.context.close()
    started = time.monotonic()
    other.compare(PROMPT, steps=1)
    assert time.monotonic() - started < 0.5 * left, "a closed window's work goes on"


def test_an_analysis_can_be_cancelled(visit):
    visitor = visit()
    visitor.open_tab("Plan")
    visitor.press("Compute its profile")
    visitor.shown("analysing")
    visitor.press("Cancel")
    visitor.shown("Cancelled.")


def test_two_sessions_see_their_own_results(visit):
    first, second = visit(), visit()
    for visitor, seed in ((first, 1), (second, 2)):
        visitor.window.locator("#prompt textarea").fill(PROMPT)
        visitor.fill("Steps", 2)
        visitor.fill("Seed", seed)
        visitor.press("Compare")
    for visitor, seed in ((first, 1), (second, 2)):
        visitor.window.locator("#history img").first.wait_for()
        captions = [image.get_attribute("alt") for image in visitor.window.locator("#history img").all()]
        assert len(captions) == 1 and f"(seed {seed})" in captions[0]


def test_no_request_of_many_is_lost_and_memory_stays_flat(served):
    result = soak(served, 60, users=3)
    result.require_good()
    assert result.outcomes.total() == 60 and result.outcomes["done"] >= 54


def test_pictures_for_the_readme_are_taken(profile, tmp_path):
    for file in take_screenshots(tmp_path, RESULTS, profile=profile):
        with Image.open(file) as image:
            assert image.width == DESKTOP[0] and len(image.convert("RGB").getcolors(1 << 24)) > 20
        assert file.stat().st_size <= LARGEST_BYTES
