"""What is fitted in the place of removed branches: exact start, the least-squares optimum, order, files."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from asdm import AsdmError, PruningPlan, analyze, build_student, fit_compensation, with_unet
from asdm.compensation import partial_calls, projections
from asdm.compensation.fitting import (
    _states_around,
    fitted_tensors,
    prediction_error,
    predictions,
    samples_to_fit,
    samples_to_fit_trials,
)
from asdm.compensation.partial_calls import PartialCalls
from asdm.compensation.projections import unit_projections
from asdm.compensation.regression import RidgeRegression
from asdm.data.calibration import CalibrationCall, calibration_calls
from asdm.edits import candidate_edits
from asdm.families import Branch, UNetFamily, Unit, family_of
from asdm.student.unet import AsdmUNet2DConditionModel
from conftest import predict, tiny_pipeline, tiny_sdxl_pipeline, tiny_unet

RESNET, FOLDING = "down_blocks.0.resnets.1", "up_blocks.1.resnets.1"
ATTENTION = "down_blocks.1.attentions.1"
ATTN1, FF = (f"up_blocks.3.attentions.1.transformer_blocks.0.{branch}" for branch in ("attn1", "ff"))
UNITS = (RESNET, FOLDING, ATTENTION, ATTN1, FF, "mid_block")


def plan_of(unet, units=UNITS, **fields):
    return PruningPlan.for_unet(unet, [{"edit": "remove", "unit": unit, **fields} for unit in units])


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_pipeline()
    with torch.no_grad():  # branches of random weights say little; these say enough to be missed
        for name, parameter in pipeline.unet.named_parameters():
            if name.endswith(("conv2.weight", "proj_out.weight", "to_out.0.weight", "net.2.weight")):
                parameter.mul_(4)
    return pipeline


@pytest.mark.parametrize("kind", ["bias", "diagonal", "linear"])
def test_before_the_fit_it_is_the_plain_pruned_student(pipeline, kind):
    plain = build_student(pipeline.unet, plan_of(pipeline.unet))
    compensated = build_student(pipeline.unet, plan_of(pipeline.unet, compensate=kind))
    assert torch.allclose(predict(compensated), predict(plain), atol=1e-5)


def test_none_is_bit_identical_to_plain_removal_in_output_and_config(pipeline):
    plain = build_student(pipeline.unet, plan_of(pipeline.unet))
    named = build_student(pipeline.unet, plan_of(pipeline.unet, compensate="none"))
    assert torch.equal(predict(named), predict(plain))
    assert named.config["edits"] == [{"edit": "remove", "unit": unit} for unit in UNITS]


@pytest.mark.parametrize(("kind", "better_than"), [("diagonal", 1.0), ("linear", 0.7)])
def test_the_fit_brings_the_prediction_nearer_to_the_teachers(pipeline, kind, better_than):
    student = build_student(pipeline.unet, plan_of(pipeline.unet, compensate=kind))
    report = fit_compensation(pipeline, student, timesteps=4, samples=4)
    assert report.error_after < better_than * report.error_before
    assert set(report.left_by_unit) == set(UNITS)
    assert all(left <= 1 for left in report.left_by_unit.values())


def test_units_are_fitted_in_order_of_execution(pipeline):
    student = build_student(pipeline.unet, plan_of(pipeline.unet, reversed(UNITS), compensate="linear"))
    order = []
    fit_compensation(
        pipeline, student, timesteps=1, samples=2, progress=lambda done, total, name: order.append((done, total, name))
    )
    expected = (RESNET, ATTENTION, "mid_block", FOLDING, ATTN1, FF)
    assert order == [(i + 1, 6, name) for i, name in enumerate(expected)]


def test_a_fit_into_a_pretrained_shortcut_adds_no_tensor(pipeline):
    plain = build_student(pipeline.unet, plan_of(pipeline.unet, [FOLDING]))
    folded = build_student(pipeline.unet, plan_of(pipeline.unet, [FOLDING], compensate="linear"))
    assert {n: t.shape for n, t in folded.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    fit_compensation(pipeline, folded, timesteps=2, samples=2)
    assert not torch.equal(predict(folded), predict(plain))
    assert set(fitted_tensors(folded)) == {f"{FOLDING}.conv_shortcut.weight", f"{FOLDING}.conv_shortcut.bias"}


def test_the_teacher_is_not_touched(pipeline):
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    student = build_student(pipeline.unet, plan_of(pipeline.unet, compensate="linear"))
    fit_compensation(pipeline, student, timesteps=1, samples=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert not any(module._forward_hooks for module in [*pipeline.unet.modules(), *student.modules()])


def test_a_time_term_uses_what_the_input_does_not_tell(pipeline):
    def error(**fields):
        student = build_student(pipeline.unet, plan_of(pipeline.unet, [RESNET], **fields))
        return fit_compensation(pipeline, student, timesteps=8, samples=4).left_by_unit[RESNET]

    assert error(compensate="bias", compensate_time=True) < 0.999 * error(compensate="bias")


def test_save_and_load_is_bit_identical(pipeline, tmp_path):
    plan = plan_of(pipeline.unet, [RESNET], compensate="linear", compensate_time=True)
    student = build_student(pipeline.unet, plan)
    fit_compensation(pipeline, student, timesteps=2, samples=2)
    student.save_pretrained(tmp_path)
    assert torch.equal(predict(AsdmUNet2DConditionModel.from_pretrained(tmp_path)), predict(student))
    with pytest.raises(ValueError, match="does not exist"):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_sdxl_students_are_compensated_too():
    pipeline = tiny_sdxl_pipeline()
    unit = "down_blocks.1.attentions.0.transformer_blocks.0.ff"
    student = build_student(pipeline.unet, plan_of(pipeline.unet, [unit, "mid_block"], compensate="linear"))
    report = fit_compensation(pipeline, student, timesteps=8, samples=8)
    assert report.error_after < 0.9 * report.error_before


@pytest.mark.parametrize(
    ("unit", "fields", "message"),
    [
        (ATTENTION, {"compensate": "linear", "compensate_time": True}, "no time embedding"),
        ("down_blocks.3", {"compensate": "bias"}, "lowest-resolution level has no compensation"),
        (RESNET, {"compensate": "quadratic"}, "quadratic"),
        (RESNET, {"compensate": "diagonal", "compensate_time": True}, "bias or linear"),
        (RESNET, {"compensate_time": True}, "bias or linear"),
    ],
)
def test_what_cannot_be_compensated_is_said(pipeline, unit, fields, message):
    with pytest.raises(AsdmError, match=message):
        plan_of(pipeline.unet, [unit], **fields)


def test_regression_from_sums_equals_least_squares_on_all_rows():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 5, generator=generator) + 3
    targets = features @ torch.randn(5, 2, generator=generator) + torch.randn(300, 2, generator=generator) - 1
    with_constant = torch.cat([features, torch.ones(300, 1)], 1)
    solution = torch.linalg.lstsq(with_constant, targets).solution
    regression = RidgeRegression(is_diagonal=False)
    for rows in torch.arange(300).split(60):
        regression.add(features[rows].view(6, 10, 5), targets[rows].view(6, 10, 2))
    weight, bias, left = regression.solve(ridge=0.0)
    assert torch.allclose(weight, solution[:5].mT, atol=1e-4)
    assert torch.allclose(bias, solution[5], atol=1e-3)
    residual = targets - with_constant @ solution
    # What is left is told by the other half of the samples: a little more than the fit to all of them leaves.
    fitted = float(residual.square().sum() / targets.square().sum())
    assert fitted < left < 1.1 * fitted


def test_the_ridge_is_the_one_that_serves_the_other_half():
    generator = torch.Generator().manual_seed(0)
    features, noise = torch.randn(2, 16, 3, 20, generator=generator)
    few, telling = RidgeRegression(is_diagonal=False), RidgeRegression(is_diagonal=False)
    few.add(features, features + noise)  # each half has 24 rows of 20 features
    telling.add(features, 2 * features)
    chosen, fixed = few.solve(), few.solve(ridge=1e-4)
    assert (chosen[0] - torch.eye(20)).norm() < 0.75 * (fixed[0] - torch.eye(20)).norm()
    assert chosen[2] < 0.9
    # What serves the other half less than nothing at all is not used.
    assert fixed[2] == 1 and not fixed[0].any() and not fixed[1].any()
    torch.testing.assert_close(telling.solve()[0], 2 * torch.eye(20), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("calls", "positions"), [(1, 48), (2, 23), (48, 1)])
def test_a_single_sample_leaves_positions_to_validate_on(calls, positions):
    features, noise = torch.randn(2, calls, 1, positions, 20, generator=torch.Generator().manual_seed(0))
    nothing, identity = RidgeRegression(is_diagonal=False), RidgeRegression(is_diagonal=False)
    for read, unrelated in zip(features, noise, strict=True):
        nothing.add(read, unrelated)
        identity.add(read, read)
    weight, bias, left = nothing.solve()
    assert weight.norm() < 0.5 and bias.norm() < 0.5 and left >= 0.9  # a fit to all rows explains 40% of the noise
    torch.testing.assert_close(identity.solve()[0], torch.eye(20), atol=1e-2, rtol=0)


def test_a_projection_that_is_tried_on_one_sample_is_not_overfitted(pipeline):
    settings = {"data": "demo", "timesteps": 1, "samples": 1, "latency_rounds": 1}
    fitted, plain = (analyze(pipeline, compensate=kind, **settings) for kind in ("linear", "none"))
    for unit, removed in zip(fitted.units, plain.units, strict=True):
        assert unit.sensitivity < 1.1 * removed.sensitivity, unit.name
    assert samples_to_fit_trials(pipeline, 1) == samples_to_fit(pipeline)
    assert samples_to_fit_trials(pipeline, 2) == 2


def test_features_that_never_vary_leave_the_mean_as_the_map():
    regression = RidgeRegression(is_diagonal=False)
    regression.add(torch.ones(8, 3, 4), torch.full((8, 3, 2), 5.0))
    weight, bias, left = regression.solve()
    assert torch.allclose(weight @ torch.ones(4) + bias, torch.full((2,), 5.0))
    assert left == pytest.approx(0, abs=1e-6)


def test_diagonal_regression_is_one_line_for_each_channel():
    features = torch.randn(5, 10, 2, generator=torch.Generator().manual_seed(0))
    regression = RidgeRegression(is_diagonal=True)
    regression.add(features, features * torch.tensor([2.0, -1.0]) + torch.tensor([0.5, 3.0]))
    weight, bias, left = regression.solve(ridge=0.0)
    assert torch.allclose(weight, torch.tensor([2.0, -1.0]), atol=1e-5)
    assert torch.allclose(bias, torch.tensor([0.5, 3.0]), atol=1e-5)
    assert left == pytest.approx(0, abs=1e-6)


def test_units_are_tried_in_the_unets_own_precision(data_folder):
    pipeline = tiny_pipeline().to(torch.bfloat16)
    redundancy = analyze(pipeline, data=data_folder, timesteps=1, samples=2, latency_rounds=1)
    assert redundancy.compensate == "linear" and all(0 <= unit.sensitivity < 10 for unit in redundancy.units)
    assert {tensor.dtype for tensor in pipeline.unet.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["bias", "diagonal", "linear"])
@pytest.mark.slow
def test_a_unit_is_tried_with_the_map_that_a_plan_of_it_alone_would_get(pipeline, data_folder, kind):
    """In an ablation with compensations, each unit's error is that of a student which lacks it alone."""
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    settings = {"data": data_folder, "timesteps": 2, "samples": 4, "seed": 3}
    redundancy = analyze(pipeline, compensate=kind, latency_rounds=1, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    calls = calibration_calls(pipeline, data_folder, None, 2, 4, 3)
    by_name = {unit.name: unit.sensitivity for unit in redundancy.units}
    for unit in (
        "down_blocks.1.resnets.1",  # the identity as its shortcut
        "up_blocks.1.resnets.0",  # a convolution, in which the map folds
        "mid_block.attentions.0",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
    ):
        edit = {"edit": "remove", "unit": unit, "compensate": kind}
        student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, [edit]))
        fit_compensation(pipeline, student, **(settings | {"seed": 4}))
        error = prediction_error(student, calls, predictions(pipeline.unet, calls))
        assert by_name[unit] == pytest.approx(error, rel=1e-2), unit
    if kind == "linear":
        plain = analyze(pipeline, compensate="none", latency_rounds=1, **settings)
        assert sum(by_name.values()) < 0.8 * sum(unit.sensitivity for unit in plain.units)
        assert (redundancy.compensate, plain.compensate) == ("linear", "none")


def test_a_fit_that_can_keep_nothing_is_the_same(pipeline, monkeypatch):
    fits = []
    for kept in (partial_calls.CACHE_BYTES, 300_000, 0):
        monkeypatch.setattr(partial_calls, "CACHE_BYTES", kept)
        student = build_student(pipeline.unet, plan_of(pipeline.unet, compensate="linear"))
        fit_compensation(pipeline, student, timesteps=2, samples=4)
        fits.append(fitted_tensors(student))
    for fit in fits[1:]:
        assert all(torch.equal(tensor, fits[0][name]) for name, tensor in fit.items())


def test_predictions_give_the_sample_by_its_place(pipeline):
    calls, places = calibration_calls(pipeline, None, None, 2, 2, 0), []
    handle = pipeline.unet.register_forward_pre_hook(lambda _module, args: places.append(args))
    predictions(pipeline.unet, calls)
    handle.remove()
    assert [args[0] is call.arguments["sample"] for args, call in zip(places, calls, strict=True)] == [True, True]


class Block(nn.Module):
    """A transformer block with branches of three kinds: gated outside the module, behind its own norm, and direct."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.gated, self.normed, self.direct = (nn.Linear(6, 6) for _ in range(3))
        self.family = BlockFamily()

    def forward(self, hidden_states):
        hidden_states = hidden_states + 0.3 * self.gated(2 * self.norm1(hidden_states) + 1)
        hidden_states = hidden_states + self.normed(self.norm2(hidden_states))
        return hidden_states + self.direct(hidden_states)


class BlockFamily(UNetFamily):
    def branch(self, model, unit):
        norm = {"gated": "norm1", "normed": "norm2"}.get(unit)
        return Branch(unit, 6, norm=norm, is_gated=unit == "gated")

    def execution_order(self, model):
        return []

    def predict(self, model, arguments):
        return model(**arguments)


@pytest.fixture
def block_and_calls():
    torch.manual_seed(0)
    return Block(), [CalibrationCall(0, {"hidden_states": torch.randn(8, 20, 6)})]


@torch.no_grad()
def test_a_gated_branch_is_fitted_from_what_it_reads_to_its_own_output(block_and_calls):
    block, calls = block_and_calls
    units, states = [Unit(name, "feed_forward") for name in ("gated", "normed", "direct")], {}
    for name, layer in block.named_children():
        layer.register_forward_hook(lambda _, args, output, name=name: states.update({name: (args[0], output)}))
    fitted = unit_projections(block, units, calls, "linear", ridge=0.0)
    for name in ("gated", "direct"):  # both are linear in what they read
        read, output = states[name]
        torch.testing.assert_close(nn.functional.linear(read, *fitted[name]), output, atol=1e-3, rtol=0)
    read, output = states["norm2"][0], states["normed"][1]  # what enters the norm that goes with the branch
    left = (nn.functional.linear(read, *fitted["normed"]) - output).square().sum() / output.square().sum()
    assert 1e-3 < left < 0.3


@torch.no_grad()
def test_units_whose_sums_have_no_room_together_are_fitted_in_groups(block_and_calls, monkeypatch):
    block, calls = block_and_calls
    units = [Unit(name, "feed_forward") for name in ("gated", "normed", "direct")]
    at_once = unit_projections(block, units, calls, "linear")
    sums = 2 * 2 * 6 * 6 * 8  # halves, products, their rows and columns, bytes
    monkeypatch.setattr(projections, "SUMS_BYTES", 2 * sums)
    made, solved = [], []
    block.register_forward_pre_hook(lambda *_: made.append(len(solved)))
    solve = RidgeRegression.solve

    def counted(regression, ridge):
        assert all(half.values[2].nbytes + half.values[3].nbytes == sums / 2 for half in regression.halves)
        solved.append(regression)
        return solve(regression, ridge)

    monkeypatch.setattr(RidgeRegression, "solve", counted)
    in_groups = unit_projections(block, units, calls, "linear")
    assert made == [0, 2]  # two are solved before the third one's sums begin
    assert list(in_groups) == list(at_once)
    for name, tensors in in_groups.items():
        assert all(torch.equal(*pair) for pair in zip(tensors, at_once[name], strict=True)), name


@torch.no_grad()
def test_the_states_behind_a_branch_are_the_sum_unless_it_is_gated(block_and_calls):
    block, calls = block_and_calls
    family, runs = block.family, PartialCalls(block, calls)
    start = calls[0].arguments["hidden_states"]
    modulated = 2 * block.norm1(start) + 1
    entered = start + 0.3 * block.gated(modulated)
    behind = entered + block.normed(block.norm2(entered))
    expected = {
        "gated": (modulated, block.gated(modulated)),
        "normed": (entered, behind),
        "direct": (behind, behind + block.direct(behind)),
    }
    for name, states in expected.items():
        torch.testing.assert_close(_states_around(runs, family.branch(block, name), 0), states)


@pytest.mark.parametrize("unit", ["mid_block", "mid_block.attentions.0.transformer_blocks.0.ff"])
def test_what_is_left_at_a_higher_resolution_is_fitted_too(unit):
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=tiny_unet(sample_size=32))
    edits = [{"edit": "remove", "unit": "down_blocks.3"}, {"edit": "remove", "unit": unit, "compensate": "linear"}]
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    report = fit_compensation(pipeline, student, timesteps=1, samples=4)
    assert report.left_by_unit[unit] < 1


def test_a_part_without_units_can_be_removed_and_fitted_but_is_not_offered(pipeline):
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    once = with_unet(pipeline, build_student(pipeline.unet, plan_of(pipeline.unet, middle, compensate="linear")))
    student = build_student(once.unet, plan_of(once.unet, ["mid_block"], compensate="linear"))
    report = fit_compensation(once, student, timesteps=1, samples=2)
    assert set(report.left_by_unit) == {"mid_block"}
    family = family_of(once.unet)
    found = candidate_edits(once.unet, family, dict.fromkeys(family.layers(once.unet), 1))
    assert [edit.unit for edit in found] == ["down_blocks.3"]
