"""What survives `kill -9`, seen at twenty random moments of a real distillation; minutes long, run by `make slow`."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asdm import PruningPlan, Remove, build_student, save_pipeline, with_unet
from asdm.training.checkpoints import checkpoint_step
from conftest import tiny_pipeline

KILLS = 20
STAGES = [
    {"name": "incubate", "scope": "incubate", "steps": 150, "checkpoint_every": 5, "batch_size": 2},
    {"name": "joint", "steps": 250, "checkpoint_every": 5, "batch_size": 2, "optimizer": "muon"},
]


def start(folder: Path, data: Path, out: str) -> subprocess.Popen:
    program = [sys.executable, "-m", "asdm", "distill", str(folder / "teacher"), str(folder / "student")]
    program += ["--data", str(data), "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / out)]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def newest(training: Path) -> dict[str, int]:
    return {stage.name: checkpoint_step(stage) for stage in sorted(training.glob("0*")) if checkpoint_step(stage)}


@pytest.mark.slow
def test_twenty_kills_lose_no_checkpoint_and_change_nothing(data_folder, tmp_path):
    pipeline = tiny_pipeline()
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, [Remove(unit="mid_block.attentions.0")]))
    save_pipeline(pipeline, tmp_path / "teacher")
    save_pipeline(with_unet(pipeline, student), tmp_path / "student")
    (tmp_path / "recipe.yaml").write_text(json.dumps(STAGES))
    assert start(tmp_path, data_folder, "whole").wait() == 0

    training, draw = tmp_path / "killed.training", random.Random(0)
    begun = time.monotonic()
    probe = start(tmp_path, data_folder, "probe")
    while not list(tmp_path.glob("probe.training/prepared/.*partial*")) and not newest(tmp_path / "probe.training"):
        time.sleep(0.01)
    until_work = time.monotonic() - begun
    os.kill(probe.pid, signal.SIGKILL)
    for _ in range(KILLS):
        before = newest(training)
        process = start(tmp_path, data_folder, "killed")
        time.sleep(until_work + draw.uniform(-0.2, 2.5))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed").exists(), "the run ended before the last kill; give the stages more steps"
        after = newest(training)
        assert all(after[stage] >= step for stage, step in before.items())
        for stage, step in after.items():
            for part in (training / stage / f"checkpoint-{step:07d}").glob("*.safetensors"):
                assert load_file(part)
    assert after
    assert start(tmp_path, data_folder, "killed").wait() == 0
    weights = [
        load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("whole", "killed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
