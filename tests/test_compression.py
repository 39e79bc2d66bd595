"""A compression resumes in the folder of an earlier one, also one that an earlier version made."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from asdm import AsdmError, Stage, build_student, compress, load_pipeline, save_decoder, save_pipeline
from asdm.compression.settings import claim_folder, make_settings
from asdm.compression.steps import STEPS, Step
from asdm.planning.full_plan import full_plan
from asdm.runtime.checkpoint import export_checkpoint
from conftest import predict, tiny_decoder, tiny_pipeline

SHORT = {"sensitivity": "taylor", "refine": 0, "steps": 0, "samples": 0, "sampling_steps": 2}
BUDGET = {"speedup": None, "params": 0.8, "macs": None, "preset": None}
SETTINGS = {
    "sensitivity": None,
    "compensate": None,
    "refine": None,
    "data": "demo",
    "steps": 10,
    "recipe": "joint",
    "stages": None,
    "captions": None,
    "samples": 4,
    "sampling_steps": 2,
    "config": None,
    "seed": 0,
}

NEWER = ("captions", "image_to_image", "strength", "decoder", "save_decoder", "portable")  # than 0.1.0


@pytest.fixture
def model(tmp_path):
    return str(save_pipeline(tiny_pipeline(), tmp_path / "model"))


def rewrite(folder, change):
    """Change the settings in a folder's marker."""
    marker = folder / "asdm.json"
    about = json.loads(marker.read_text())
    marker.write_text(json.dumps(about | {"settings": change(about["settings"])}))


def with_repair(settings):
    return {"repair" if name == "refine" else name: value for name, value in settings.items()}


@pytest.mark.slow
def test_a_folder_with_the_old_names_of_settings_resumes(model, tmp_path, monkeypatch):
    made = compress(model, tmp_path / "out", params=0.8, **SHORT)
    rewrite(made.folder, with_repair)
    assert compress(model, made.folder, params=0.8, **SHORT).headline == made.headline
    made.report.unlink()
    monkeypatch.setattr("asdm.compression.steps.analyze", lambda *_, **__: pytest.fail("analysed again"))
    assert compress(model, made.folder, params=0.8, **SHORT).plan == made.plan
    with pytest.raises(AsdmError, match=r"made with other settings \(refine\)"):
        compress(model, made.folder, params=0.8, **SHORT | {"refine": 1})


def test_a_compression_goes_on_with_the_same_weights_alone(model, data_folder, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("asdm.compression.steps.full_plan", stopped)
    settings = {"params": 0.8, "data": data_folder, **SHORT}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress(model, tmp_path / "out", **settings)
    other = tiny_pipeline()
    with torch.no_grad():
        other.unet.conv_out.weight.neg_()
    save_pipeline(other, model)
    with pytest.raises(AsdmError, match=r"out: begun when .*model had other weights; name another folder"):
        compress(model, tmp_path / "out", **settings)


@pytest.mark.slow
def test_a_portable_student_is_stock_fitted_once_and_one_file(model, tmp_path, monkeypatch):
    def fitted_plan(*arguments, **settings):
        plan = full_plan(*arguments, **settings)
        (edit,) = plan.edits
        blocks = [f"up_blocks.3.attentions.{index}.transformer_blocks.0" for index in range(3)]
        return plan.model_copy(update={"edits": [replace(edit, transformer_blocks=blocks, fitted=True)]})

    monkeypatch.setattr("asdm.compression.steps.full_plan", fitted_plan)
    settings = {"params": 0.9, "portable": True, **SHORT}
    made = compress(model, tmp_path / "out", **settings)
    fitted = DiffusionPipeline.from_pretrained(made.folder).unet
    assert type(fitted) is UNet2DConditionModel
    plain = build_student(load_pipeline(model).unet, made.plan)
    assert not torch.equal(predict(fitted), predict(plain))
    export_checkpoint(load_pipeline(made.folder), tmp_path / "student.safetensors", "diffusers")
    made.report.unlink()
    monkeypatch.setattr("asdm.compression.steps.fit_compensation", lambda *_, **__: pytest.fail("fitted again"))
    compress(model, made.folder, **settings)
    assert torch.equal(predict(load_pipeline(made.folder).unet), predict(fitted))
    with pytest.raises(AsdmError, match=r"made with other settings \(portable\)"):
        compress(model, made.folder, **settings | {"portable": False})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": 0.9, "refine": 1}, "portable: refinement .* leave them out"),
        ({"params": 0.9, "compensate": "linear"}, "compensate=linear: a portable student has no place"),
        ({"preset": "bk-tiny"}, "preset=bk-tiny: is a plan of its own"),
    ],
)
def test_what_does_not_go_with_a_portable_student_is_refused_before_any_work(model, tmp_path, settings, message):
    with pytest.raises(AsdmError, match=message):
        compress(model, tmp_path / "out", portable=True, **SHORT | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "recorded"}, "teacher=recorded, and .* was not prepared"),
        ({"mixed_precision": "fp16"}, "mixed_precision=fp16: not on a CPU"),
        ({"losses": {"semantic": 1.0}, "semantics": {"encoder": "clip"}}, "no clip folder beside this pipeline"),
        ({"optimizer": "adamw8bit"}, "optimizer=adamw8bit: bitsandbytes"),
        ({"student_blocks": ["mid_blok"]}, "student_blocks: mid_blok: no such block; they are .*mid_block"),
    ],
)
def test_a_stage_that_is_not_possible_is_refused_before_any_work(
    model, data_folder, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("asdm.compression.steps.analyze", lambda *_, **__: pytest.fail("analysed first"))
    stages = [Stage(name="first", steps=1, batch_size=2), Stage(name="second", steps=1, batch_size=2, **changes)]
    with pytest.raises(AsdmError, match=message):
        compress(model, tmp_path / "out", params=0.8, data=data_folder, stages=stages, samples=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_result_has_the_dtype_and_is_trained_in_float32(model, data_folder, tmp_path):
    stages = [Stage(name="joint", steps=1, batch_size=2)]
    settings = SHORT | {"steps": 1, "stages": stages, "data": str(data_folder), "dtype": "bfloat16"}
    made = compress(model, tmp_path / "out", params=0.8, **settings)
    assert (
        load_file(made.folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype
        == torch.bfloat16
    )
    assert made.evaluation.dtype == "bfloat16"
    with pytest.raises(AsdmError, match=r"made with other settings \(dtype\)"):
        compress(model, made.folder, params=0.8, **settings | {"dtype": "float32"})


def test_a_folder_of_0_1_0_resumes_with_the_defaults_of_newer_settings(tmp_path):
    settings = make_settings("demo", BUDGET, **SETTINGS)
    claim_folder(tmp_path, settings)
    rewrite(tmp_path, lambda saved: {name: saved[name] for name in saved if name not in NEWER})
    claim_folder(tmp_path, settings)
    with pytest.raises(AsdmError, match=r"other settings \(image_to_image\)"):
        claim_folder(tmp_path, make_settings("demo", BUDGET, **SETTINGS, image_to_image=1))


def test_a_training_that_diverged_goes_on_with_a_lower_learning_rate(model, data_folder, tmp_path, monkeypatch):
    def stages(learning_rate):
        return [Stage(name="joint", steps=20, batch_size=2, ema_decay=0, learning_rate=learning_rate)]

    settings = {"data": data_folder, "compensate": "none", **SHORT}
    with pytest.raises(AsdmError, match="lower the learning rate and run again"):
        compress(model, tmp_path / "out", params=0.8, **settings, stages=stages(30.0))
    monkeypatch.setattr("asdm.compression.steps.evaluate", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception, match="trained"):
        compress(model, tmp_path / "out", params=0.8, **settings, stages=stages(1e-4))
    saved = json.loads((tmp_path / "out" / "asdm.json").read_text())["settings"]
    assert saved["stages"][0]["learning_rate"] == 1e-4
    with pytest.raises(AsdmError, match=r"begun with other settings \(batch_size\)"):
        other = [stages(1e-4)[0].model_copy(update={"batch_size": 4})]
        compress(model, tmp_path / "out", params=0.8, **settings, stages=other)


def test_stages_of_a_folder_are_compared_by_their_present_fields(tmp_path):
    stages = [Stage(name="joint", steps=3, batch_size=2)]
    settings = make_settings("demo", BUDGET, **SETTINGS | {"stages": stages})
    claim_folder(tmp_path, settings)
    (tmp_path / "evaluation.json").touch()
    claim_folder(tmp_path, settings)
    # Version 0.1.0 had fewer fields, and other names for some.
    old = {"name": "joint", "steps": 3, "batch_size": 2, "features_by": "area", "assembled": None}
    rewrite(tmp_path, lambda saved: saved | {"stages": [old]})
    claim_folder(tmp_path, settings)
    rewrite(tmp_path, lambda saved: saved | {"stages": [{"name": "joint", "unheard": 3}]})
    with pytest.raises(AsdmError, match=r"other settings \(stages\)"):
        claim_folder(tmp_path, settings)


def test_defaults_of_settings_depend_on_the_model():
    known = make_settings("demo", BUDGET, **SETTINGS)
    assert (known.compensate, known.refine, known.is_random) == ("linear", 2, False)
    random = make_settings("random:sd15", BUDGET, **SETTINGS)
    assert (random.compensate, random.refine, random.is_random) == ("none", 0, True)
    preset = make_settings("demo", {**BUDGET, "params": None, "preset": "bk-tiny"}, **SETTINGS)
    assert (preset.compensate, preset.refine) == ("linear", 0)
    assert "prediction_type" not in known.saved() and "config" not in known.saved()


def test_a_step_is_loaded_if_all_its_files_are_there(tmp_path):
    calls = []

    class Twice(Step):
        def files(self, job):
            return [job / "a", job / "b"]

        def run(self, job):
            calls.append("run")

        def load(self, job):
            calls.append("load")

    for name in ("a", "b"):
        Twice().perform(tmp_path)
        (tmp_path / name).touch()
    Twice().perform(tmp_path)
    assert calls == ["run", "run", "load"]
    assert [type(step).__name__ for step in STEPS][:2] == ["Analyse", "Plan"]


@pytest.mark.slow
@pytest.mark.parametrize("is_saved", [True, False])
def test_a_tiny_decoder_is_measured_beside_the_vae_and_saved_if_requested(model, tmp_path, is_saved):
    decoder = save_decoder(tiny_decoder(), tmp_path / "decoder")
    settings = SHORT | {"decoder": str(decoder), "save_decoder": is_saved}
    made = compress(model, tmp_path / "out", params=0.8, **settings)
    assert [row.name for row in made.evaluation.speed] == ["teacher", "pruned", "pruned, tiny decoder"]
    vae = load_pipeline(made.folder).vae
    assert type(vae).__name__ == ("AutoencoderTiny" if is_saved else "AutoencoderKL")
    assert compress(model, made.folder, params=0.8, **settings).headline == made.headline
    with pytest.raises(AsdmError, match=r"other settings \(save_decoder\)"):
        compress(model, made.folder, params=0.8, **settings | {"save_decoder": not is_saved})


def test_a_tiny_decoder_that_does_not_fit_is_told_before_the_work(model, tmp_path):
    decoder = save_decoder(tiny_decoder(channels=16), tmp_path / "decoder")
    with pytest.raises(AsdmError, match="decodes latents of 16 channels"):
        compress(model, tmp_path / "out", params=0.8, **SHORT, decoder=str(decoder))
    assert not (tmp_path / "out").exists()
