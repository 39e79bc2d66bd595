"""Names that packages bring along: this package's own, and those of any other."""

import sys

import pytest
from asdm_demo import images_folder, pipeline_folder

from asdm import AsdmError, load_pipeline
from asdm.data.sources import open_data
from asdm.registry import DATASETS, PIPELINES, registered_folder, registered_names


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is installed and registers names."""
    (tmp_path / "theirs.py").write_text(
        f"def images(): return {str(images_folder())!r}\ndef pipeline(): return {str(pipeline_folder())!r}\n"
    )
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[asdm.datasets]\nstickers = theirs:images\nbroken = theirs:absent\ndemo = theirs:absent\n"
        "[asdm.pipelines]\nsticker-maker = theirs:pipeline\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("theirs", None)


def test_the_embedded_names_are_known_and_need_their_package(monkeypatch):
    assert registered_folder("demo", PIPELINES) == pipeline_folder()
    assert registered_folder("demo", DATASETS) == images_folder()
    assert registered_folder("stickers", DATASETS) is None
    monkeypatch.setitem(sys.modules, "asdm_demo", None)
    with pytest.raises(AsdmError, match=r"demo: the embedded pipeline is not installed .*; pip install -e"):
        load_pipeline("demo")


def test_any_package_can_register_a_name_that_loaders_then_know(package):
    assert open_data("stickers").examples == open_data("demo").examples
    assert registered_names(DATASETS) == ["demo", "stickers", "broken"]
    assert load_pipeline("sticker-maker").config["_name_or_path"] == "sticker-maker"
    with pytest.raises(AsdmError, match="no such folder or file; MODEL is demo, sticker-maker, a Hub id"):
        load_pipeline("./nothing")


def test_another_package_replaces_no_name_of_ours_and_a_broken_one_is_named(package):
    assert registered_folder("demo", DATASETS) == images_folder()
    with pytest.raises(AsdmError, match="broken: registered as theirs:absent, which cannot be imported"):
        open_data("broken")
