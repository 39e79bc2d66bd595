"""Several processes of a launch (CPU, gloo) do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from asdm import AsdmError, PruningPlan, Remove, build_student, distill, prepare_data, save_pipeline
from asdm.data.prepared import PreparedData
from asdm.data.sources import open_data
from asdm.distillation.stages import LossWeights, Stage
from asdm.pipelines.derived import with_unet
from asdm.training.log import read_log
from asdm.training.loop import LoopSettings, train
from asdm.training.task import TrainingTask
from conftest import tiny_pipeline

UNITS = ("down_blocks.0.resnets.1", "mid_block.attentions.0", "up_blocks.2.attentions.0")
STAGE = {"name": "joint", "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "relative": False, "caption_dropout": 0.5}


def student_of(pipeline):
    plan = PruningPlan.for_unet(pipeline.unet, [Remove(unit=unit) for unit in UNITS])
    return build_student(pipeline.unet, plan)


def launch(*arguments: str, processes: int, **variables: str) -> None:
    torchrun(str(Path(sys.executable).parent / "asdm"), *arguments, processes=processes, **variables)


def torchrun(*arguments: str, processes: int, **variables: str) -> None:
    # `accelerate launch` starts one process on a machine without accelerators; torchrun starts them there.
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program += arguments
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def distilled(data_folder, folder, stages, processes, **variables):
    """The UNet's weights after the stages, and the log of the first."""
    pipeline = tiny_pipeline()
    save_pipeline(pipeline, folder / "teacher")
    save_pipeline(with_unet(pipeline, student_of(pipeline)), folder / "student")
    (folder / "recipe.yaml").write_text(json.dumps(stages))
    paths = [str(folder / name) for name in ("teacher", "student")]
    options = ["--data", str(data_folder), "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "out")]
    launch("distill", *paths, *options, "--device", "cpu", processes=processes, **variables)
    return load_file(folder / "out" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def alone(data_folder, tmp_path):
    """The weights that one process gets."""

    def run(stages):
        pipeline = tiny_pipeline()
        student = student_of(pipeline)
        distill(pipeline, student, data_folder, tmp_path / "alone", stages=[Stage(**stage) for stage in stages])
        return student.state_dict()

    return run


def assert_the_same(found, expected):
    """But for rounding, which Adam makes larger where a gradient is nearly zero: each tensor within a hundredth of how
    far it moved."""
    start = student_of(tiny_pipeline()).state_dict()
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in expected.items()) > 1e-3
    for name, tensor in found.items():
        moved = (expected[name] - start[name]).norm()
        assert (tensor - expected[name]).norm() <= 0.01 * moved, name


def assert_the_same_losses(folder, other):
    for row, expected in zip(*(read_log(run / "00-joint" / "log.jsonl") for run in (folder, other)), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_with_half_a_batch_each_do_what_one_does(data_folder, tmp_path, alone):
    found = distilled(data_folder, tmp_path / "two", [STAGE], processes=2)
    expected = alone([STAGE])
    assert_the_same(found, expected)
    assert_the_same_losses(tmp_path / "two" / "out.training", tmp_path / "alone")


UNTIL_RANK_0_STOPS = """
import sys, torch
from pathlib import Path
from accelerate import PartialState
from asdm.training.loop import LoopSettings, train
from asdm.training.task import TrainingTask

class Regression(TrainingTask):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, batch, generator, part=None):
        return {"loss": self.layer(batch).square().mean()}

seconds = (0, 1000)[PartialState(cpu=True).process_index]
folder, settings = Path(sys.argv[1]), LoopSettings(steps=5)
assert not train(Regression(), lambda _: torch.ones(2, 4), settings, folder, stop_after_seconds=seconds)
"""


@pytest.mark.slow
def test_all_processes_stop_when_the_first_ones_time_is_over(tmp_path):
    (tmp_path / "train.py").write_text(UNTIL_RANK_0_STOPS)
    torchrun(str(tmp_path / "train.py"), str(tmp_path / "out"), processes=2, CUDA_VISIBLE_DEVICES="")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-0000001"]


# What `accelerate launch --use_fsdp` sets.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.slow
def test_two_processes_that_share_the_weights_go_on_from_one_and_do_what_it_does(data_folder, tmp_path, alone):
    stage = {**STAGE, "steps": 4, "accumulation": 2, "checkpointing": True, "ema_decay": 0.5, "checkpoint_every": 2}
    pipeline = tiny_pipeline()
    half = Stage(**stage | {"steps": 2})
    distill(pipeline, student_of(pipeline), data_folder, tmp_path / "two" / "out.training", stages=[half])
    found = distilled(data_folder, tmp_path / "two", [stage], processes=2, **FSDP)
    assert_the_same(found, alone([stage]))
    assert_the_same_losses(tmp_path / "two" / "out.training", tmp_path / "alone")
    checkpoints = [
        run / "00-joint" / "checkpoint-0000004" for run in (tmp_path / "two" / "out.training", tmp_path / "alone")
    ]
    for name in ("weights", "optimizer", "ema"):
        mine, theirs = (load_file(folder / f"{name}.safetensors") for folder in checkpoints)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert tensor.shape == theirs[key].shape and torch.allclose(tensor, theirs[key], atol=1e-3), (name, key)


def test_an_optimiser_that_needs_whole_matrices_is_refused_where_they_are_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    launch = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    with pytest.raises(AsdmError, match="optimizer=muon: not under FSDP; use adamw"):
        train(TrainingTask(), lambda step: None, LoopSettings(1, "muon"), tmp_path, accelerator=launch)


def test_rounds_of_accumulation_do_what_one_round_does(data_folder, tmp_path, alone):
    expected = alone([STAGE])
    pipeline = tiny_pipeline()
    student = student_of(pipeline)
    stage = Stage(**STAGE, accumulation=2, checkpointing=True)
    distill(pipeline, student, data_folder, tmp_path / "rounds", stages=[stage])
    assert_the_same(student.state_dict(), expected)
    assert_the_same_losses(tmp_path / "rounds", tmp_path / "alone")
    assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())


@pytest.mark.slow
def test_blocks_are_incubated_by_different_processes(data_folder, tmp_path, alone):
    stages = [{**STAGE, "name": "incubate", "scope": "incubate", "steps": 2}]
    found = distilled(data_folder, tmp_path / "two", stages, processes=2)
    expected = alone(stages)
    training = tmp_path / "two" / "out.training" / "00-incubate"
    logs = [read_log(training / f"process-{number}-of-2" / "log.jsonl") for number in (0, 1)]
    of_one = read_log(tmp_path / "alone" / "00-incubate" / "log.jsonl")
    shares = [{name for name in rows[0] if name.startswith("block/")} for rows in logs]
    assert shares == [{"block/down_blocks.0", "block/up_blocks.2"}, {"block/mid_block"}]
    for rows, share in zip(logs, shares, strict=True):
        assert all(rows[0][name] == pytest.approx(of_one[0][name], rel=1e-4) for name in share)
    start = student_of(tiny_pipeline()).state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, start[name]) == torch.equal(expected[name], start[name]), name


@pytest.mark.slow
def test_processes_share_the_pieces_of_a_source(data_folder, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"caption {number}" for number in range(1030)))
    save_pipeline(tiny_pipeline(), tmp_path / "model")
    options = ["--steps", "1", "--batch-size", "256", "--device", "cpu"]
    launch(
        "prepare-data",
        str(tmp_path / "model"),
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "two"),
        *options,
        processes=2,
    )
    prepared = PreparedData(tmp_path / "two")
    assert prepared.captions == [example.caption for example in open_data(tmp_path / "a.txt").examples]
    alone = prepare_data(tiny_pipeline(), tmp_path / "a.txt", tmp_path / "one", steps=1, batch_size=256)
    rows = [0, 500, 1025, 1029]
    torch.testing.assert_close(prepared.batch(rows)[0], alone.batch(rows)[0], atol=1e-2, rtol=0)


@pytest.mark.slow
def test_a_batch_that_cannot_be_parted_is_refused(data_folder, tmp_path):
    with pytest.raises(RuntimeError, match="batch_size=3: not a multiple of 2"):
        distilled(data_folder, tmp_path, [STAGE | {"batch_size": 3}], processes=2)
    with pytest.raises(AsdmError, match=r"batch_size=3: not a multiple of 2.*choose 4"):
        Stage(name="joint", steps=1, batch_size=3, accumulation=2, losses=LossWeights(feature=0))
