"""Loading and saving: what loads, what is refused with which words, and what an image's seed means."""

import copy
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys

import huggingface_hub
import pytest
import sentencepiece
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asdm import (
    AsdmError,
    PruningPlan,
    Remove,
    build_student,
    export_checkpoint,
    generate,
    load_pipeline,
    save_pipeline,
    with_unet,
)
from asdm.diffusion.conditioning import embed_prompts, encode_images, image_size
from asdm.diffusion.kinds import image_to_image
from asdm.files import MARKER, replacing_file, replacing_folder
from asdm.pipelines.derived import with_vae
from asdm.pipelines.loading import load_mapped
from asdm.pipelines.model_card import model_card
from asdm.pipelines.saving import save_pipeline_into
from conftest import (
    predict,
    text_lora_file,
    tiny_pipeline,
    tiny_pixart_pipeline,
    tiny_sdxl_pipeline,
    tiny_unet,
)


@pytest.fixture
def model(pipeline, tmp_path):
    return save_pipeline(pipeline, tmp_path / "model")


def test_a_saved_student_pipeline_has_the_same_weights_and_draws_the_same_image(pipeline, tmp_path):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "mid_block"}])
    student = with_unet(pipeline, build_student(pipeline.unet, plan))
    save_pipeline(student, tmp_path / "student")
    before = generate(student, ["octopus, noto"], steps=2)
    weights = student.unet.state_dict()
    loaded = load_pipeline(tmp_path / "student")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.unet.state_dict().items())
    # Where a file's tensors lie in memory decides which kernel adds in which order.
    torch.testing.assert_close(generate(loaded, ["octopus, noto"], steps=2), before, atol=1e-4, rtol=0)
    assert type(loaded) is StableDiffusionPipeline
    assert not torch.equal(generate(pipeline, ["octopus, noto"], steps=2), before)


def test_a_stock_pipeline_saved_by_us_is_stock(model):
    assert json.loads((model / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_saving_replaces_what_is_ours_and_nothing_else(pipeline, model, tmp_path):
    save_pipeline(pipeline, model)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(AsdmError, match="was not written by asdm"):
        save_pipeline(pipeline, tmp_path / "theirs")
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(AsdmError, match="a file; name a folder"):
        save_pipeline(pipeline, tmp_path / "theirs" / "thesis.txt")


def test_a_part_that_cannot_be_saved_is_named(pipeline, model):
    class Graph(torch.nn.Module):
        config = pipeline.vae.config

    before = json.loads((model / "model_index.json").read_text())
    for name, other in (("vae", with_vae(pipeline, Graph())), ("unet", with_unet(pipeline, Graph()))):
        with pytest.raises(AsdmError, match=f"the {name} is a Graph, which cannot be saved"):
            save_pipeline(other, model)
    assert json.loads((model / "model_index.json").read_text()) == before and (model / "vae").is_dir()


def test_saving_into_a_folder_of_ours_keeps_its_other_files(pipeline, tmp_path):
    (tmp_path / MARKER).write_text("{}")
    (tmp_path / "report.html").write_text("figures")
    for _ in range(2):
        save_pipeline_into(pipeline, tmp_path)
        load_pipeline(tmp_path)
    assert (tmp_path / "report.html").read_text() == "figures"
    assert not list(tmp_path.glob(".saved*"))


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(pipeline, tmp_path):
    own = tmp_path / "model" / "notes.txt"
    before = os.umask(0o027)
    try:
        save_pipeline(pipeline, tmp_path / "model")
        own.write_text("mine")
        own.chmod(0o600)
        save_pipeline(pipeline, tmp_path / "model")
        (tmp_path / "made").mkdir()
        save_pipeline_into(pipeline, tmp_path / "made")
        with replacing_file(tmp_path / "lora.safetensors") as partial:
            save_file({"weight": torch.zeros(1)}, partial)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes.pop(own) == 0o600
    assert {path.name for path in modes} >= {"model.safetensors", "lora.safetensors", "config.json"}
    assert set(modes.values()) == {0o640}


def test_what_else_was_put_beside_a_pipeline_is_kept(pipeline, model):
    (model / "clip").mkdir()
    (model / "clip" / "config.json").write_text("{}")
    (model / "inheritance.json").write_text("[]")
    (model / "lost").symlink_to("nowhere")
    (model / "unet" / "old.safetensors").write_text("of the one before")
    save_pipeline(pipeline, model)
    assert (model / "lost").is_symlink()
    assert (model / "clip" / "config.json").read_text() == "{}" and (model / "inheritance.json").is_file()
    assert not (model / "unet" / "old.safetensors").exists()


def test_a_linked_folder_is_written_where_it_points_to(pipeline, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        save_pipeline(pipeline, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_pipeline(tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_pipe_or_a_device_is_never_replaced(pipeline, tmp_path):
    place = tmp_path / "pipe"
    os.mkfifo(place)
    plan = PruningPlan.for_unet(pipeline.unet)
    for write in (plan.save, lambda path: save_pipeline(pipeline, path)):
        with pytest.raises(AsdmError, match="pipe: is a device or a pipe; name a f"):
            write(place)
    with pytest.raises(AsdmError, match=f"{tmp_path.name}: is a folder; name a file"):
        plan.save(tmp_path)
    assert place.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_writers_of_one_folder_do_not_mix_and_the_killed_leave_nothing(tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    theirs, stale = (tmp_path / f".made.{number}.partial" for number in (other.pid, 4_000_000))
    theirs.mkdir()
    stale.mkdir()
    (tmp_path / ".made.v2.4000000.previous").mkdir()  # another's
    (tmp_path / ".made.4000000.previous").mkdir()  # killed between its two renames
    try:
        with pytest.raises(OSError, match="full"), replacing_folder(tmp_path / "made"):
            assert (tmp_path / "made").is_dir()
            raise OSError("the disk is full")
        assert sorted(path.name for path in tmp_path.iterdir()) == [theirs.name, ".made.v2.4000000.previous", "made"]
    finally:
        other.kill()


def test_a_lora_is_refused_before_anything_is_replaced(pipeline, model, tmp_path):
    import peft

    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(AsdmError, match="a LoRA is loaded"):
        save_pipeline(pipeline, model)
    load_pipeline(model)
    other = tiny_pipeline()
    other.load_lora_weights(text_lora_file(other.text_encoder, tmp_path / "lora.safetensors"))
    with pytest.raises(AsdmError, match="a LoRA is loaded in the text_encoder"):
        save_pipeline(other, model)


def test_tools_on_older_transformers_find_weights_and_words(pipeline, model):
    names = load_file(model / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    weights = pipeline.text_encoder.state_dict()
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in load_pipeline(model).text_encoder.state_dict().items()
    )
    words = json.loads((model / "tokenizer" / "vocab.json").read_text("utf-8"))
    assert words == pipeline.tokenizer.get_vocab()
    merges = (model / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()
    assert merges[0].startswith("#version") and all("".join(pair.split(" ")) in words for pair in merges[1:])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def without(path, name):
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if name not in key}, path, {"format": "pt"})


def integers(path):
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path, {"format": "pt"})


def narrow(path):
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("final_layer_norm.bias"))
    save_file({**tensors, name: tensors[name][:5].clone()}, path, {"format": "pt"})


def shards(model, lost):
    """The UNet in several files, of which one is lost, or else a tensor of one."""
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tiny_unet().save_pretrained(model / "unet", max_shard_size="1MB")
    weights.unlink()
    if lost is not None:
        next((model / "unet").glob(f"*{lost}*")).unlink()
        return
    shard = next((model / "unet").glob("*-00002-of-*"))
    tensors = load_file(shard)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, shard, {"format": "pt"})


def pickle_over(path):
    path.write_bytes(pickle.dumps({"weights": [1, 2]}, protocol=2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: shutil.rmtree(model), "no such folder or file"),
        (lambda model: (model / "model_index.json").unlink(), "not a pipeline folder"),
        (lambda model: shutil.rmtree(model / "unet"), "without a UNet"),
        (lambda model: (model / "unet" / "diffusion_pytorch_model.safetensors").unlink(), r"no \.safetensors weights"),
        (lambda model: truncate(model / "unet" / "diffusion_pytorch_model.safetensors"), "truncated or damaged"),
        (lambda model: truncate(model / "vae" / "diffusion_pytorch_model.safetensors"), "truncated or damaged"),
        (lambda model: pickle_over(model / "unet" / "diffusion_pytorch_model.safetensors"), "a pickle named"),
        (lambda model: without(model / "unet" / "diffusion_pytorch_model.safetensors", "attn1.to_q"), "its unet lacks"),
        (lambda model: without(model / "vae" / "diffusion_pytorch_model.safetensors", "conv_out"), "its vae lacks"),
        (lambda model: without(model / "text_encoder" / "model.safetensors", "layers.1"), "its text_encoder lacks"),
        (lambda model: shutil.rmtree(model / "vae"), "lacks its vae, which model_index.json names"),
        (lambda model: shutil.rmtree(model / "tokenizer"), "lacks its tokenizer"),
        (lambda model: (model / "model_index.json").write_text("{"), "model_index.json: damaged"),
        (lambda model: integers(model / "vae" / "diffusion_pytorch_model.safetensors"), r"\(I8\), quantised weights"),
        (lambda model: narrow(model / "text_encoder" / "model.safetensors"), "text_encoder has other shapes"),
        (lambda model: shards(model, "-00002-of-"), r"unet: lacks 1 of the \d+ files of .*index.json"),
        (lambda model: shards(model, ".index.json"), "unet: shards without their index"),
        (lambda model: shards(model, None), r"unet lacks 1 of its 684 tensors \(unet/.*-00002-of-.*\): .*; download"),
        (lambda model: (model / "unet" / "config.json").write_text('{"_class_name": "UNet2D'), "config.json: damaged"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(model, damage, message):
    damage(model)
    with pytest.raises(AsdmError, match=message) as error:
        load_pipeline(model)
    assert str(model) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_t5_that_lacks_a_tensor_is_refused(tmp_path):
    save_pipeline(tiny_pixart_pipeline(), tmp_path / "model")
    weights = tmp_path / "model" / "text_encoder" / "model.safetensors"
    whole = load_file(weights)
    tied = {"encoder.embed_tokens.weight": whole["shared.weight"]}
    save_file(
        {name: tensor for name, tensor in (whole | tied).items() if name != "shared.weight"}, weights, {"format": "pt"}
    )
    assert torch.equal(load_pipeline(tmp_path / "model").text_encoder.shared.weight, whole["shared.weight"])
    without(weights, "SelfAttention.q")
    with pytest.raises(AsdmError, match=r"its text_encoder lacks 1 of its \d+ tensors .*SelfAttention\.q\.weight"):
        load_pipeline(tmp_path / "model")


@pytest.fixture
def with_sentencepiece(tmp_path):
    """A pipeline whose tokenizer is the file of sentencepiece alone, as in PixArt's own checkpoints."""
    save_pipeline(tiny_pixart_pipeline(), tmp_path / "model")
    folder, trained = tmp_path / "model" / "tokenizer", io.BytesIO()
    (folder / "tokenizer.json").unlink()
    sizes = {"vocab_size": 30, "hard_vocab_limit": False}
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentences = iter(["a red cat", "a blue dog", "the red house"] * 9)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=trained, minloglevel=2, **sizes, **special
    )
    (folder / "spiece.model").write_bytes(trained.getvalue())
    return tmp_path / "model"


def test_a_tokenizer_that_is_sentencepieces_file_alone_is_loaded(with_sentencepiece, tmp_path):
    pipeline = load_pipeline(with_sentencepiece)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(with_sentencepiece / "tokenizer" / "spiece.model"))
    expected = pieces.encode("a red house")
    assert len(expected) > 3 and pipeline.tokenizer("a red house").input_ids == [*expected, pieces.eos_id()]
    assert embed_prompts(pipeline, ["a red house"]).encoder_hidden_states.isfinite().all()
    again = load_pipeline(save_pipeline(pipeline, tmp_path / "again"))
    assert again.tokenizer("a red house").input_ids == [*expected, pieces.eos_id()]


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_without_sentencepiece_its_tokenizer_is_refused_with_what_to_install(with_sentencepiece, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith(("sentencepiece", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AsdmError, match=r"spiece.model: needs .*; install them with .*asdm-diffusion.pixart") as error:
        load_pipeline(with_sentencepiece)
    assert package in str(error.value)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_file_of_sentencepiece_is_refused_as_such(with_sentencepiece, content):
    (with_sentencepiece / "tokenizer" / "spiece.model").write_bytes(content)
    with pytest.raises(AsdmError, match=r"spiece.model: cannot be loaded .*; download it again$"):
        load_pipeline(with_sentencepiece)


def test_shards_in_a_variant_alone_are_found(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    next((tmp_path / "unet").glob("*.safetensors")).unlink()
    pipeline.unet.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="2MB")
    assert torch.equal(predict(load_pipeline(tmp_path).unet), predict(pipeline.unet))


def test_single_files_that_are_no_checkpoints_are_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    pickle_over(tmp_path / "pickle.safetensors")
    pickle_over(tmp_path / "model.ckpt")
    for name, message in (
        ("other.safetensors", "not a whole Stable Diffusion checkpoint"),
        ("pickle.safetensors", "a pickle named"),
        ("model.ckpt", "a pickle, which can run code"),
        ("absent.safetensors", "no such folder or file"),
    ):
        with pytest.raises(AsdmError, match=message):
            load_pipeline(tmp_path / name)


@pytest.mark.parametrize("name", ["random:sd9", "no-such-model", "someone/no-such-model-at-all"])
def test_unknown_models_are_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AsdmError, match=name):
        load_pipeline(name)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_prompts_are_cut_at_the_text_encoders_length_where_the_tokenizer_has_none(make, tmp_path):
    expected = generate(make(), ["octopus " * 99], steps=2)
    save_pipeline(make(), tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*/tokenizer_config.json"):
        config = json.loads(path.read_text())
        del config["model_max_length"]
        path.write_text(json.dumps(config))
    loaded = load_pipeline(tmp_path / "model")
    assert loaded.tokenizer.model_max_length == loaded.text_encoder.config.max_position_embeddings
    assert torch.equal(generate(loaded, ["octopus " * 99], steps=2), expected)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where a Hub id's files are kept; the Hub is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub" / "models--me--model" / "refs").mkdir(parents=True)
    (tmp_path / "hub" / "models--me--model" / "refs" / "main").write_text("0" * 40)
    return tmp_path / "hub" / "models--me--model" / "snapshots" / ("0" * 40)


def test_a_model_from_the_hub_is_what_its_files_say(pipeline, model, hub, tmp_path):
    scheduler = model / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({name: value for name, value in config.items() if name != "prediction_type"}))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "modelspec.prediction_type": "v"})
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / MARKER).write_text(json.dumps({"kind": "pipeline", "teacher": "some/teacher"}))
    shutil.copytree(model, hub)
    for name in (str(model), "me/model"):
        loaded = load_pipeline(name)
        assert loaded.scheduler.config.prediction_type == "v_prediction", name
        made = export_checkpoint(loaded, tmp_path / "one.safetensors", "diffusers", unet_only=True)
        about = safe_open(made.file, "pt").metadata()
        assert (about["modelspec.license"], about["asdm.teacher"]) == ("mit", "some/teacher"), name


def test_an_images_noise_does_not_depend_on_its_batch(pipeline):
    prompts = ["octopus, noto", "rocket, twemoji", "pear, noto"]
    together = generate(pipeline, prompts, steps=2, batch_size=3)
    apart = generate(pipeline, prompts, steps=2, batch_size=1)
    torch.testing.assert_close(together, apart, atol=2e-2, rtol=0)
    assert together.shape == (3, 3, 16, 16)
    assert not torch.equal(together, generate(pipeline, prompts, steps=2, seed=9))


def test_pipelines_made_of_one_that_sets_no_watermark_set_none(monkeypatch):
    def install(module):
        monkeypatch.setattr(module, "is_invisible_watermark_available", lambda: True)
        monkeypatch.setattr(module, "StableDiffusionXLWatermarker", object, raising=False)

    pipeline = tiny_sdxl_pipeline()
    for kind in (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline):
        install(sys.modules[kind.__module__])
    assert StableDiffusionXLPipeline(**pipeline.components).watermark is not None
    for other in (with_unet(pipeline, pipeline.unet), image_to_image(pipeline)):
        assert other.watermark is None


def test_image_to_image_keeps_more_at_less_strength(pipeline):
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    drawn = {s: generate(pipeline, ["pear, noto"], steps=10, image=image, strength=s) for s in (0.1, 1.0)}
    start = generate(pipeline, ["pear, noto"], steps=100, image=image, strength=0.01)
    assert (drawn[0.1] - start).abs().mean() < (drawn[1.0] - start).abs().mean()


def test_prompts_are_embedded_as_the_pipeline_does(pipeline):
    prompts = ["octopus, noto", "", "rocket, twemoji"]
    expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(embed_prompts(pipeline, prompts, batch_size=2).encoder_hidden_states, expected)


def test_latents_are_scaled_as_the_unet_expects_them(pipeline):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_images(pipeline.vae, images)
    assert image_size(pipeline) == 16
    assert torch.equal(latents, pipeline.vae.encode(images).latent_dist.mode() * 0.5)


def test_a_unet_for_edits_is_refused_with_its_channels(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet = tiny_unet(in_channels=8)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(AsdmError, match=r"takes 8 channels.*text-to-image or inpainting"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_pipelines_from_images_come_back_as_text_to_image(kind, tmp_path):
    pipeline = tiny_pipeline()
    kind(**pipeline.components, requires_safety_checker=False).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is type(pipeline)
    assert torch.equal(generate(loaded, ["octopus"], steps=2), generate(pipeline, ["octopus"], steps=2))


def test_what_is_no_base_model_is_refused(tmp_path):
    refiner = tiny_sdxl_pipeline()
    parts = {**refiner.components, "text_encoder": None, "tokenizer": None}
    StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True).save_pretrained(tmp_path / "refiner")
    with pytest.raises(AsdmError, match="no first text encoder, as SDXL's refiner"):
        load_pipeline(tmp_path / "refiner")
    tiny_pipeline().save_pretrained(tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    for name, message in (("Nowhere", "cannot be loaded"), ("DDPMPipeline", "a DDPMPipeline; use SD 1.x")):
        kept = index if name == "Nowhere" else {key: index[key] for key in ("unet", "scheduler")}
        (tmp_path / "other" / "model_index.json").write_text(json.dumps({**kept, "_class_name": name}))
        with pytest.raises(AsdmError, match=message):
            load_pipeline(tmp_path / "other")


def test_weights_in_half_precision_alone_are_found(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "stock", variant="fp16")
    plan = PruningPlan.for_unet(pipeline.unet, [Remove(unit="mid_block")])
    student = with_unet(pipeline, build_student(pipeline.unet, plan))
    student.save_pretrained(tmp_path / "student", variant="fp16")
    for name, unet in (("stock", pipeline.unet), ("student", student.unet)):
        assert torch.equal(predict(load_pipeline(tmp_path / name).unet), predict(unet))


@pytest.mark.parametrize("edits", [[], [Remove(unit="mid_block")]])
def test_each_part_takes_its_full_weights_where_it_has_them(pipeline, edits, tmp_path):
    unet = build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits)) if edits else pipeline.unet
    given = with_unet(pipeline, unet)
    given.save_pretrained(tmp_path)
    halves = copy.deepcopy(given.vae).half(), copy.deepcopy(given.text_encoder).half()
    for part, half in zip(("vae", "text_encoder"), halves, strict=True):
        half.save_pretrained(tmp_path / part, variant="fp16")  # beside the full ones
    shutil.rmtree(tmp_path / "unet")
    copy.deepcopy(given.unet).half().save_pretrained(tmp_path / "unet", variant="fp16")
    loaded = load_pipeline(tmp_path)
    for part in (loaded.vae, loaded.text_encoder):
        own = given.vae if part is loaded.vae else given.text_encoder
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(part.parameters(), own.parameters(), strict=True))
    assert loaded.vae_scale_factor == given.vae_scale_factor and loaded.unet.dtype == torch.float32
    stored = load_mapped(tmp_path, dtype=torch.float32)
    assert (stored.unet.dtype, stored.vae.dtype, stored.text_encoder.dtype) == (torch.float16, *[torch.float32] * 2)
    assert torch.equal(stored.vae.decoder.conv_out.weight, given.vae.decoder.conv_out.weight)


def test_a_folder_is_named_not_meant(pipeline, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in (".", ".."):
        with pytest.raises(AsdmError, match="name a folder in it"):
            save_pipeline(pipeline, folder)


def test_sizes_that_are_not_square(pipeline):
    wide = with_unet(pipeline, tiny_unet(sample_size=[8, 12]))
    assert generate(wide, ["octopus"], steps=2).shape == (1, 3, 16, 24)


def test_images_of_another_size(pipeline):
    assert generate(pipeline, ["octopus"], steps=2, size=24).shape == (1, 3, 24, 24)
    with pytest.raises(AsdmError, match="size=25: must be a positive multiple of 8; the nearest is 24"):
        generate(pipeline, ["octopus"], steps=2, size=25)
    with pytest.raises(AsdmError, match="size=24: image-to-image generates at the image's own size"):
        generate(pipeline, ["octopus"], steps=2, size=24, image=Image.new("RGB", (16, 16)))


def test_a_card_names_hub_ids_as_base_models_and_nothing_else(pipeline, tmp_path, monkeypatch):
    for folder in ("models/mine", "a/b/c"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model: owner/name" in model_card(pipeline, "x", "owner/name")
    for teacher in ("models/mine", "models/", "./name", "/name", "a/b/c", "demo"):
        assert "base_model" not in model_card(pipeline, "x", teacher), teacher


def test_a_unet_for_inpainting_gets_a_pipeline_for_inpainting(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.unet = tiny_unet(in_channels=9)
    pipeline.save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path)) is StableDiffusionInpaintPipeline
