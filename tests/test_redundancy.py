"""The map tells what removal of each unit costs and saves, and its shortcut is exact."""

import json
from contextlib import contextmanager

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from asdm import AsdmError, GriAttention, PruningPlan, RedundancyMap, analyze, build_student, make_plan, with_unet
from asdm.data.calibration import UNAFFORDABLE, CalibrationCall, calibration_calls
from asdm.edits import Remove
from asdm.evaluation.plots import redundancy_plot
from asdm.families.unet_structure import removable_units
from asdm.sensitivity.ablation import Trial, ablate, trials_of
from asdm.sensitivity.taylor import taylor_sensitivity
from conftest import predict, tiny_pipeline, tiny_sdxl_pipeline, unet_inputs


def removals(unet, units):
    return trials_of(unet, [Remove(unit=unit.name) for unit in units])


def naive_errors(unet, arguments, units):
    reference = predict(unet, **arguments)
    errors = {}
    for unit in units:
        student = build_student(unet, PruningPlan.for_unet(unet, [{"edit": "remove", "unit": unit.name}]))
        errors[unit.name] = float((predict(student, **arguments) - reference).square().sum() / reference.square().sum())
    return errors


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_replaying_prefixes_gives_the_errors_of_real_removals(make):
    unet = make().unet
    arguments = unet_inputs(unet)
    units = removable_units(unet)
    with torch.no_grad():
        errors, _ = ablate(unet, removals(unet, units), [CalibrationCall(321, arguments)], None)
    # Of every kind, in all stages, before and behind each other.
    for name, expected in naive_errors(unet, arguments, units[::5]).items():
        assert errors[name][321] == pytest.approx(expected, rel=1e-4, abs=1e-10), name


def test_analysis_leaves_the_pipeline_as_it_was(pipeline):
    modules = {name: id(module) for name, module in pipeline.unet.named_modules()}
    before = predict(pipeline.unet)
    analyze(pipeline, timesteps=1, samples=2, latency_rounds=1)
    assert {name: id(module) for name, module in pipeline.unet.named_modules()} == modules
    assert torch.equal(predict(pipeline.unet), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.unet.modules())


@pytest.mark.parametrize("make", [tiny_pipeline, pytest.param(tiny_sdxl_pipeline, marks=pytest.mark.slow)])
def test_map_adds_up(make):
    pipeline = make()
    seen = []
    redundancy = analyze(
        pipeline,
        timesteps=2,
        samples=2,
        latency_rounds=3,
        progress=lambda done, total, name: seen.append((done, total)),
    )
    assert [unit.name for unit in redundancy.units] == [unit.name for unit in removable_units(pipeline.unet)]
    trials = len(redundancy.units) + len(redundancy.others)
    assert seen[-1] == (trials * 2, trials * 2)
    total = sum(p.numel() for p in pipeline.unet.parameters())
    for unit in redundancy.units[::6]:
        plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": unit.name}])
        left = sum(p.numel() for p in build_student(pipeline.unet, plan).parameters())
        assert unit.parameters == total - left, unit.name
    for unit in redundancy.units:
        assert unit.gmacs >= unit.gmacs_without_attention > 0
        assert unit.latency_ms >= 0
        assert unit.sensitivity == pytest.approx(sum(unit.sensitivity_by_timestep.values()) / 2)
        assert set(unit.sensitivity_by_timestep) == set(redundancy.timesteps) == {250, 750}
    top = [unit for unit in redundancy.units if unit.parent is None]
    assert sum(unit.latency_share for unit in top) < 1
    assert redundancy.necessary_forwards < len(redundancy.units) * 2


@pytest.mark.slow
def test_same_seed_gives_the_same_sensitivities(pipeline):
    first, second = (analyze(pipeline, timesteps=1, samples=2, latency_rounds=1, seed=3) for _ in range(2))
    assert [u.sensitivity for u in first.units] == [u.sensitivity for u in second.units]
    other = analyze(pipeline, timesteps=1, samples=2, latency_rounds=1, seed=4)
    assert [u.sensitivity for u in first.units] != [u.sensitivity for u in other.units]


def test_calibration_on_data_uses_its_images(pipeline, data_folder):
    before = analyze(pipeline, data=data_folder, timesteps=1, samples=2, latency_rounds=1)
    for path in data_folder.glob("*.png"):
        Image.new("RGB", (16, 16), "red").save(path)
    after = analyze(pipeline, data=data_folder, timesteps=1, samples=2, latency_rounds=1)
    assert [u.sensitivity for u in before.units] != [u.sensitivity for u in after.units]


def test_a_student_without_its_innermost_stage_can_be_analysed(pipeline):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "down_blocks.3"}])
    student = with_unet(pipeline, build_student(pipeline.unet, plan))
    redundancy = analyze(student, timesteps=1, samples=1, latency_rounds=1)
    assert {unit.block for unit in redundancy.units} == {
        *(f"down_blocks.{i}" for i in range(3)),
        "mid_block",
        *(f"up_blocks.{i}" for i in range(1, 4)),
    }


def test_map_survives_its_file(pipeline, tmp_path):
    redundancy = analyze(pipeline, timesteps=1, samples=1, latency_rounds=1)
    redundancy.save(tmp_path / "map.json")
    assert RedundancyMap.load(tmp_path / "map.json") == redundancy
    named = json.loads((tmp_path / "map.json").read_text())
    assert named.pop("denoiser_class") == "UNet2DConditionModel"
    (tmp_path / "old.json").write_text(json.dumps(named))  # version 0.1 knew UNets alone
    assert RedundancyMap.load(tmp_path / "old.json") == redundancy
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad", "absent"):
        with pytest.raises(AsdmError, match=f"{name}.json"):
            RedundancyMap.load(tmp_path / f"{name}.json")


def test_plot_crosses_out_what_the_plan_removes(pipeline):
    redundancy = analyze(pipeline, timesteps=1, samples=1, latency_rounds=1)

    def crosses(plan):
        figure = redundancy_plot(redundancy, plan)
        count = sum(line.get_color() == "red" for line in figure.axes[0].lines)
        plt.close(figure)
        return count

    assert crosses(None) == 0
    assert crosses(PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block.resnets.0"}])) == 2
    stage = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "down_blocks.3"}])
    assert crosses(stage) == 2 * 5  # two resnets down and three up


def test_taylor_estimate_is_the_first_order_move_of_the_prediction():
    """With branches scaled to a hundredth, removal moves the prediction by what the derivative says."""
    from scipy.stats import spearmanr

    unet = tiny_pipeline().unet
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith(("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias")):
                parameter.mul_(0.01)
    generator = torch.Generator().manual_seed(0)
    arguments = {
        "sample": torch.randn(4, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([300] * 4),
        "encoder_hidden_states": torch.randn(4, 5, unet.config.cross_attention_dim, generator=generator),
    }
    units, calls = removable_units(unet), [CalibrationCall(300, arguments)]
    before = [parameter.requires_grad for parameter in unet.parameters()]
    estimate = taylor_sensitivity(unet, units, calls, probes=64)
    with torch.no_grad():
        exact, _ = ablate(unet, removals(unet, units), calls, None)
    ratios = torch.tensor([estimate[unit.name][300] / exact[unit.name][300] for unit in units])
    # 256 draws: the estimate's deviation is 9%; parts of attentions are not scaled, and not all linear.
    assert 0.95 < ratios.median() < 1.05
    assert (ratios.log().abs() < 0.5).float().mean() > 0.8
    assert spearmanr([e[300] for e in estimate.values()], [e[300] for e in exact.values()]).statistic > 0.97
    assert before == [parameter.requires_grad for parameter in unet.parameters()]
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize(("sensitivity", "value"), [("ablation", float("nan")), ("taylor", 0.0)])
def test_predictions_that_say_nothing_are_named_by_their_time_step(pipeline, sensitivity, value):
    pipeline.unet.conv_out.weight.data.fill_(value)
    pipeline.unet.conv_out.bias.data.zero_()
    with pytest.raises(AsdmError, match="time step 500 is not finite, or all zero, in float32"):
        analyze(pipeline, data="demo", sensitivity=sensitivity, timesteps=1, samples=2, latency_rounds=1)


@torch.no_grad()
def test_a_trial_whose_prediction_overflows_is_dearer_than_all_others(unet):
    @contextmanager
    def overflowing():
        kept = unet.conv_out.bias.clone()
        unet.conv_out.bias.fill_(float("inf"))
        yield
        unet.conv_out.bias.copy_(kept)

    units = removable_units(unet)[:2]
    trials = [*removals(unet, units), Trial("overflows", "up_blocks.3.resnets.1", overflowing)]
    errors, _ = ablate(unet, trials, [CalibrationCall(321, unet_inputs(unet))], None)
    assert errors["overflows"] == {321: UNAFFORDABLE}
    assert all(0 < errors[unit.name][321] < 100 for unit in units)


def test_a_gradient_that_overflows_is_named_by_its_unit(unet):
    units, arguments = removable_units(unet)[:1], unet_inputs(unet)
    layer = unet.get_submodule("up_blocks.3.resnets.1")
    layer.register_full_backward_hook(lambda _module, inputs, _: (inputs[0] * float("inf"), *inputs[1:]))
    with pytest.raises(AsdmError, match=f"^{units[0].name}: its gradient at time step 321 is not finite"):
        taylor_sensitivity(unet, units, [CalibrationCall(321, arguments)], probes=1)


def test_taylor_map_says_how_it_was_made_and_what_it_cost():
    redundancy = analyze(tiny_pipeline(), sensitivity="taylor", timesteps=2, samples=2, latency_rounds=3)
    assert redundancy.estimator == "taylor"
    assert all(unit.sensitivity > 0 for unit in redundancy.units)
    assert redundancy.unet_forwards < redundancy.necessary_forwards


def test_random_weights_are_estimated_as_they_are_for_speed_alone():
    pipeline = tiny_pipeline()
    pipeline.register_to_config(_name_or_path="random:tiny")
    redundancy = analyze(pipeline, timesteps=1, samples=1, latency_rounds=1)
    assert (redundancy.estimator, redundancy.compensate) == ("taylor", "none")


@pytest.fixture
def many_tokens(monkeypatch):
    monkeypatch.setattr("asdm.edits.regional_attention.MANY_TOKENS", 64)  # the outer level of the tiny UNets


@pytest.mark.parametrize(
    ("even_more", "kinds"), [(64, [(4, 4), (8, 8)]), (65, [(4, 2), (4, 4)])], ids=["large map", "small map"]
)
def test_regions_are_smaller_where_tokens_are_more(pipeline, many_tokens, monkeypatch, even_more, kinds):
    monkeypatch.setattr("asdm.edits.regional_attention.EVEN_MORE_TOKENS", even_more)
    redundancy = analyze(pipeline, sensitivity="taylor", timesteps=1, samples=1, latency_rounds=1)
    regional = [record.edit for record in redundancy.others if record.edit["edit"] == "gri_attention"]
    assert [(edit.get("regions", 4), edit.get("pool", 2)) for edit in regional] == kinds * 5
    errors = [record.sensitivity for record in redundancy.others if record.edit["edit"] == "gri_attention"]
    if even_more == 65:  # 8x8 squares of an 8x8 map are the whole, so that only these kinds differ from each other
        assert all(error > 0 for error in errors) and len(set(errors)) == len(errors)  # each by its own estimate


@pytest.mark.parametrize("sensitivity", ["ablation", pytest.param("taylor", marks=pytest.mark.slow)])
def test_other_edits_cost_and_save_what_a_student_with_them_does(pipeline, many_tokens, sensitivity):
    unet = pipeline.unet
    redundancy = analyze(pipeline, sensitivity=sensitivity, timesteps=1, samples=2, latency_rounds=1, seed=1)
    edits = {str(record.edit["unit"]): record for record in redundancy.others}
    outer = [
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        *(f"up_blocks.3.attentions.{i}" for i in range(3)),
    ]
    assert list(edits) == [*(f"{name}.transformer_blocks.0.attn1" for name in outer), "mid_block", "down_blocks.3"]
    call = calibration_calls(pipeline, None, None, 1, 2, 1)[0]
    reference, total = predict(unet, **call.arguments), sum(p.numel() for p in unet.parameters())
    for record in redundancy.others:
        student = build_student(unet, PruningPlan.for_unet(unet, [record.edit]))
        error = float((predict(student, **call.arguments) - reference).square().sum() / reference.square().sum())
        # Taylor's estimate is of the first order, and from a few random projections.
        assert record.sensitivity == pytest.approx(error, rel=1e-3 if sensitivity == "ablation" else 3)
        assert record.parameters == total - sum(p.numel() for p in student.parameters())
    gone = {unit.name for unit in redundancy.units if unit.block in ("down_blocks.3", "up_blocks.0")}
    assert set(edits["down_blocks.3"].covers) == gone
    assert edits["mid_block"].parameters == sum(p.numel() for p in unet.mid_block.parameters())
    assert edits["mid_block"].gmacs > edits["mid_block"].gmacs_without_attention > 0
    attention = edits["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    assert attention.gmacs > attention.gmacs_without_attention == 0


def test_a_plan_chooses_among_all_kinds_of_edits_and_none_twice(pipeline, many_tokens):
    redundancy = analyze(pipeline, timesteps=1, samples=1, latency_rounds=1)
    regional = {record.edit["unit"] for record in redundancy.others if record.edit["edit"] == "gri_attention"}

    def edits_where(free: str) -> list:
        """The plan's edits where one kind of edit moves the prediction hardly at all, and attentions cannot go."""
        others = [
            record.model_copy(
                update={"sensitivity": 1e-9 if record.edit["edit"] == free or record.edit["unit"] == free else 9.0}
            )
            for record in redundancy.others
        ]
        units = [
            unit.model_copy(update={"sensitivity": 9.0 if unit.name in regional else unit.sensitivity})
            for unit in redundancy.units
        ]
        return make_plan(redundancy.model_copy(update={"others": others, "units": units}), macs=0.7).edits

    assert sum(isinstance(edit, GriAttention) for edit in edits_where("gri_attention")) >= 3
    assert "mid_block" in [edit.unit for edit in edits_where("mid_block")]
    for free in ("gri_attention", "mid_block", "down_blocks.3", "nothing"):
        edits = edits_where(free)
        PruningPlan.for_unet(pipeline.unet, edits)  # refuses edits that meet
        assert free == "down_blocks.3" or "down_blocks.3" not in [edit.unit for edit in edits]
