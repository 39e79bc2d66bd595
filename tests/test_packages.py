"""The distributions: what they contain, and that they work where nothing of the checkout is."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path, **options) -> str:
    done = subprocess.run([str(each) for each in arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheels of both packages, and the tool's source distribution with the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder / "tool", ROOT)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "demo", ROOT / "packages" / "demo")
    (wheel,) = (folder / "tool").glob("*.whl")
    (source,) = (folder / "tool").glob("*.tar.gz")
    (demo,) = (folder / "demo").glob("*.whl")
    return {"wheel": wheel, "source": source, "demo": demo}


@pytest.mark.slow
def test_the_wheel_is_small_and_has_what_a_user_needs(built):
    names = zipfile.ZipFile(built["wheel"]).namelist()
    assert built["wheel"].stat().st_size < 2e6
    assert {"asdm/py.typed", "asdm/cli/main.py", "asdm_unet.py", "asdm_transformer.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "tools/", "asdm_demo/"))]
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


@pytest.mark.slow
def test_the_source_distribution_has_what_the_wheel_is_built_of_alone(built):
    """Tests and tools need the embedded pipeline of the checkout."""
    with tarfile.open(built["source"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"src/asdm/cli/main.py", "CHANGELOG.md", "LICENSE", "NOTICE"} <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "packages/"))]
    assert built["source"].stat().st_size < 2e6


@pytest.mark.slow
def test_a_bare_environment_runs_the_installed_command(built, tmp_path):
    venv.create(tmp_path / "bare", with_pip=True)
    programs, clean = tmp_path / "bare" / "bin", {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    options = {"cwd": tmp_path, "env": clean}
    run(programs / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", built["wheel"], **options)
    assert run(programs / "asdm", "--version", **options).startswith("asdm ")
    run(programs / "asdm", "doctor", **options)
    run(programs / "asdm", "plan", "random:sd15", "--preset", "bk-tiny", "--out", "plan.json", **options)
    missing = subprocess.run([programs / "asdm", "generate", "demo", "x"], capture_output=True, text=True, **options)
    assert missing.returncode == 2 and "pip install -e packages/demo" in missing.stderr
    run(programs / "pip", "install", "--quiet", built["demo"], **options)
    run(programs / "asdm", "generate", "demo", "octopus, flat", "--steps", "2", "--out", "octopus.png", **options)
    assert (tmp_path / "octopus.png").stat().st_size > 500
