"""The documentation: its pages exist, its links resolve, its commands parse, its code runs, the site builds."""

import itertools
import re
import shutil
import subprocess
import sys
from unittest.mock import patch

import pytest
import yaml
from diffusers import DiffusionPipeline

import asdm
import asdm.distillation.recipes  # whose weights are of the losses that exist before a page registers another
from asdm import cli, save_pipeline
from asdm.distillation import losses
from asdm.edits.base import EDIT_KINDS
from conftest import tiny_pipeline
from markdown_blocks import (
    DATA,
    PAGES,
    PYTHON,
    ROOT,
    SHELL,
    asdm_arguments,
    blocks,
    check_other_command,
    parse,
    shell_lines,
)

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What runs are shortened to.
SMALLEST = {"--steps": 4, "--samples": 2, "--rounds": 1, "--timesteps": 1, "--refine": 0, "--limit": 4}
ALWAYS = {  # options that a test's runs get where the page leaves them out
    "analyze": ("--samples", "--timesteps"),
    "compress": ("--samples", "--refine"),
    "distill-decoder": ("--steps",),
    "evaluate": ("--samples", "--rounds", "--steps"),
    "generate": ("--steps",),
}


def with_blocks(slow: bool) -> list[str]:
    """Return the pages that have something to run in the quick tests, or more in the slow ones."""
    return [
        name
        for name in NAMES
        if any(
            block.mark == ("slow" if slow else None) and block.language in (*PYTHON, *SHELL)
            for block in blocks(ROOT / name)
        )
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_block_has_a_language_and_every_command_parses(name):
    for block in blocks(ROOT / name):
        assert block.language in (*SHELL, *PYTHON, *DATA), f"{block}: what language is this?"
        if block.language in PYTHON:
            compile(block.text, str(block), "exec")
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if not block.is_shell:
            continue
        for line in shell_lines(block.text):
            check_other_command(line)
            for arguments in asdm_arguments(line):
                try:
                    parse(arguments)
                except Exception as error:
                    message = error.format_message() if hasattr(error, "format_message") else str(error)
                    pytest.fail(f"{block}: {line}: {message}")


def test_a_wrong_command_does_not_parse():
    for wrong in ("asdm analyze", "asdm plan demo --speed 2", "asdm draw demo", "asdm distill demo demo --steps x"):
        (arguments,) = asdm_arguments(wrong)
        with pytest.raises(Exception):  # noqa: B017 typer's classes are its own affair
            parse(arguments)


@pytest.fixture
def small_demo(monkeypatch, tmp_path, data_folder):
    """A folder to run a page in, in which "demo" is a tiny pipeline and six images."""
    model = save_pipeline(tiny_pipeline(), tmp_path / "demo-pipeline")
    monkeypatch.setattr("asdm_demo.pipeline_folder", lambda: model)
    monkeypatch.setattr("asdm_demo.images_folder", lambda: data_folder)
    monkeypatch.setattr("asdm.cli.options.DEFAULT_STEPS", 2)
    monkeypatch.setattr("asdm.measure.latency.PATIENCE", 0.05)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with patch.dict(losses._TERMS), patch.dict(EDIT_KINDS):  # pages register kinds of their own
        yield folder


def shortened(arguments):
    """Return arguments of `asdm` with fewer steps, samples and rounds."""
    result = list(arguments)
    for place, (option, value) in enumerate(itertools.pairwise(arguments), start=1):
        if option in SMALLEST and float(value) > SMALLEST[option]:
            result[place] = str(SMALLEST[option])
    options = ALWAYS.get(arguments[0], ()) if arguments[0] != "analyze" or "--cache" not in arguments else ()
    if {"--protocol", "--layout"} & set(arguments):
        options = ("--steps", "--limit")
    missing = [option for option in options if option not in arguments]
    return [*result, *(word for option in missing for word in (option, str(SMALLEST[option])))]


def run_page(name, slow, monkeypatch, capfd):
    """Run a page's blocks in their order, in one folder and one namespace, as a reader does."""
    namespace = {"asdm": asdm, "DiffusionPipeline": DiffusionPipeline}
    for block in blocks(ROOT / name):
        if block.mark == "not run" or (block.mark == "slow" and not slow):
            continue
        if block.language in PYTHON:
            code = re.sub(r"(steps|samples)=(\d{2,}|[5-9])\b", r"\1=4", block.text)  # also num_inference_steps
            exec(compile("\n" * block.line + code, str(block.page), "exec"), namespace)
        for line in shell_lines(block.text) if block.is_shell else ():
            run_line(str(block), line, monkeypatch, capfd)


def run_line(where, line, monkeypatch, capfd):
    commands = list(asdm_arguments(line))
    if not commands:
        assert re.match(r"(pip install|make|cd) ", line), f"{where}: {line}: run it or mark it as not run"
    for arguments in commands:
        monkeypatch.setattr(sys, "argv", ["asdm", *shortened(arguments)])
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, f"{where}: {line}: {capfd.readouterr().err}"


@pytest.mark.parametrize("name", with_blocks(slow=False))
def test_a_pages_code_runs(name, small_demo, monkeypatch, capfd):
    run_page(name, False, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("name", with_blocks(slow=True))
def test_a_pages_slow_code_runs(name, small_demo, monkeypatch, capfd):
    run_page(name, True, monkeypatch, capfd)


# -- the site ---------------------------------------------------------------------------------------------


def navigation(entries):
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from navigation(target) if isinstance(target, list) else [target]


def test_the_sites_navigation_has_each_page_once():
    listed = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(str(page) for page in pages if page.parts[0] != "results")  # what scripts print


def title_of(page):
    return re.search(r"^# (.+)$", (ROOT / "docs" / page).read_text("utf-8"), re.M)[1]


def named_pages(entries):
    """Yield the pages that the navigation names, with their names. A section's name is that of a page that opens it."""
    for entry in entries:
        for name, target in entry.items() if isinstance(entry, dict) else ():
            if isinstance(target, str):
                yield target, name
            else:
                yield from [(target[0], name)] if isinstance(target[0], str) else []
                yield from named_pages(target)


def test_a_page_has_the_same_name_in_the_navigation_on_the_first_page_and_in_its_title():
    config, first = yaml.safe_load((ROOT / "mkdocs.yml").read_text()), (ROOT / "docs" / "index.md").read_text()
    named = {*named_pages(config["nav"]), *(each[::-1] for each in re.findall(r"\| \[(.+?)\]\((.+?)\) \|", first))}
    assert {page for page, _ in named} > {"index.md", "method/index.md", "export.md"}
    assert {(page, name) for page, name in named if name != title_of(page)} == {("index.md", "Home")}


def anchors(page):
    """Return the anchors of a page's headings, as Python-Markdown makes them, and of the objects it documents."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+?)(?: \{ *#([\w-]+) *\})?$", text, re.M)
    return {
        own or re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading, own in headings
    } | set(re.findall(r"^::: (\S+)", text, re.M))


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_resolve(name):
    page = ROOT / name
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text("utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}: no such file"
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), f"{name}: {target}: no such heading"
        inside = ROOT / "docs" in page.parents
        assert not inside or ROOT / "docs" in [file, *file.parents], f"{name}: {target}: not part of the site"


def test_the_reference_has_every_public_name():
    documented = re.findall(r"^::: asdm\.(\S+)", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(documented) == sorted(asdm.__all__)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("zensical", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT / "src")]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "No issues found" in done.stdout + done.stderr, done.stdout + done.stderr
    assert "asdm.analyze" in (tmp_path / "site" / "api" / "index.html").read_text()
