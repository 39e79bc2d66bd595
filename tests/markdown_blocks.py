"""The code blocks of Markdown pages, and how the tests run or check them.

A block runs unless a comment in front of it says why not: `<!-- not run: takes hours -->`. `<!-- slow -->` runs it with
the slow tests. At the top of a page, `<!-- not run, whole page: REASON -->` holds for all of its shell lines.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer
from markdown_it import MarkdownIt

from asdm.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SHELL, PYTHON, DATA = ("sh", "bash", "console"), ("python",), ("json", "yaml", "toml", "text", "markdown")
_MARK = re.compile(r"<!-- (?:(?P<kind>not run|slow)(?P<page>, whole page)?)(?:: (?P<reason>.+?))? -->", re.S)
# The README has no marks. Its shell lines need a checkpoint, and the pages of the site run the same ones on `demo`.
README_MARKS = {SHELL[0]: "not run", PYTHON[0]: "slow"}
# What names in capitals stand for, where a line runs or is parsed.
PLACEHOLDERS = {"MODEL": "demo", "STUDENT": "demo", "TEACHER": "demo", "DATA": "demo", "PROMPT": "a cat"}


@dataclass(frozen=True)
class Block:
    """A block of code: `mark` is "not run", "slow" or None."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page; an indented block is shell.

    Raises:
        ValueError: a mark without a reason, or without a block behind it.
    """
    found, mark, whole_page = [], None, None
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block" and (match := _MARK.match(token.content.strip())):
            if match["kind"] == "not run" and not match["reason"]:
                raise ValueError(f"{page}:{line}: say why it is not run")
            if match["page"]:
                whole_page = match["kind"]
            else:
                mark = match["kind"]
        elif token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.split() else SHELL[0]
            default = README_MARKS if page.name == "README.md" else dict.fromkeys(SHELL, whole_page)
            found.append(Block(page, line, language, token.content, mark or default.get(language)))
            mark = None
        elif mark is not None and token.nesting >= 0 and token.type != "html_block":
            raise ValueError(f"{page}:{line}: the mark above stands in front of no block")
    return found


def shell_lines(text: str) -> Iterator[str]:
    """Yield the commands of a shell block: joined lines, without comments and prompts."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#\s.*$", "", line.removeprefix("$ ")).strip()
        if line:
            yield re.sub(r"\s+", " ", line)


def asdm_arguments(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each `asdm` command in a line, also of those that a launcher starts."""
    line = re.sub(r"\$\(which asdm\)", "; asdm", line).replace("…", "")
    for part in re.split(r"&&|\|\||;|\bdo\b|\|", line):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(part)]
        if words and words[0] == "asdm":
            yield words[1:]


@cache
def _commands() -> Any:
    return typer.main.get_command(app)


def parse(arguments: list[str]) -> None:
    """Parse arguments of `asdm` as the command line does, and run nothing.

    Raises:
        Exception: what the command line would refuse.
    """
    group = _commands()
    context = group.make_context("asdm", list(arguments))
    rest = [*context._protected_args, *context.args]
    if rest:
        name, command, rest = group.resolve_command(context, rest)
        command.make_context(name, rest, parent=context)


def check_other_command(line: str) -> None:
    """Check what can be checked of a line that is no `asdm` command: extras, make's targets, scripts of this checkout.

    Raises:
        AssertionError: it names something that this checkout does not have.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|asdm-diffusion)\[([\w,-]+)\]", line):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), f"{line}: no such extra"
    words = shlex.split(line.rstrip("…"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    if words[0] == "make":
        assert all(word in targets for word in words[1:] if "=" not in word), f"{line}: no such target"
    if words[0].rpartition("/")[2] == "python" and len(words) > 1 and words[1].endswith(".py"):
        script = ROOT / words[1]
        assert script.is_file(), f"{line}: no such script"
        subcommand = words[2] if len(words) > 2 and re.fullmatch("[a-z-]+", words[2]) else ""
        assert subcommand in script.read_text(), f"{line}: no such subcommand"
