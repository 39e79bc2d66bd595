"""Readers of what a training left."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from asdm.training.checkpoints import TrainingState, checkpoint_step, load_ema_weights
from asdm.training.log import read_log
from fuzzing import inputs
from fuzzing.readers.base import reader, refusals, valid_folder, written


def _training() -> tuple[dict[str, nn.Parameter], Any]:
    torch.manual_seed(0)
    weights = {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(weights.values())
    return weights, optimizer


@cache
def _checkpoint() -> dict[str, bytes]:
    weights, optimizer = _training()
    sum(weight.sum() for weight in weights.values()).backward()
    optimizer.step()
    TrainingState(weights, optimizer, None, torch.amp.GradScaler("cpu")).save(valid_folder() / "training", 5)
    return {path.name: path.read_bytes() for path in (valid_folder() / "training" / "checkpoint-0000005").iterdir()}


@st.composite
def _checkpoints(draw: st.DrawFn) -> tuple[str, dict[str, bytes], bytes]:
    files = dict(_checkpoint())
    name = draw(st.sampled_from(sorted(files)))
    is_json = name.endswith(".json")
    files[name] = draw(inputs.json_files(json.loads(files[name])) if is_json else inputs.tensor_files(files[name]))
    if draw(st.integers(0, 9)) == 0:
        del files[name]
    folder = draw(
        st.sampled_from(["checkpoint-0000005"] * 6 + ["checkpoint-x5", "checkpoint-9" * 3, "checkpoint-" + "9" * 200])
    )
    row = {"step": 1, "loss": 0.5}
    log = draw(st.one_of(inputs.json_files(row), st.just(b'{"step": 1, "loss": 0.5}\n{"ste')))
    return folder, files, log


@reader(6, _checkpoints)
def training_checkpoints(folder: Path, contents: tuple[str, dict[str, bytes], bytes]) -> None:
    name, files, log = contents
    for file, content in files.items():
        written(folder, f"{name}/{file}", content)
    rows = read_log(written(folder, "log.jsonl", log))
    assert all("step" in row for row in rows)
    checkpoint_step(folder)
    weights, optimizer = _training()

    def resume() -> None:
        TrainingState(weights, optimizer, None, torch.amp.GradScaler("cpu")).load_newest(folder)
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()

    refusals([resume, lambda: load_ema_weights(folder, weights)])
