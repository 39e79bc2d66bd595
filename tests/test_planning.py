"""A plan is the least sensitive set inside the budget, and the budget is measured."""

import json
from itertools import combinations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel

from asdm import AsdmError, CondConv, PruningPlan, add_cond_conv, analyze, build_student, make_plan
from asdm.compensation.folding import fold_projections
from asdm.families import denoiser_call, macs_of_call
from asdm.families.tensors import fingerprint
from asdm.families.unet_structure import removable_units
from asdm.measure import latency
from asdm.measure.latency import Ratio
from asdm.measure.macs import counting_macs
from asdm.pipelines.random_models import UNETS, random_unet
from asdm.planning import portable
from asdm.planning.full_plan import full_plan
from asdm.planning.possible_edits import joint_savings, plan_of, possible_edits, saved_by
from asdm.planning.presets import require_preset
from asdm.planning.program import least_sensitive, most_saved
from asdm.planning.speedup import measured_speedup
from asdm.sensitivity.analysis import plain_config, structure_map
from asdm.sensitivity.profile import RedundancyMap, UnitRecord
from asdm.student.build import empty_student
from conftest import profile_by_hand, tiny_pipeline, tiny_sdxl_pipeline, tiny_unet


def record(name, parent=None, sensitivity=1.0, cost=1.0):
    return UnitRecord(
        name=name,
        kind="attention",
        parent=parent,
        parameters=int(cost),
        gmacs=cost,
        gmacs_without_attention=cost,
        latency_ms=cost,
        latency_share=0.1,
        sensitivity=sensitivity,
        sensitivity_by_timestep={},
    )


def by_hand(units, needed):
    """The best set by trying all of them."""
    best = None
    for size in range(len(units) + 1):
        for chosen in combinations(units, size):
            names = {unit.name for unit in chosen}
            if any(unit.parent in names for unit in chosen) or sum(u.latency_ms for u in chosen) < needed:
                continue
            total = sum(unit.sensitivity for unit in chosen)
            if best is None or total < best:
                best = total
    return best


def choices_of(units):
    return possible_edits(RedundancyMap.model_construct(units=units, others=[]), "none")


def test_the_plan_is_the_best_of_all_sets():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        units = []
        for index in range(4):
            costs, sensitivities = torch.rand(3, generator=generator), torch.rand(3, generator=generator)
            units.append(record(f"a{index}", None, float(sensitivities.sum()), float(costs.sum()) + 0.1))
            units += [
                record(f"a{index}.{part}", f"a{index}", float(sensitivities[part]), float(costs[part]))
                for part in range(2)
            ]
        for needed in (0.5, 2.0, 3.5):
            choices = choices_of(units)
            chosen = [choice.edit.unit for choice in least_sensitive(choices, [c.ms for c in choices], needed)]
            records = [unit for unit in units if unit.name in chosen]
            assert sum(unit.latency_ms for unit in records) >= needed
            assert not any(unit.parent in chosen for unit in records)
            assert sum(unit.sensitivity for unit in records) == pytest.approx(by_hand(units, needed), abs=1e-3)


def test_more_than_everything_has_no_plan():
    choices = choices_of([record("a"), record("b")])
    assert least_sensitive(choices, [1.0, 1.0], 2.5) is None
    assert most_saved(choices, [1.0, 1.0]) == 2.0


def test_a_pair_counts_by_what_it_saves_together():
    choices = choices_of([record("a"), record("b", sensitivity=1.1), record("c", sensitivity=1.5)])
    savings = [1.0, 1.0, 1.5]
    assert [choice.edit.unit for choice in least_sensitive(choices, savings, 2.4)] == ["a", "c"]
    more, less = [(0, 1, 0.5)], [(0, 2, -0.2), (1, 2, -0.2)]
    assert [choice.edit.unit for choice in least_sensitive(choices, savings, 2.4, pairs=more)] == ["a", "b"]
    assert len(least_sensitive(choices, savings, 2.4, pairs=less)) == 3
    assert most_saved(choices, savings, more) == pytest.approx(4.0)
    assert most_saved(choices, savings, less) == pytest.approx(3.1)


LEVEL = "down_blocks.3"


@pytest.mark.parametrize(
    "removed", [[LEVEL], ["mid_block"], [LEVEL, "mid_block"], [LEVEL, "mid_block.resnets.0", "mid_block.attentions.0"]]
)
@pytest.mark.parametrize("compensate", ["none", "diagonal"])
def test_the_lowest_level_and_the_mid_block_save_what_their_student_does(removed, compensate):
    """Without the level the mid block has four times the pixels."""
    unet = tiny_unet()
    known = structure_map(unet)
    chosen = [choice for choice in possible_edits(known, compensate) if choice.edit.unit in removed]
    student = empty_student(unet, plan_of(known, chosen, {})).to("meta")
    left = known.gmacs * 1e9 - saved_by(chosen, "macs")
    assert left == pytest.approx(macs_of_call(student).below(), rel=1e-3)
    assert known.parameters - saved_by(chosen, "parameters") == sum(p.numel() for p in student.parameters())


def test_a_profile_of_an_earlier_version_has_no_joint_savings(redundancy, tmp_path):
    content = json.loads(json.dumps(redundancy.model_dump()))
    for other in content["others"]:
        del other["enlarges"]
    (tmp_path / "profile.json").write_text(json.dumps(content))
    known = RedundancyMap.load(tmp_path / "profile.json")
    assert joint_savings(possible_edits(redundancy, "none"), "macs")
    assert not joint_savings(possible_edits(known, "none"), "macs") and make_plan(known, macs=0.5).edits


@pytest.mark.parametrize("preset", ["a-sdm-fast", "bk-tiny"])
def test_a_speedup_by_macs_is_that_of_the_student(preset):
    unet = tiny_unet()
    known = structure_map(unet)
    plan = make_plan(known, preset=preset, compensate="none")
    left = macs_of_call(empty_student(unet, plan).to("meta")).below() / 1e9
    assert plan.metrics.predicted_speedup == pytest.approx(known.gmacs / left)


@pytest.mark.parametrize("resource", ["macs", "params"])
def test_a_portable_plan_removes_no_more_than_its_budget_asks_for(resource):
    """A dropped layer's shortcut goes too, so a student's own size is a budget that it meets."""
    pipeline = tiny_pipeline()
    redundancy = profile_by_hand(pipeline)
    plan = make_plan(redundancy, portable=True, **{resource: 0.6})
    student = empty_student(pipeline.unet, plan).to("meta").eval()
    size, total = macs_of_call(student).below(), redundancy.gmacs * 1e9
    if resource == "params":
        size, total = sum(p.numel() for p in student.parameters()), redundancy.parameters
    assert size <= 0.6 * total
    assert plan.metrics.speedup_basis is None  # the speed-up is by the profile's latencies
    again = make_plan(redundancy, portable=True, **{resource: size / total * (1 + 1e-9)})
    assert again.metrics.predicted_sensitivity <= plan.metrics.predicted_sensitivity


@pytest.mark.parametrize("measured", [[1.05, 1.1, 1.08], [1.001]])
def test_a_portable_plan_that_misses_its_speedup_is_refused(measured, monkeypatch):
    """After the last attempt, and where no student is predicted to be so much faster."""
    found = iter(measured)
    monkeypatch.setattr(portable, "measured_speedup", lambda *_: Ratio(value := next(found), value, value))
    redundancy = profile_by_hand(tiny_pipeline())
    speedup = 1.3 if len(measured) > 1 else 2.5
    with pytest.raises(
        AsdmError, match=rf"^portable: speedup={speedup}: .* measured {max(measured):.2f}x at most; ask"
    ):
        make_plan(redundancy, speedup=speedup, portable=True, unet=tiny_unet())


def test_what_has_nothing_left_to_remove_has_no_plan(redundancy):
    bare = redundancy.model_copy(update={"units": [], "others": []})
    with pytest.raises(AsdmError, match=r"params=0\.5: out of reach; between 1\.000 and 1 of"):
        make_plan(bare, params=0.5)


@pytest.fixture(scope="module")
def redundancy() -> RedundancyMap:
    return analyze(tiny_pipeline(), timesteps=1, samples=1, latency_rounds=5)


def remaining(redundancy, plan):
    unet = random_unet(redundancy.unet_config)
    student = build_student(unet, plan)
    fold_projections(student)
    return sum(p.numel() for p in student.parameters()) / redundancy.parameters


def test_parameter_budget_holds(redundancy):
    for budget in (0.9, 0.6):
        assert remaining(redundancy, make_plan(redundancy, params=budget)) <= budget
    assert remaining(redundancy, make_plan(redundancy, params=0.7 * redundancy.parameters)) <= 0.7


def test_mac_budget_holds(redundancy):
    plan = make_plan(redundancy, macs=0.7)
    removed = {edit.unit for edit in plan.edits}
    assert sum(unit.gmacs for unit in redundancy.units if unit.name in removed) >= 0.3 * redundancy.gmacs


def test_a_tighter_budget_never_costs_less(redundancy):
    predicted = [make_plan(redundancy, params=budget).metrics.predicted_sensitivity for budget in (0.9, 0.7, 0.5)]
    assert predicted == sorted(predicted)


@pytest.mark.slow
def test_speedup_is_measured_and_reached(redundancy, monkeypatch):
    notes = []
    monkeypatch.setattr(latency, "PATIENCE", 20.0)
    plan = make_plan(redundancy, speedup=1.3, progress=notes.append)
    assert "measured" in notes[0]
    if plan.metrics.speedup_basis != "measured":  # other programs computed all the time
        assert plan.metrics.predicted_speedup >= 1.3
        return
    assert plan.metrics.measured_speedup >= 1.3
    assert measured_speedup(random_unet(redundancy.unet_config), plan, rounds=20).high > 1.15


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"speedup": 50.0}, r"speedup=50: out of reach.*ask for less"),
        ({"speedup": 500.0}, r"speedup=500: out of reach.*ask for less"),
        ({"speedup": 0.5}, r"speedup=0\.5: must be a finite number above 1"),
        ({"params": 0.0001}, r"params=0\.0001: out of reach; between 0\.\d+ and 1"),
        ({"params": -1.0}, r"params=-1\.0: must be a finite number above 0"),
        ({"macs": 1e30}, r"macs=1e\+30: the denoiser has .*; ask for fewer, or a share such as 0\.6"),
        ({"macs": 1e30, "portable": True}, r"macs=1e\+30: the denoiser has"),
        (
            {"params": 5},
            r"params=5: must be a share of the original's up to 1, .* or a number from 10000 on",
        ),
        ({"macs": 5000.0, "portable": True}, r"macs=5000: must be a share"),
        ({}, "exactly one of"),
        ({"speedup": 1.5, "params": 0.5}, "exactly one of.*got speedup, params"),
        ({"preset": "bk-huge"}, "bk-huge: no such preset; allowed: a-sdm"),
    ],
)
def test_an_unreachable_or_unclear_budget_says_what_is_reachable(redundancy, budget, message):
    with pytest.raises(AsdmError, match=message):
        make_plan(redundancy, **budget)


def full_size_map(shape):
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNETS[shape])
    units = [record(unit.name, unit.parent).model_copy(update={"kind": unit.kind}) for unit in removable_units(unet)]
    redundancy = RedundancyMap.model_construct(
        model="",
        units=units,
        others=[],
        unet_config=plain_config(unet),
        fingerprint=fingerprint(unet),
        latency_ms=1e6,
    )
    return unet, redundancy


@pytest.mark.parametrize(("preset", "levels"), [("bk-tiny", 2), ("bk-small", 1)])
def test_a_preset_that_leaves_too_few_levels_is_refused_by_its_name(preset, levels):
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D")[:levels], ("UpBlock2D", "CrossAttnUpBlock2D")[-levels:]
    unet = tiny_unet(block_out_channels=(32, 32)[:levels], down_block_types=down, up_block_types=up)
    with pytest.raises(
        AsdmError, match=f"^{preset}: keeps 2 levels at least, and this UNet has {levels}; give a budget"
    ):
        make_plan(structure_map(unet), preset=preset, unet=unet)


def test_a_preset_whose_student_cannot_be_built_is_refused():
    """SDXL's lowest-resolution level changes the channels, so it cannot go."""
    redundancy = profile_by_hand(tiny_sdxl_pipeline())
    with pytest.raises(AsdmError, match=r"^bk-tiny: a preset for models of another shape \(levels=2: .*give a budget"):
        make_plan(redundancy, preset="bk-tiny")
    unet = tiny_sdxl_pipeline().unet
    with pytest.raises(AsdmError, match=r"^bk-tiny: a preset for models of another shape"):
        require_preset(unet, "bk-tiny")
    assert require_preset(unet, "bk-small").edit is not None


def test_expert_kernels_do_not_go_with_dropped_layers(redundancy):
    plan = make_plan(redundancy, preset="bk-base")
    with pytest.raises(AsdmError, match=r"^drop_layers: goes with no other edit, so with no expert kernels; leave"):
        add_cond_conv(plan, random_unet(redundancy.unet_config), params=0.2)
    with pytest.raises(AsdmError, match=r"^drop_layers: goes with no other edit"):
        full_plan(redundancy, budget={"preset": "bk-base"}, experts=0.2)


def test_a_student_with_expert_kernels_gets_more_beside_them(pipeline):
    plan = make_plan(profile_by_hand(pipeline), macs=0.85)
    first = add_cond_conv(plan, pipeline.unet, params=0.3)
    pipeline.unet = build_student(pipeline.unet, first)
    more = add_cond_conv(make_plan(profile_by_hand(pipeline), macs=0.8), pipeline.unet, params=0.5)
    mixed = [[edit.unit for edit in made.edits if isinstance(edit, CondConv)] for made in (first, more)]
    assert mixed[1] and not set(mixed[0]) & set(mixed[1])
    build_student(pipeline.unet, more)


@pytest.mark.parametrize(("preset", "published"), [("bk-base", 579.4), ("bk-small", 482.3), ("bk-tiny", 323.4)])
def test_presets_have_bk_sdms_sizes(preset, published):
    """BK-SDM's sizes (arXiv 2305.15798, Tab. 1) in millions."""
    unet, redundancy = full_size_map("sd15")
    student = empty_student(unet, make_plan(redundancy, preset=preset))
    assert type(student) is UNet2DConditionModel
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(published, abs=0.05)


def test_presets_say_what_they_cost(redundancy):
    metrics = [make_plan(redundancy, preset=preset).metrics for preset in ("bk-base", "bk-small", "bk-tiny")]
    assert 0 < metrics[0].predicted_sensitivity < metrics[1].predicted_sensitivity < metrics[2].predicted_sensitivity
    assert all(each.predicted_speedup > 1 for each in metrics)


def test_banks_inherit_removed_convolutions_within_the_budget(redundancy):
    unet = random_unet(redundancy.unet_config)
    units = ["down_blocks.1.resnets.1", "up_blocks.2.resnets.1", "up_blocks.1.resnets.1"]
    plan = PruningPlan.for_unet(unet, [{"edit": "remove", "unit": unit} for unit in units])
    size = sum(p.numel() for p in unet.parameters())
    everything = add_cond_conv(plan, unet, params=1.0, router="time")
    banks = [edit for edit in everything.edits if isinstance(edit, CondConv)]
    inherited = sorted(source for bank in banks for source in bank.experts)
    assert inherited == sorted(f"{unit}.{conv}" for unit in units for conv in ("conv1", "conv2"))
    assert all(bank.unit.rpartition(".")[2] == source.rpartition(".")[2] for bank in banks for source in bank.experts)
    assert {bank.unit.rpartition(".")[0] for bank in banks} <= {unit.name for unit in redundancy.units} - set(units)
    budget = 0.02
    some = add_cond_conv(plan, unet, params=budget)
    assert plan.edits == some.edits[: len(plan.edits)]
    added = [sum(p.numel() for p in build_student(unet, made).parameters()) for made in (plan, some)]
    routers = sum(p.numel() for name, p in build_student(unet, some).named_parameters() if ".router." in name)
    assert 0 < added[1] - added[0] - routers <= budget * size
    with pytest.raises(AsdmError, match="no expert fits"):
        add_cond_conv(plan, unet, params=1e-6)
    with pytest.raises(AsdmError, match="params=5: must be a share"):
        add_cond_conv(plan, unet, params=5)


def test_experts_that_the_prompt_mixes_are_where_a_block_reads_it(redundancy):
    unet = random_unet(redundancy.unet_config)
    removed = [{"edit": "remove", "unit": f"down_blocks.{level}.resnets.1"} for level in (2, 3)]
    plan = PruningPlan.for_unet(unet, removed)
    blocks = {
        router: {
            edit.unit.partition(".resnets")[0]
            for edit in add_cond_conv(plan, unet, params=1.0, router=router).edits[2:]
        }
        for router in ("input", "prompt")
    }
    assert "down_blocks.3" in blocks["input"]
    assert "down_blocks.3" not in blocks["prompt"] and "down_blocks.2" in blocks["prompt"]


def test_our_presets_look_at_regions_and_drop_middle_layers(redundancy, monkeypatch):
    monkeypatch.setattr("asdm.edits.regional_attention.MANY_TOKENS", 64)
    known = analyze(tiny_pipeline(), timesteps=1, samples=1, latency_rounds=1)
    unet = random_unet(known.unet_config)
    slow, fast = (make_plan(known, preset=preset, unet=unet) for preset in ("a-sdm", "a-sdm-fast"))
    names = [[edit.unit for edit in plan.edits] for plan in (slow, fast)]
    assert "up_blocks.3.resnets.1" in names[0] and "down_blocks.1.resnets.1" not in names[0]
    assert {
        "down_blocks.0.resnets.1",
        "down_blocks.0.attentions.0",
        "up_blocks.3.attentions.1",
        "mid_block",
        "down_blocks.3",
    } <= set(names[1])
    for plan, regional, plainly in ((slow, [(4, 2)] * 3, set()), (fast, [(4, 4)], {("down_blocks.3", "none")})):
        build_student(unet, plan)
        assert [(edit.regions, edit.pool) for edit in plan.edits if edit.edit == "gri_attention"] == regional
        removed = {(edit.unit, edit.compensate) for edit in plan.edits if edit.edit == "remove"}
        assert ("up_blocks.3.resnets.1", "linear") in removed
        assert {(unit, compensate) for unit, compensate in removed if compensate != "linear"} == plainly
    assert fast.metrics.predicted_sensitivity > slow.metrics.predicted_sensitivity


def test_a_preset_needs_no_weights_and_no_measurement():
    with init_empty_weights():
        unet = UNet2DConditionModel(**UNETS["sd15"])
    known = structure_map(unet, "random:sd15")
    assert known.estimator is None and known.latency_ms == 0 and not known.has_reliable_latencies
    assert known.gmacs == pytest.approx(401.6, abs=0.3)
    for preset, edits in {"bk-base": 1, "a-sdm": 7, "a-sdm-fast": 17}.items():
        plan = make_plan(known, preset=preset)
        assert len(plan.edits) == edits and plan.metrics.speedup_basis == "macs"
        assert plan.metrics.predicted_speedup > 1.2 and plan.metrics.predicted_sensitivity is None
        empty_student(unet, plan)


def test_each_kind_of_regional_attention_is_measured_by_itself(monkeypatch):
    monkeypatch.setattr("asdm.edits.regional_attention.MANY_TOKENS", 64)
    known = structure_map(tiny_pipeline().unet)
    regional = [other for other in known.others if other.edit["edit"] == "gri_attention"]
    nearer, faster = regional[:2]
    assert nearer.edit["unit"] == faster.edit["unit"] and 0 < nearer.gmacs < faster.gmacs
    unet = tiny_pipeline().unet
    with counting_macs(unet) as before:
        denoiser_call(unet, batch_size=1)()
    student = build_student(unet, PruningPlan.for_unet(unet, [faster.edit]))
    with counting_macs(student) as after:
        denoiser_call(student, batch_size=1)()
    assert faster.gmacs == pytest.approx((before.below() - after.below()) / 1e9)


def test_a_map_with_an_edit_that_is_not_of_a_unit_is_refused(redundancy):
    record = redundancy.others[0].model_copy(update={"edit": {"edit": "drop_layers", "layers_per_block": 1}})
    with pytest.raises(AsdmError, match="not an edit of one unit"):
        make_plan(redundancy.model_copy(update={"others": [record]}), macs=0.7)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_profile_that_is_not_finite_is_refused_by_the_edits_name(pipeline, value, portable):
    profile = profile_by_hand(pipeline)
    bad = profile.units[3].model_copy(update={"sensitivity": value})
    profile = profile.model_copy(update={"units": [*profile.units[:3], bad, *profile.units[4:]]})
    with pytest.raises(AsdmError, match=f"^remove {bad.name}.*: sensitivity={value}: must be finite"):
        make_plan(profile, params=0.8, portable=portable)


def test_a_full_plan_is_refined_and_has_expert_kernels(pipeline):
    redundancy = analyze(pipeline, sensitivity="taylor", timesteps=1, samples=1, latency_rounds=1)
    titles = []
    plan = full_plan(
        redundancy, pipeline, budget={"params": 0.7}, refine=1, experts=0.2, progress=lambda *row: titles.append(row[0])
    )
    assert {edit.edit for edit in plan.edits} >= {"remove", "cond_conv"}
    assert plan.metrics.measured_sensitivity > 0 and set(titles) <= {"plan", "refine"}
    with pytest.raises(AsdmError, match="refine=1: a profile has no weights"):
        full_plan(redundancy, budget={"params": 0.7}, refine=1)
