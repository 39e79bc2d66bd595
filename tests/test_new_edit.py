"""A new kind of edit is one file: this one defines one, and every package works with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import nn

from asdm import (
    AsdmError,
    PruningPlan,
    analyze,
    build_student,
    fit_compensation,
    load_pipeline,
    make_plan,
    save_pipeline,
    with_unet,
)
from asdm.distillation.incubation import incubated_blocks
from asdm.edits import EditedFamily, UnitEdit, parse_edits, register_edit
from asdm.edits.base import EDIT_KINDS
from asdm.edits.recast import recast
from asdm.families import family_of
from conftest import predict, tiny_pipeline, tiny_unet

FEED_FORWARD = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
RESNET = "up_blocks.2.resnets.1"


@dataclass(frozen=True)
class ScaleBranch(UnitEdit):
    """Multiply a unit's branch by a constant."""

    edit = "scale_branch"
    no_split_modules = ("Scaled",)
    factor: float

    def replacements(self, model: Any, family: EditedFamily) -> dict[str, nn.Module]:
        return {self.unit: scaled(model.get_submodule(self.unit), family.branch(model, self.unit).kept, self.factor)}

    @classmethod
    def candidates(cls, model: Any, family: EditedFamily, positions: Mapping[str, int]) -> Sequence[UnitEdit]:
        return [cls(unit=unit.name, factor=0.5) for unit in family.units(model) if unit.name == FEED_FORWARD]


def scaled(module: nn.Module, kept: Any, factor: float) -> nn.Module:
    """The module with its branch multiplied, under the same names of tensors."""

    class Scaled(type(module)):
        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output = super().forward(hidden_states, *args, **kwargs)
            rest = 0.0 if kept is None else kept(hidden_states)
            return rest + factor * (output - rest)

    return recast(Scaled, module)


@dataclass(frozen=True)
class ManyFields(UnitEdit):
    """An edit with a field of each type."""

    edit = "many_fields"
    factor: float = 1.0
    level: Literal[1, 2] = 1
    weights: dict[str, float] | None = None
    sides: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    either: int | list[bool] = 0
    other: Mapping[str, int] | Any = None


@pytest.fixture(autouse=True)
def registered():
    for kind in (ScaleBranch, ManyFields):
        register_edit(kind)
    yield
    for kind in (ScaleBranch, ManyFields):
        del EDIT_KINDS[kind.edit]


def plan_of(unet, *edits):
    return PruningPlan.for_unet(unet, [ScaleBranch(unit=unit, factor=factor) for unit, factor in edits])


def test_it_is_parsed_and_survives_a_plans_file(unet, tmp_path):
    plan = plan_of(unet, (FEED_FORWARD, 0.5))
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert parse_edits([{"edit": "scale_branch", "unit": FEED_FORWARD, "factor": 0.5}]) == plan.edits


@pytest.mark.parametrize(
    "fields",
    [
        {"factor": 1, "level": 2, "weights": {"a": 2, "b": 0.5}, "sides": (3, 4, 5), "pair": (2, "b")},
        {"factor": -1e300, "either": [True, False], "sides": (), "weights": {}, "other": {"a": [None]}},
    ],
)
def test_fields_have_the_types_that_they_say_also_from_a_file(unet, fields):
    edit = ManyFields(unit=RESNET, **fields)
    plan = PruningPlan.for_unet(unet, [])
    loaded = PruningPlan.model_validate_json(plan.model_copy(update={"edits": [edit]}).model_dump_json())
    assert loaded.edits == [edit] and vars(edit) == {**vars(ManyFields(unit=RESNET)), **fields}
    assert [type(value) for value in vars(loaded.edits[0]).values()] == [type(value) for value in vars(edit).values()]
    assert type(edit.factor) is float and type(edit.sides) is tuple


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("factor", True, "a finite number"),
        ("factor", float("nan"), "a finite number"),
        ("factor", 10**400, "a finite number"),
        ("level", 3, "one of 1, 2"),
        ("level", True, "one of 1, 2"),
        ("level", [1], "one of 1, 2"),
        ("weights", {"a": "b"}, r"dict\[str, float\] \| None"),
        ("weights", [1.0], "dict"),
        ("sides", [1, 2.0], "tuple"),
        ("sides", 1, "tuple"),
        ("pair", [1], "tuple"),
        ("either", True, r"int \| list\[bool\]"),
        ("unit", None, "str"),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line(name, value, allowed):
    with pytest.raises(AsdmError, match=rf"{name}: .* is not allowed; it is {allowed}") as raised:
        parse_edits([{"edit": "many_fields", "unit": RESNET, name: value}])
    assert "\n" not in str(raised.value)


def test_a_student_with_it_computes_what_it_should(unet):
    student = build_student(unet, plan_of(unet, (FEED_FORWARD, 0.5), (RESNET, 0.25)))
    reference = tiny_unet()
    with torch.no_grad():
        reference.get_submodule(f"{FEED_FORWARD}.net.2").weight.mul_(0.5)
        reference.get_submodule(f"{FEED_FORWARD}.net.2").bias.mul_(0.5)
        reference.get_submodule(f"{RESNET}.conv2").weight.mul_(0.25)
        reference.get_submodule(f"{RESNET}.conv2").bias.mul_(0.25)
    torch.testing.assert_close(predict(student), predict(reference), atol=1e-6, rtol=0)
    assert not torch.equal(predict(student), predict(unet))
    assert student.state_dict().keys() == unet.state_dict().keys()
    assert incubated_blocks(student) == ["down_blocks.0", "up_blocks.2"]


def test_it_stands_beside_other_edits_and_gives_way_to_a_removal_around_it(unet):
    once = build_student(unet, plan_of(unet, (FEED_FORWARD, 0.5)))
    attention = FEED_FORWARD.partition(".transformer_blocks.")[0]
    removal = {"edit": "remove", "unit": attention}
    twice = build_student(once, PruningPlan.for_unet(once, [removal]))
    assert torch.equal(predict(twice), predict(build_student(unet, PruningPlan.for_unet(unet, [removal]))))


def test_a_pipeline_with_it_is_saved_and_loaded(tmp_path):
    pipeline = tiny_pipeline()
    student = build_student(pipeline.unet, plan_of(pipeline.unet, (FEED_FORWARD, 0.5)))
    save_pipeline(with_unet(pipeline, student), tmp_path / "student")
    loaded = load_pipeline(tmp_path / "student").unet
    assert loaded.config.edits == [{"edit": "scale_branch", "unit": FEED_FORWARD, "factor": 0.5}]
    assert torch.equal(predict(loaded), predict(student))


def test_its_modules_are_not_split_over_devices(unet):
    student = build_student(unet, plan_of(unet, (RESNET, 0.5)))
    assert {"Scaled", "RemovedResnet", "BasicTransformerBlock"} <= set(student._get_no_split_modules("auto"))


@pytest.mark.parametrize("sensitivity", ["ablation", "taylor"])
def test_what_it_offers_is_analysed_and_planned(sensitivity):
    pipeline = tiny_pipeline()
    redundancy = analyze(pipeline, sensitivity=sensitivity, timesteps=1, samples=2, latency_rounds=1)
    (record,) = [other for other in redundancy.others if other.edit["edit"] == "scale_branch"]
    assert record.covers == [FEED_FORWARD] and record.parameters == 0 and record.gmacs == 0
    student = build_student(pipeline.unet, plan_of(pipeline.unet, (FEED_FORWARD, 0.5)))
    assert 0 < record.sensitivity < max(unit.sensitivity for unit in redundancy.units)
    free = record.model_copy(update={"gmacs": 0.2 * redundancy.gmacs, "sensitivity": 0.0})  # so that a plan has it
    others = [free if other == record else other for other in redundancy.others]
    plan = make_plan(redundancy.model_copy(update={"others": others}), macs=0.9)
    assert ScaleBranch(unit=FEED_FORWARD, factor=0.5) in plan.edits
    assert fit_compensation(pipeline, student, timesteps=1, samples=2).left_by_unit == {}
    assert family_of(student).fingerprint(student) == plan.base.fingerprint
