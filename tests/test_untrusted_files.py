"""The smallest inputs that the fuzzing of the later readers has found: recipes, evaluations by protocols, networks'
weights, and what the page reads. `test_untrusted.py` has those of models and data."""

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPModel

from asdm import AsdmError
from asdm.app.evidence import evidence_file, read_losses
from asdm.cli.main import one_line_errors
from asdm.distillation.decoder_recipe import DecoderRecipe, read_decoder_recipe
from asdm.distillation.recipes import read_stages
from asdm.errors import disk_error
from asdm.evaluation.image_folders import DISTANCES, folder_name, load_distances
from asdm.evaluation.protocol.captions import read_captions
from asdm.evaluation.protocol.extractors import FEATURES, ClipExtractor
from asdm.evaluation.protocol.features import FeatureCache
from asdm.evaluation.protocol.image_job import KIND, ImageJob, ImageSettings
from asdm.evaluation.protocol.pictures import numbered
from asdm.files import MARKER, require_space
from asdm.pipelines.claims import claim_of, settled
from asdm.pipelines.decoders import make_tiny, save_decoder, with_decoder
from asdm.pipelines.noise_schedules import scheduler_for
from asdm.pipelines.transformers_models import load_transformers_model
from asdm.reading import parse_yaml
from asdm.runtime.writers import save_openvino
from asdm.training.checkpoints import require_same_run
from conftest import tiny_pipeline
from fuzzing import inputs
from fuzzing.readers.base import fresh
from fuzzing.readers.evaluation import clip_folder


@pytest.mark.parametrize("text", ['[{"name": "joint", "steps": 20, 0.01, "x": 1}]', "- {1: 2}", "- {true: 1}"])
def test_keys_of_yaml_that_are_no_texts_are_unknown_fields(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(AsdmError, match="not a stage"):
        read_stages(tmp_path / "recipe.yaml")
    assert parse_yaml("{1: {2.5: [a]}}") == {"1": {"2.5": ["a"]}}


@pytest.mark.parametrize("value", ["null", "[0.1]", "x", "-1"])
def test_a_config_of_which_no_scheduler_can_be_made_is_named(value, tmp_path):
    content = f'{{"model": {{"params": {{"linear_start": {value}, "linear_end": 0.2, "timesteps": 1000}}}}}}'
    (tmp_path / "model.yaml").write_text(content)
    claim = claim_of(tmp_path / "model.yaml")
    with pytest.raises(AsdmError, match=r"model\.yaml: no DDIMScheduler can be made of it"):
        scheduler_for(tiny_pipeline().scheduler, settled([claim], None, "x"))


def test_a_schedule_of_billions_of_steps_is_refused(tmp_path):
    content = {"model": {"params": {"linear_start": 0.1, "linear_end": 0.2, "timesteps": 2**31}}}
    (tmp_path / "model.yaml").write_text(json.dumps(content))
    with pytest.raises(AsdmError, match=r"model\.yaml: num_train_timesteps=2147483648"):
        scheduler_for(tiny_pipeline().scheduler, settled([claim_of(tmp_path / "model.yaml")], None, "x"))


# -- decoders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", inputs.HOSTILE_YAML)
def test_hostile_yaml_is_no_recipe_of_a_decoder(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(AsdmError):
        read_decoder_recipe(tmp_path / "recipe.yaml")


def test_a_decoder_that_is_not_tiny_is_refused_before_it_is_made():
    with pytest.raises(AsdmError, match="a tiny one has at most 100M"):
        DecoderRecipe(width=1024, blocks=[100, 100]).tiny_for(tiny_pipeline())


@pytest.mark.parametrize("steps", ["many", None, [1]])
def test_settings_of_a_run_without_a_number_of_steps_are_another_runs(steps, tmp_path):
    with pytest.raises(AsdmError, match="begun with other settings"):
        require_same_run(tmp_path, {"seed": 0, "steps": steps}, {"seed": 0, "steps": 5})


@pytest.mark.parametrize(
    "changes",
    [{"latent_channels": 2**40}, {"num_decoder_blocks": [10**6, 1]}, {"upsample_fn": " earest"}, "[" * 100_000],
)
def test_the_config_of_a_decoder_is_bounded(changes, tmp_path):
    save_decoder(make_tiny(4, 8, [1, 0]), tmp_path / "decoder")
    path = tmp_path / "decoder" / "config.json"
    path.write_text(changes if isinstance(changes, str) else json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AsdmError):
        with_decoder(tiny_pipeline(), tmp_path / "decoder")


# -- evaluations by protocols -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"image_id": 1, "id": 1, "caption": "a"}, {"image_id": "b", "id": 1, "caption": "a"}],
        [{"image_id": 1, "id": [], "caption": "a"}],
        [{"image_id": float("inf"), "id": 1, "caption": "a"}],
    ],
)
def test_annotations_of_mixed_kinds_are_not_coco(rows, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    with pytest.raises(AsdmError, match="not COCO's captions"):
        read_captions(tmp_path / "captions.json", 5)


def test_a_damaged_piece_of_features_is_computed_again(tmp_path):
    pipeline = tiny_pipeline()
    clip = load_transformers_model(CLIPModel, clip_folder())
    cache, extractor = FeatureCache(tmp_path, PartialState(cpu=True)), ClipExtractor(clip, pipeline.tokenizer, "clip")
    found = cache.of_texts("x", extractor, ["a cat"])[FEATURES]
    (path,) = tmp_path.iterdir()
    for tensors in ({}, {FEATURES: torch.zeros(3, 2)}, {"other": found}, {FEATURES: found + 1}):
        save_file(tensors, path)
        assert torch.equal(cache.of_texts("x", extractor, ["a cat"])[FEATURES], found)


@pytest.mark.parametrize("models", [[1], "x", 3, {"images/teacher": [1]}])
def test_a_marker_of_other_content_is_no_fault(models, tmp_path):
    settings = ImageSettings(steps=2, guidance_scale=1, seed=0, side=16)
    (tmp_path / MARKER).write_text(json.dumps({"kind": KIND, "models": models}))
    (tmp_path / "images" / "teacher").mkdir(parents=True)
    job = ImageJob(tmp_path, numbered(["a cat"], ".png"), PartialState(cpu=True))
    with pytest.raises(AsdmError, match="remove"):
        job.claim({"images/teacher": (tiny_pipeline(), settings)})


def test_damaged_distances_are_named(tmp_path):
    assert load_distances(tmp_path) is None
    for content in ("", "3", '["x"]', "[null]"):
        (tmp_path / DISTANCES).write_text(content)
        with pytest.raises(AsdmError, match="damaged"):
            load_distances(tmp_path)


# -- networks' weights ------------------------------------------------------------------------------------


def changed_clip(folder, config=None, tensors=None):
    fresh(folder)
    shutil.copytree(clip_folder(), folder, dirs_exist_ok=True)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | (config or {})))
    found = load_file(folder / "model.safetensors")
    save_file(found | (tensors or {}), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "others' code"),
        ({"attn_implementation": "kernels/x"}, "others' code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"vision_config": {"hidden_size": 2**15, "num_attention_heads": 2}}, "and its files hold"),
        ({"architectures": None, "vision_config": {"hidden_size": 2**15, "num_attention_heads": 2}}, "files hold"),
    ],
)
def test_the_config_of_a_network_asks_for_no_code_and_no_more_than_its_files_hold(config, told, tmp_path):
    for kind in (CLIPModel, AutoModel):
        with pytest.raises(AsdmError, match=told):
            load_transformers_model(kind, changed_clip(tmp_path / "clip", config))


def test_a_network_that_lacks_a_tensor_or_holds_no_numbers_is_refused(tmp_path):
    name = "visual_projection.weight"
    folder = changed_clip(tmp_path / "clip", tensors={name: torch.full((8, 16), torch.nan)})
    with pytest.raises(AsdmError, match="NaN"):
        load_transformers_model(CLIPModel, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AsdmError, match=f"lacks 1 of its tensors, among them {name}"):
        load_transformers_model(CLIPModel, folder)


# -- the page ---------------------------------------------------------------------------------------------


def test_names_that_no_file_can_have_are_no_files_of_the_page(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("\0.json", "x" * 300 + ".json", "a/x.json"):
        with pytest.raises(AsdmError, match="not a file of the page's folder"):
            evidence_file(tmp_path, name, ".json")


def test_values_of_a_log_that_are_no_numbers_are_left_out(tmp_path):
    pytest.importorskip("plotly")
    from asdm.app.evidence import loss_figure

    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "x": "y"}, {"step": 3, "loss": 0.25}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (trace,) = loss_figure(read_losses(tmp_path / "log.jsonl")).data
    assert list(trace.x) == [1, 3] and list(trace.y) == [0.5, 0.25]


# -- full disks -------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_file_of_a_size_is_named(tmp_path):
    require_space(tmp_path, 2000)
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large") as raised:
        require_space(tmp_path, 2000)
    assert disk_error(raised.value) == f"{tmp_path}: File too large" and not list(tmp_path.iterdir())


def test_what_stops_openvino_is_the_disk(tmp_path):
    openvino = pytest.importorskip("openvino")
    operations = openvino.opset13
    inputs_of_it = operations.parameter([1, 100], np.float32)
    weights = operations.constant(np.random.default_rng(0).random((100, 100), np.float32))
    model = openvino.Model([operations.matmul(inputs_of_it, weights, False, False)], [inputs_of_it])
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        save_openvino(model, tmp_path / "model.xml")
    save_openvino(model, tmp_path / "model.xml")
    assert (tmp_path / "model.bin").stat().st_size == 20_000


# -- libraries --------------------------------------------------------------------------------------------


def test_commands_let_no_library_report_to_its_makers(monkeypatch):
    names = ("HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the entry point replaces
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with one_line_errors():
        assert [os.environ[name] for name in names] == ["1", "1"]


def test_openvino_reports_nothing_to_its_makers(tmp_path):
    pytest.importorskip("openvino")
    script = "import asdm.runtime.openvino, openvino, sys; print(sys.modules['openvino_telemetry'])"
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == "None\n" and not (tmp_path / "intel").exists()


def test_a_models_name_of_any_length_names_a_folder(tmp_path):
    names = [f"/{'d' * 100}/{'é' * 200}/{end}" for end in ("a", "b", "a/" * 400)]
    folders = [folder_name(name) for name in [*names, "models/x"]]
    assert folders[-1] == "models_x" and len(set(folders)) == 4
    for folder in folders:
        (tmp_path / f"wins-{folder}.html").touch()
