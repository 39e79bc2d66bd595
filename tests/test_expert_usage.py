"""Whether experts divide: a division that is planted in a router is found, and none where there is none."""

import math

import pytest
import torch

import asdm
from asdm import AsdmError, PruningPlan, build_student, with_unet
from asdm.cli.tables import usage_table
from asdm.diffusion.conditioning import embed_prompts
from asdm.edits.expert_kernels import CondConv2d
from asdm.sensitivity.expert_usage import explained_variance, mutual_information, prompts_by_label

CONV = "up_blocks.3.resnets.0.conv2"
PROMPTS = {
    "noto": [f"{name}, noto" for name in ("rabbit", "truck", "octopus", "cloud")],
    "twemoji": [f"{name}, twemoji" for name in ("rabbit", "truck", "octopus", "cloud")],
}


def student_of(pipeline, router, activation="softmax"):
    edit = {"edit": "cond_conv", "unit": CONV, "experts": ["up_blocks.3.resnets.1.conv2"]}
    plan = PruningPlan.for_unet(pipeline.unet, [edit | {"router": router, "activation": activation}])
    return with_unet(pipeline, build_student(pipeline.unet, plan))


def plant(student):
    """Let the router give the second group to the expert, and no prompt of the first."""
    conv = student.unet.get_submodule(CONV)
    pooled = torch.cat([embed_prompts(student, texts).encoder_hidden_states.mean(1) for texts in PROMPTS.values()])
    logits = torch.tensor([-6.0] * 4 + [6.0] * 4)
    with torch.no_grad():
        conv.router.weight[1] = torch.linalg.lstsq(pooled, logits[:, None]).solution[:, 0]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_planted_division_is_found(pipeline, activation):
    student = student_of(pipeline, "prompt", activation)
    (fresh,) = asdm.expert_usage(student, PROMPTS, timesteps=2).convolutions
    assert fresh.information == pytest.approx(0, abs=1e-6) and fresh.explained == 0
    assert fresh.weights["noto"] == [[1, 0], [1, 0]]  # by time step and kernel
    plant(student)
    usage = asdm.expert_usage(student, PROMPTS, timesteps=2)
    (conv,) = usage.convolutions
    assert usage.groups == {"noto": 4, "twemoji": 4} and len(usage.timesteps) == 2
    assert conv.name == CONV and conv.experts == ["up_blocks.3.resnets.1.conv2"]
    assert conv.weights["twemoji"][0][1] > conv.weights["noto"][0][1] + 0.5
    assert conv.information > max(0.4, 2 * conv.chance)
    assert conv.explained > 0.99
    assert usage_table(usage).row_count == 1


def test_a_router_that_does_not_see_the_prompt_divides_nothing(pipeline):
    student = student_of(pipeline, "time")
    with torch.no_grad():
        student.unet.get_submodule(CONV).router.weight.normal_()
    (conv,) = asdm.expert_usage(student, PROMPTS, timesteps=3).convolutions
    assert conv.information == pytest.approx(0, abs=1e-6) and conv.explained == 0
    assert len({row[1] for row in conv.weights["noto"]}) == 3  # it divides by time step


def test_information_is_that_of_kernel_and_group():
    groups = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert mutual_information(apart, groups) == pytest.approx(1)
    assert mutual_information(apart, torch.tensor([0, 1, 0, 1])) == pytest.approx(0)
    partly = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]])
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert mutual_information(partly, groups) == pytest.approx(1 - entropy)
    assert explained_variance(partly, groups) == pytest.approx(1)
    mixed = torch.tensor([[0.0], [2.0], [2.0], [4.0]])  # between groups 4 x 1, within 4 x 1
    assert explained_variance(mixed, groups) == pytest.approx(0.5)


def test_kernels_shares_add_up_to_one(pipeline):
    for activation in ("softmax", "sigmoid"):
        conv = student_of(pipeline, "prompt", activation).unet.get_submodule(CONV)
        assert isinstance(conv, CondConv2d)
        with torch.no_grad():
            conv.router.bias.copy_(torch.tensor([0.3, -2.0]))
            rows = conv.probabilities(conv.routing(torch.randn(2, 32, 8, 8), None, torch.randn(2, 32)))
        assert torch.allclose(rows.sum(1), torch.ones(2)) and (rows > 0).all() and (rows[:, 0] > rows[:, 1]).all()


def test_what_cannot_be_looked_at_is_said(pipeline, data_folder):
    with pytest.raises(AsdmError, match="no expert kernels; plan some by asdm plan --experts"):
        asdm.expert_usage(pipeline, PROMPTS)
    with pytest.raises(AsdmError, match="noto: one group alone is not divided"):
        asdm.expert_usage(pipeline, {"noto": PROMPTS["noto"]})
    with pytest.raises(AsdmError, match="0 groups by style; rows of its metadata"):
        prompts_by_label(data_folder, "style")


def test_the_command_prints_and_saves_the_usage(pipeline, data_folder, tmp_path, monkeypatch, capsys):
    from asdm.cli import loading
    from asdm.cli.app import app

    rows = data_folder / "metadata.jsonl"
    lines = rows.read_text().splitlines()
    styled = [line.replace("{", f'{{"style": "{style}", ', 1) for line, style in zip(lines, "ababab", strict=True)]
    rows.write_text("\n".join(styled))
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: student_of(pipeline, "prompt"))
    out = tmp_path / "experts.json"
    app(
        ["analyze", "x", "--experts", "style", "--data", str(data_folder), "--samples", "2", "--out", str(out)],
        standalone_mode=False,
    )
    assert "2 a, 2 b" in capsys.readouterr().out and CONV in out.read_text()
    with pytest.raises(AsdmError, match="--experts: looks at routers"):
        app(["analyze", "x", "--experts", "style"], standalone_mode=False)
