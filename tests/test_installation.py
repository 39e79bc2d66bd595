"""What a person asks of an installation: `asdm doctor`, `asdm --version`, shell completion, types for their checker."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

import asdm
from asdm.cli import app, output
from asdm.measure import installation
from asdm.measure.installation import EXTRAS
from tools.licenses import is_permitted

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_each_extra_is_explained_with_its_packages():
    declared = PROJECT["optional-dependencies"]
    for_developers = {"audit", "test", "demo-build", "docs", "examples"}
    assert {name: list(packages) for name, (packages, _) in EXTRAS.items()} == {
        name: packages for name, packages in declared.items() if name not in for_developers
    }


def test_make_test_installs_what_tests_are_skipped_without():
    """Except what is large or built from sources, and what `make slow` installs for pages and notebooks."""
    for_others = {"stable_diffusion_cpp", "openvino_genai", "openvino_tokenizers", "resvg_py"}
    for_others |= {"zensical", "mkdocstrings", "nbformat", "nbclient"}
    (extras,) = re.findall(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    declared = [*PROJECT["dependencies"], "gradio-client"]  # which comes with gradio
    declared += [package for extra in extras.split(",") for package in PROJECT["optional-dependencies"][extra]]
    installed = {re.split(r"[^\w-]", package)[0].lower().replace("-", "_") for package in declared}
    needed = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "importorskip":
                inside = [node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
                needed |= {name.partition(".")[0] for name in inside}
    assert for_others <= needed and {"DeepCache", "tomesd", "tgate"} <= needed
    assert {name.lower() for name in needed - for_others} <= installed


def test_doctor_says_what_is_missing_and_what_it_gives(monkeypatch):
    monkeypatch.setattr(installation, "_gflops", lambda _: {"matrix product": 12.5})
    monkeypatch.setattr(installation, "_version", lambda name: {"peft": "0.17.0", "torch": "2.7"}.get(name))
    monkeypatch.setattr(installation, "requires", lambda _: ["torch>=2.6", "numpy>=2.0", "peft>=9; extra == 'lora'"])
    told = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(told.stdout)
    assert told.exit_code == 1 and found["problems"] == ["numpy is not installed"]
    assert found["extras"]["lora"]["problems"] == ["peft is 0.17.0, needed is >=0.18"]
    assert found["gflops"] == {"matrix product": 12.5} and found["devices"]["cpu"]["memory_gb"] > 0
    monkeypatch.setattr(installation, "requires", lambda _: ["torch>=2.6"])
    monkeypatch.setattr(output.console, "width", 200)
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 0
    assert re.search(r"lora\s+peft is 0.17.0, needed is >=0.18\s+LoRA files", told.stdout)
    assert "pip install 'asdm-diffusion[NAME]'" in told.stdout and "12 GFLOP/s" in told.stdout


def test_the_version_is_printed():
    told = CliRunner().invoke(app, ["--version"])
    assert (told.exit_code, told.stdout) == (0, f"asdm {asdm.__version__}\n")


def test_the_shell_completes_commands_and_schedulers():
    script = "import sys; sys.argv = ['asdm']; from asdm.cli import main; main()"

    def completed(line: str) -> list[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_ASDM_COMPLETE": "complete_bash"}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **words}
        )
        return done.stdout.split()

    assert completed("asdm gen") == ["generate"]
    assert completed("asdm generate demo --scheduler euler-") == ["euler-karras", "euler-a"]


def test_type_checkers_read_the_packages_types():
    assert files("asdm").joinpath("py.typed").is_file()


def test_the_docker_image_installs_an_extra_that_exists_and_starts_the_page():
    lines = [line.split(" ", 1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1].isupper()]
    (install,) = [shlex.split(rest) for name, rest in lines if name == "RUN" and rest.startswith("pip install")]
    (extras,) = re.findall(r"^\.\[(.+)\]$", install[-2])
    assert install[-1] == "./packages/demo"
    assert "web" in extras.split(",") and set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    copied = [word for name, rest in lines if name == "COPY" for word in rest.split()[:-1]]
    assert install[install.index("-c") + 1] in copied and {"src", PROJECT["readme"]} <= set(copied)
    assert set(PROJECT["license-files"]) <= set(copied) and all((ROOT / name).exists() for name in copied)
    not_ignored = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert not_ignored == set(copied)
    found = {name: rest for name, rest in lines}
    assert found["USER"] != "root" and found["EXPOSE"] == "7860"
    command = json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])
    page = get_command(app).commands[command[1]].make_context("app", command[2:])
    assert (page.params["host"], page.params["port"]) == ("0.0.0.0", 7860)


def test_the_licences_of_both_packages_are_permitted():
    for project in (ROOT, ROOT / "packages" / "demo"):
        declared = tomllib.loads((project / "pyproject.toml").read_text())["project"]["license"]
        assert is_permitted(declared), declared
    assert not is_permitted("Apache-2.0 AND AGPL-3.0-only") and is_permitted("AGPL-3.0-only OR MIT")
