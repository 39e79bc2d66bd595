"""A short part of `make fuzz`: every reader of strangers' files, on a few damaged and hostile ones."""

import os
import time
from pathlib import Path

import pytest

from asdm import AsdmError
from fuzzing.readers import READERS
from fuzzing.run import run
from fuzzing.watch import Fault, attempt

QUICK = 12  # inputs of a cheap reader
SLOWEST = 3  # of one that loads a whole pipeline


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name.replace(" ", "-"))
def test_a_reader_accepts_or_refuses_in_one_line(reader, tmp_path):
    count = QUICK if reader.share > 2 else SLOWEST
    counts = run(reader, count, tmp_path, shrink=False)
    assert counts["inputs"] >= 1


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda folder: [].pop(), "pop from empty list"),
        (lambda folder: (folder.parent / "beside").write_text("x"), "wrote"),
        (lambda folder: os.system("true"), "os.system"),
        (lambda folder: os.mkdir(folder.parent / "made"), "os.mkdir"),
        (lambda folder: exec(compile("1", str(folder / "evil.py"), "exec")), "ran"),
        (lambda folder: bytearray(1_500_000_000), "MB"),
    ],
)
def test_what_must_not_happen_is_seen(read, fault, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    with pytest.raises((Fault, IndexError), match=fault):
        attempt(lambda: read(folder), folder)


def test_a_hang_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzzing.watch.MAX_SECONDS", 0.1)

    def spin() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            pass

    with pytest.raises(Fault, match="more than"):
        attempt(spin, tmp_path)


def test_a_refusal_of_one_line_is_none(tmp_path):
    def refuse() -> None:
        raise AsdmError(f"{Path('x')}: no")

    assert not attempt(refuse, tmp_path)
    assert attempt(lambda: None, tmp_path)
