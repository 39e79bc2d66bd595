"""A stage of low-rank changes leaves a student's modules as they were, with weights that have the changes added."""

import sys

import pytest
import torch

from asdm import AsdmError, Stage, build_student, distill
from asdm.distillation.incubation import set_trainable
from asdm.distillation.lora import low_rank
from asdm.distillation.stages import parse_stages
from asdm.student.plan import PruningPlan
from conftest import predict, student_of_every_kind, tiny_unet

UNITS = ("down_blocks.1.resnets.1", "up_blocks.2.attentions.1")
RANK = 2


def pruned(unet):
    return build_student(unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": unit} for unit in UNITS]))


def stage(**changes):
    fields = {"name": "s", "steps": 3, "batch_size": 2, "learning_rate": 1e-2, "ema_decay": 0.5, "checkpoint_every": 1}
    return Stage(**{**fields, "trained": "lora", "lora_rank": RANK, **changes})


def shaken(student):
    """Give the changes weights that change something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_names_and_config_stay_and_each_weight_has_moved_by_a_low_rank(pipeline, data_folder, tmp_path, precision):
    student = pruned(pipeline.unet)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    modules = [(name, type(module)) for name, module in student.named_modules()]
    config = dict(student.config)
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[stage(mixed_precision=precision, steps=2)])
    assert [(name, type(module)) for name, module in student.named_modules()] == modules
    assert dict(student.config) == config and not hasattr(student, "peft_config")
    after = student.state_dict()
    assert list(after) == list(before) and all(tensor.dtype == torch.float32 for tensor in after.values())
    moved = {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}
    assert len(moved) > 50 and all(name.endswith(".weight") for name in moved)
    for name, change in moved.items():
        values = torch.linalg.svdvals(change.flatten(1).double())
        assert values[RANK] < 1e-4 * values[0] + 1e-7, name  # but for rounding


def test_fp16_is_refused_on_a_cpu_which_would_compute_in_float32(pipeline, data_folder, tmp_path):
    for trained in ("lora", "all"):
        stages = [stage(steps=1), stage(name="half", mixed_precision="fp16", trained=trained)]
        with pytest.raises(AsdmError, match="mixed_precision=fp16: not on a CPU; choose bf16"):
            distill(pipeline, pruned(pipeline.unet), data_folder, tmp_path / "run", stages=stages)
    assert not (tmp_path / "run" / "prepared").exists()


def test_merged_changes_predict_what_they_did_beside_the_layers(unet):
    for student in (pruned(unet), student_of_every_kind(without="sigmoid")):
        plain = predict(student)
        with low_rank(student, stage(), None) as changes:
            torch.testing.assert_close(predict(student), plain)  # at first they change nothing
            shaken(student)
            beside = predict(student)
            assert (beside - plain).abs().max() > 1e-3
            changes.merge()
        torch.testing.assert_close(predict(student), beside, rtol=1e-4, atol=1e-5)


def test_what_is_not_merged_is_dropped(unet):
    student = pruned(unet)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(RuntimeError, match="killed"), low_rank(student, stage(), torch.bfloat16):
        assert student.conv_in.base_layer.weight.dtype == torch.bfloat16
        shaken(student)
        raise RuntimeError("killed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_routers_are_trained_whole():
    student = student_of_every_kind()
    with low_rank(student, stage(), None):
        set_trainable(student, "lora")
        learning = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        routers = [name for name in learning if ".lora_" not in name]
        assert routers and all(".router." in name for name in routers) and len(learning) > 4 * len(routers)


@pytest.mark.slow
def test_a_killed_stage_goes_on_exactly(pipeline, data_folder, tmp_path):
    whole, parts = pruned(pipeline.unet), pruned(pipeline.unet)
    distill(pipeline, whole, data_folder, tmp_path / "whole", stages=[stage()])

    def kill(row):
        if row["step"] == 2:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        distill(pipeline, parts, data_folder, tmp_path / "parts", stages=[stage()], progress=kill)
    names = [name for name, _ in whole.named_parameters()]
    assert [name for name, _ in parts.named_parameters()] == names
    resumed = pruned(pipeline.unet)
    distill(pipeline, resumed, data_folder, tmp_path / "parts", stages=[stage()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_blocks_are_incubated_by_low_rank_changes(pipeline, data_folder, tmp_path):
    student = pruned(pipeline.unet)
    before = {name: p.clone() for name, p in student.named_parameters()}
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[stage(scope="incubate", steps=1)])
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith(("down_blocks.1.", "up_blocks.2.")) for name in moved)


def test_what_cannot_have_changes_is_told(pipeline):
    with pytest.raises(AsdmError, match="lora_rank=0"):
        parse_stages([{"name": "a", "steps": 1, "lora_rank": 0}])
    with pytest.raises(AsdmError, match="trained=lora changes the student's layers, not the teacher's"):
        parse_stages([{"name": "a", "steps": 1, "trained": "lora", "student_blocks": ["mid_block"]}])
    peft = pytest.importorskip("peft")
    student = pruned(tiny_unet())
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(AsdmError, match="has an adapter already"), low_rank(student, stage(), None):
        pass


def test_peft_is_named_where_it_is_missing(unet, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(AsdmError, match=r"peft is not installed; .*asdm-diffusion\[lora\]"),
        low_rank(unet, stage(), None),
    ):
        pass
