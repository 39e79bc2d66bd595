"""Graphs for other runtimes give what torch gives, students' edits included."""

import json

import numpy as np
import pytest
import torch

from asdm import AsdmError, PruningPlan, Remove, build_student, export, with_unet
from conftest import predict, tiny_pipeline, tiny_sdxl_pipeline

openvino = pytest.importorskip("openvino")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
EDITS = [
    {"edit": "remove", "unit": "mid_block", "compensate": "linear"},
    {"edit": "remove", "unit": "up_blocks.3.resnets.1"},
    {"edit": "gri_attention", "unit": ATTENTION, "regions": 3, "pool": 2, "weighted": True},
    {"edit": "cond_conv", "unit": "up_blocks.3.resnets.2.conv2", "experts": ["up_blocks.3.resnets.1.conv2"]},
]


def student_of(pipeline, *edits):
    student = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "router" in name:
                parameter.normal_()
    return with_unet(pipeline, student)


def run(path, **inputs):
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(compiled({name: value.numpy() for name, value in inputs.items()}).values()))


def test_onnx_gives_the_same(pipeline, tmp_path):
    pytest.importorskip("onnxscript")
    made = export(student_of(pipeline, *EDITS), tmp_path / "out", "onnx")
    assert max(made.differences.values()) < 1e-4
    assert (tmp_path / "out" / "unet" / "model.onnx").is_file()


@pytest.mark.parametrize("router", ["time", "input"])
def test_a_student_with_all_kinds_of_edits(pipeline, tmp_path, router):
    student = student_of(pipeline, *EDITS[:3], EDITS[3] | {"router": router})
    made = export(student, tmp_path / "out")
    assert set(made.differences) == {"unet", "vae_decoder", "vae_encoder", "text_encoder"}
    assert max(made.differences.values()) < 0.02
    for batch in (1, 3) if router == "time" else (2,):
        inputs = {
            "sample": torch.randn(batch, 4, 8, 8),
            "timestep": torch.tensor(700),
            "encoder_hidden_states": torch.randn(batch, student.tokenizer.model_max_length, 32),
        }
        found = run(tmp_path / "out" / "unet" / "openvino_model.xml", **inputs)
        np.testing.assert_allclose(found, predict(student.unet, **inputs), atol=0.03)
    # An export leaves nothing behind that the next call would stumble over.
    assert predict(student.unet).isfinite().all()
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and "vae" not in index
    assert (tmp_path / "out" / "tokenizer").is_dir() and (tmp_path / "out" / "scheduler").is_dir()


def test_sdxl_has_two_text_encoders_and_added_embeddings(tmp_path):
    made = export(tiny_sdxl_pipeline(), tmp_path / "out")
    assert "text_encoder_2" in made.differences
    names = [i.get_any_name() for i in openvino.Core().read_model(tmp_path / "out/unet/openvino_model.xml").inputs]
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]


def test_what_cannot_be_exported_is_said_before_anything_is_written(pipeline, tmp_path):
    with pytest.raises(AsdmError, match="to=tflite: no such format; it is openvino or onnx"):
        export(pipeline, tmp_path / "out", "tflite")
    with pytest.raises(AsdmError, match="load it in float32"):
        export(student_of(tiny_pipeline(), Remove(unit="mid_block")).to(torch.bfloat16), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(AsdmError, match="was not written by asdm"):
        export(pipeline, tmp_path / "mine")
    assert not (tmp_path / "out").exists()
