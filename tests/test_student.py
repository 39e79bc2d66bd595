"""What a plan does to a UNet, and that a student survives saving and loading."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from asdm import (
    AsdmError,
    AsdmUNet2DConditionModel,
    PruningPlan,
    Remove,
    build_student,
    load_pipeline,
    save_pipeline,
)
from asdm.edits import DropLayers
from asdm.families.tensors import fingerprint
from asdm.families.unet_structure import removable_units
from asdm.student.plan import PlanMetrics
from conftest import predict, tiny_pipeline, tiny_sdxl_unet, tiny_unet, unet_inputs


def student_of(unet, *units):
    return build_student(unet, PruningPlan.for_unet(unet, [Remove(unit=unit) for unit in units]))


def test_plan_without_edits_is_bit_identical(unet):
    assert torch.equal(predict(student_of(unet)), predict(unet))


def test_every_unit_can_be_removed_alone_and_changes_the_prediction(unet):
    reference = predict(unet)
    for unit in removable_units(unet)[::3]:  # of each kind and in each stage, another one in each transformer
        prediction = predict(student_of(unet, unit.name))
        assert prediction.shape == reference.shape
        assert not torch.equal(prediction, reference), unit.name


def test_removed_resnet_is_its_shortcut(unet):
    for name in ("down_blocks.0.resnets.1", "up_blocks.3.resnets.2"):
        resnet = unet.get_submodule(name)
        removed = student_of(unet, name).get_submodule(name)
        channels = resnet.in_channels
        hidden_states = torch.randn(1, channels, 4, 4)
        shortcut = resnet.conv_shortcut
        expected = hidden_states if shortcut is None else shortcut(hidden_states)
        assert torch.equal(removed(hidden_states, None), expected)


def test_removing_a_branch_equals_zeroing_its_last_layer(unet):
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    last = {"attn1": "attn1.to_out.0", "attn2": "attn2.to_out.0", "ff": "ff.net.2"}
    for branch, layer in last.items():
        zeroed = tiny_unet()
        torch.nn.init.zeros_(zeroed.get_submodule(f"{block}.{layer}").weight)
        torch.nn.init.zeros_(zeroed.get_submodule(f"{block}.{layer}").bias)
        torch.testing.assert_close(predict(student_of(unet, f"{block}.{branch}")), predict(zeroed), atol=1e-6, rtol=0)


def test_removing_all_parts_of_a_block_takes_their_norms_too(unet):
    block = "up_blocks.1.attentions.0.transformer_blocks.0"
    student = student_of(unet, f"{block}.attn1", f"{block}.attn2", f"{block}.ff")
    assert not list(student.get_submodule(block).parameters())


def test_mid_block_and_innermost_stage_can_go(unet):
    student = student_of(unet, "mid_block", "down_blocks.3")
    assert predict(student).shape == predict(unet).shape
    for stage in ("mid_block", "down_blocks.3", "up_blocks.0", "down_blocks.2.downsamplers"):
        assert not list(student.get_submodule(stage).parameters())


def test_an_innermost_stage_that_changes_the_channels_cannot_go():
    with pytest.raises(AsdmError, match=r"down_blocks\.2: the lowest-resolution level.*32 to 64"):
        student_of(tiny_sdxl_unet(), "down_blocks.2")


def test_a_student_can_lose_a_whole_whose_part_is_gone_already(unet):
    attention = "down_blocks.0.attentions.1"
    once = student_of(unet, f"{attention}.transformer_blocks.0.attn1")
    twice = student_of(once, attention)
    assert torch.equal(predict(twice), predict(student_of(unet, attention)))


def test_names_and_weights_of_what_stays_are_the_teachers(unet):
    student = student_of(unet, "down_blocks.0.attentions.1", "up_blocks.2.resnets.1")
    teacher = unet.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, teacher[name])


def test_the_teacher_is_not_changed_by_its_student(unet):
    before = predict(unet)
    student = student_of(unet, "mid_block")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(predict(unet), before)


def test_controlnet_residuals_still_fit_a_pruned_student(unet):
    student = student_of(unet, "mid_block", "down_blocks.1.resnets.1", "down_blocks.1.attentions.1")
    shapes = []
    hooks = [
        unet.get_submodule(f"down_blocks.{i}").register_forward_hook(lambda _m, _a, out: shapes.extend(out[1]))
        for i in range(4)
    ]
    predict(unet)
    for hook in hooks:
        hook.remove()
    inputs = unet_inputs(unet)
    stem = torch.zeros(2, 32, 8, 8)
    residuals = [torch.ones_like(stem), *[torch.ones_like(shape) for shape in shapes]]
    inputs |= {
        "down_block_additional_residuals": residuals,
        "mid_block_additional_residual": torch.ones_like(shapes[-1]),
    }
    assert not torch.equal(predict(student, **inputs), predict(student))


@pytest.mark.parametrize("make", [tiny_unet, tiny_sdxl_unet])
def test_save_load_save_is_bit_identical(make, tmp_path):
    unet = make()
    student = student_of(unet, "down_blocks.1.resnets.1", "up_blocks.1.attentions.0.transformer_blocks.0.ff")
    student.save_pretrained(tmp_path / "first")
    loaded = AsdmUNet2DConditionModel.from_pretrained(tmp_path / "first")
    torch.testing.assert_close(predict(loaded), predict(student), atol=1e-6, rtol=1e-5)
    assert loaded.config.edits == student.config.edits
    loaded.save_pretrained(tmp_path / "second")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        first, second = ((tmp_path / folder / file).read_bytes() for folder in ("first", "second"))
        if file == "config.json":
            first, second = (
                {key: value for key, value in json.loads(text).items() if key != "_name_or_path"}
                for text in (first, second)
            )
        assert first == second


def test_a_student_can_be_pruned_again(unet):
    once = student_of(unet, "mid_block")
    twice = student_of(once, "down_blocks.0.resnets.1")
    assert [edit["unit"] for edit in twice.config.edits] == ["mid_block", "down_blocks.0.resnets.1"]
    assert torch.equal(predict(twice), predict(student_of(unet, "mid_block", "down_blocks.0.resnets.1")))


def test_what_is_gone_already_is_neither_removed_nor_inherited_again(unet):
    branch, resnet = "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "up_blocks.3.resnets.1"
    edits = [{"edit": "remove", "unit": branch, "compensate": "linear"}, {"edit": "remove", "unit": resnet}]
    once = build_student(unet, PruningPlan.for_unet(unet, edits))
    assert not {branch, resnet} & {unit.name for unit in removable_units(once)}
    bank = {"edit": "cond_conv", "unit": "up_blocks.3.resnets.2.conv2", "experts": [f"{resnet}.conv2"]}
    with pytest.raises(AsdmError, match=r"its expert up_blocks\.3\.resnets\.1\.conv2 is gone"):
        build_student(once, PruningPlan.for_unet(once, [bank]))


def test_a_unet_with_a_lora_is_refused_until_it_is_unloaded(unet):
    peft = pytest.importorskip("peft")
    plan = PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block"}])
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(AsdmError, match="a LoRA is loaded"):
        build_student(unet, plan)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_loading_is_strict_and_names_the_tensor(unet, tmp_path, fault):
    student_of(unet, "mid_block").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if fault == "missing":
        del tensors["conv_in.bias"]
    elif fault == "unexpected":
        tensors["conv_in.extra"] = torch.zeros(1)
    else:
        tensors["conv_in.bias"] = torch.zeros(5)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AsdmError, match=r"conv_in\.(bias|extra)"):
        AsdmUNet2DConditionModel.from_pretrained(tmp_path)


def test_what_is_uploaded_has_the_module_that_loads_it(unet, tmp_path, monkeypatch):
    student, uploaded = student_of(unet, "mid_block"), []
    monkeypatch.setattr("diffusers.models.modeling_utils.create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("diffusers.models.modeling_utils.load_or_create_model_card", lambda *_, **__: ModelCard(""))
    monkeypatch.setattr(
        type(student), "_upload_folder", lambda _, folder, *__, **___: uploaded.extend(os.listdir(folder))
    )
    student.save_pretrained(str(tmp_path / "student"), push_to_hub=True)
    assert {"asdm_unet.py", "config.json", "diffusion_pytorch_model.safetensors"} <= set(uploaded)


def test_the_stock_class_does_not_mistake_a_student_for_its_own(unet, tmp_path):
    student_of(unet, "mid_block").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"asdm\.CrossAttnDownBlock2D does not exist"):
        UNet2DConditionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"edit": "remove", "unit": "down_blocks.7.resnets.0"}], r"down_blocks\.7\.resnets\.0: no such unit.*nearest"),
        ([{"edit": "remove", "unit": "conv_in"}], "conv_in: no such unit"),
        ([{"edit": "remove"}], "field unit is missing"),
        ([{"edit": "shrink", "unit": "mid_block"}], "allowed kinds: remove"),
        ([{"edit": "remove", "unit": "mid_block", "by": 2}], "there is no field by"),
        (["mid_block"], "not an edit"),
        ([{"edit": "remove", "unit": "mid_block"}] * 2, "named twice"),
        (
            [{"edit": "remove", "unit": name} for name in ("mid_block", "mid_block.attentions.0")],
            "lies inside mid_block",
        ),
        (
            [{"edit": "remove", "unit": name} for name in ("up_blocks.0.resnets.1", "down_blocks.3")],
            r"up_blocks.0.resnets.1: goes with down_blocks.3",
        ),
        (
            [{"edit": "remove", "unit": name} for name in ("down_blocks.3", "up_blocks.0.resnets.1")],
            r"up_blocks.0.resnets.1: goes with down_blocks.3",
        ),
    ],
)
def test_a_wrong_edit_is_one_clear_line(unet, edits, message):
    with pytest.raises(AsdmError, match=message) as error:
        PruningPlan.for_unet(unet, edits)
    assert "\n" not in str(error.value)


def test_a_plan_for_another_model_is_refused(unet):
    plan = PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block"}])
    other = tiny_unet(block_out_channels=(32, 32, 32, 64))
    with pytest.raises(AsdmError, match=r"plan for another model.*fingerprint"):
        build_student(other, plan)


def test_a_plan_fits_a_fine_tune_of_its_model(unet):
    plan = PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block"}])
    assert fingerprint(tiny_unet(seed=5)) == fingerprint(unet)
    build_student(tiny_unet(seed=5), plan)


def test_a_plan_survives_its_file_and_says_what_is_wrong_with_a_bad_one(unet, tmp_path):
    plan = PruningPlan.for_unet(unet, [{"edit": "remove", "unit": "mid_block"}])
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["base"]["class"] == "UNet2DConditionModel"
    (tmp_path / "cut.json").write_text((tmp_path / "plan.json").read_text()[:40])
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "null.json").write_text(json.dumps(content | {"edits": None}))
    for name in ("cut", "list", "none", "null", "absent"):
        with pytest.raises(AsdmError, match=f"{name}.json"):
            PruningPlan.load(tmp_path / f"{name}.json")


def test_a_plan_with_old_names_loads(unet, tmp_path):
    metrics = {"target": {"params": 0.8}, "predicted_speedup": 1.25}
    content = json.loads(PruningPlan.for_unet(unet, [{"edit": "drop_layers", "layers_per_block": 1}]).to_json())
    content["edits"][0]["edit"] = "shorten"
    (tmp_path / "plan.json").write_text(json.dumps(content | {"figures": metrics}))
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.edits == [DropLayers(layers_per_block=1)] and plan.metrics == PlanMetrics(**metrics)
    plan.save(tmp_path / "again.json")
    assert PruningPlan.load(tmp_path / "again.json") == plan
    assert '"metrics"' in (tmp_path / "again.json").read_text()


def test_an_interrupted_save_leaves_the_old_model(unet, tmp_path, monkeypatch):
    pipeline = tiny_pipeline()
    save_pipeline(pipeline, tmp_path / "model")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(pipeline), "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        save_pipeline(pipeline, tmp_path / "model")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    load_pipeline(tmp_path / "model")
