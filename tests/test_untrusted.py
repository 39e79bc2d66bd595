"""The smallest inputs that the fuzzing of readers has found, and what a stranger's model may not do."""

import io
import json
import multiprocessing
import os
import socket
import tarfile
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, DiffusionPipeline
from huggingface_hub import constants as hub
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from asdm import AsdmError, CacheSchedule, Evaluation, PruningPlan, RedundancyMap, images, load_pipeline, save_pipeline
from asdm.data import hf_datasets
from asdm.data.draws import Draws
from asdm.data.examples import LONGEST_CAPTION
from asdm.data.hf_datasets import _file_of
from asdm.data.metadata import rows_of_metadata
from asdm.data.prepared import PreparedData
from asdm.data.shards import MAX_SAMPLE
from asdm.data.sources import open_data
from asdm.distillation.recipes import read_stages
from asdm.distillation.semantics import make_encoder
from asdm.errors import AsdmWarning
from asdm.evaluation.protocol.captions import read_captions
from asdm.files import write_new
from asdm.generation.controlnet import load_controlnet
from asdm.generation.image import read_about
from asdm.images import open_image
from asdm.pipelines import untrusted
from asdm.pipelines.decoders import load_decoder
from asdm.pipelines.shapes import denoiser_without_weights
from asdm.reading import MAX_DEPTH, parse_json, parse_yaml
from asdm.training.checkpoints import TrainingState, checkpoint_step
from asdm.training.log import read_log
from conftest import tiny_pipeline, tiny_unet
from fuzzing import inputs


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "9" * 5000, str(2**64), "{", ""]
)
def test_json_that_is_too_deep_or_too_large_is_a_value_error(text):
    with pytest.raises(ValueError) as error:
        parse_json(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", inputs.HOSTILE_YAML)
def test_hostile_yaml_is_bounded_data_or_a_value_error(text):
    try:
        json.dumps(parse_yaml(text), default=str)
    except ValueError as error:
        assert "\n" not in str(error)


def test_aliases_that_repeat_too_much_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(inputs._BOMB)
    with pytest.raises(AsdmError, match="aliases written out"):
        read_stages(tmp_path / "recipe.yaml")
    assert parse_yaml("a: &a [1]\nb: *a") == {"a": [1], "b": [1]}


@pytest.mark.parametrize("kind", [PruningPlan, RedundancyMap, Evaluation, CacheSchedule])
@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b'{"speed": [{"unet": {"median_ms": 1}}, {}]}', b'{"edits": 1}'],
)
def test_a_record_is_refused_in_one_line(kind, content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(AsdmError) as error:
        kind.load(tmp_path / "file.json")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_messages_are_one_line_that_a_terminal_does_not_obey():
    for kind in (AsdmError, AsdmWarning):
        assert str(kind("a\nb\x1b[2J\u202ec é 🦑")) == r"a\nb\x1b[2J\u202ec é 🦑"
        assert len(str(kind("x" * 10**6))) < 5000


# -- data -------------------------------------------------------------------------------------------------


def prepared(folder, arrays, piece=None, save=np.savez):
    content = io.BytesIO()
    save(content, **arrays)
    size = len(content.getvalue())
    (folder / "00000.tar").write_bytes(content.getvalue())
    (folder / "prepared.json").write_text('{"pieces": 1, "made_by": "x"}')
    about = {"captions": ["a cat"], "places": [[0, size]], "skipped": {}} if piece is None else piece
    (folder / "00000.json").write_text(json.dumps(about))
    return folder


LATENTS = {"latents": np.zeros((4, 2, 2), np.float16), "encoder_hidden_states": np.zeros((3, 8), np.float16)}


def test_prepared_samples_are_plain_arrays_as_they_are_stored(tmp_path):
    assert PreparedData(prepared(tmp_path, LATENTS)).batch([0])[0].shape == (1, 4, 2, 2)
    with pytest.raises(AsdmError, match="compressed arrays"):
        PreparedData(prepared(tmp_path, LATENTS, save=np.savez_compressed)).batch([0])
    with pytest.raises(AsdmError, match="damaged"):
        PreparedData(prepared(tmp_path, {"latents": np.array([print], dtype=object)})).batch([0])
    with pytest.raises(AsdmError, match="do not fit together"):
        PreparedData(prepared(tmp_path, {"other": np.zeros(3)})).batch([0])
    for piece in (
        {},
        {"captions": ["a"], "places": [], "skipped": {}},
        {"captions": ["a"], "places": [[-1, 2]], "skipped": {}},
    ):
        with pytest.raises(AsdmError, match="not the index of a shard"):
            PreparedData(prepared(tmp_path, LATENTS, piece))


def test_a_scale_of_another_shape_is_named(tmp_path):
    draws = Draws(tmp_path, "int8", ["x"])
    draws.path(0).parent.mkdir(parents=True)
    save_file({"x": torch.zeros(0, 3, dtype=torch.int8), "x.scale": torch.ones(4, 1)}, draws.path(0))
    with pytest.raises(AsdmError, match="damaged or missing"):
        draws.read(torch.tensor([0]), "x")


def test_shards_leave_nothing_on_the_disk_and_bound_a_sample(tmp_path, monkeypatch):
    picture = inputs._pictures()[0]
    members = [("../../escaped.txt", tarfile.REGTYPE, b"x"), ("/tmp/escaped.txt", tarfile.REGTYPE, b"x")]
    members += [("0.png", tarfile.SYMTYPE, b""), ("1.png", tarfile.REGTYPE, picture)]
    members += [("1.txt", tarfile.REGTYPE, b"a cat"), ("2.png", tarfile.REGTYPE, picture * 2)]
    (tmp_path / "shards").mkdir()
    shard = tmp_path / "shards" / "0.tar"
    shard.write_bytes(inputs.tarred(members))
    data = open_data(str(shard), "all")
    assert [example.caption for example in data.examples] == ["a cat"]
    assert [path.name for path in tmp_path.rglob("*")] == ["shards", "0.tar"]
    monkeypatch.setattr("asdm.data.shards.MAX_SAMPLE", len(picture) + 10)
    assert any("in a sample" in reason for reason in open_data(str(shard), "all").skipped.values())
    assert MAX_SAMPLE > 10**8
    with pytest.raises(AsdmError, match="a command, which is not run"):
        open_data("pipe:touch x.tar")


def test_images_of_a_dataset_are_files_or_bounded(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    assert _file_of({"path": "file:///dev/zero"}) == Path("/dev/zero"), "opened as other files are"
    monkeypatch.setattr(fsspec, "open", lambda *_: closing(io.BytesIO(bytes(2**21))))
    monkeypatch.setattr(hf_datasets, "MAX_SAMPLE", 2**20)
    with pytest.raises(ValueError, match="more than 1 MB"):
        _file_of({"path": "http://127.0.0.1:9/x.png"})


def test_a_table_of_parquet_whose_text_is_no_utf_8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    broken = pyarrow.array([b"\x80"]).view(pyarrow.string())
    parquet.write_table(
        pyarrow.table({"file_name": pyarrow.array(["0.png"]), "text": broken}), tmp_path / "metadata.parquet"
    )
    with pytest.raises(AsdmError, match="cannot be read"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    "content",
    [inputs.png(60_000, 60_000), inputs.png(16, 16, zlib.compress(bytes(16 * 49)), (b"tEXt", b"asdm\0" + b"[" * 5000))],
)
def test_a_png_that_is_a_bomb_has_no_description(content, tmp_path):
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(AsdmError, match="not a PNG that asdm generated"):
        read_about(tmp_path / "image.png")


@pytest.mark.parametrize("special", ["/dev/zero", "pipe", "folder"])
def test_what_is_no_file_is_no_image(special, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    place = tmp_path / "0.png"
    if special == "/dev/zero":
        place.symlink_to(special)
    elif special == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{n}.png", "text": "a cat"}) for n in "01")
    )
    data = open_data(tmp_path)
    assert [example.name for example in data.examples] == ["1.png"] and "0.png" in data.skipped
    with pytest.raises(AsdmError, match="not an image that can be read"):
        open_image(place)


def test_pixels_are_bounded_and_large_photographs_are_halved(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MOST_PIXELS", 32 * 32)
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for name in ("large.png", "large.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
    assert open_image(tmp_path / "large.jpg").size == (20, 20)
    with pytest.raises(AsdmError, match=r"40x40 pixels, more than 1,024"):
        open_image(tmp_path / "large.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_are_converted_row_by_row_as_in_one_piece(mode, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (50, 30, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    whole = images._opaque(image, "white")
    monkeypatch.setattr(images, "_ROWS", 7)
    assert images.as_rgb(image).tobytes() == whole.tobytes()


def test_captions_are_bounded_wherever_they_stand(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    long = "word " * LONGEST_CAPTION
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3), pyarrow.array([long]))
    lists = pyarrow.array([["a cat"] * 40] * 3)
    for texts, told in [(same, "more than 10,000 characters"), (lists, None)]:
        table = pyarrow.table({"file_name": ["0.png"] * 3, "text": texts, "more": [{"a": 1}] * 3})
        parquet.write_table(table, tmp_path / "metadata.parquet")
        rows = [row for _, row, _ in rows_of_metadata(tmp_path / "metadata.parquet")]
        assert len(rows) == 3 and list(rows[0]) == ["file_name", "text", "more"]
        if told is None:
            assert [len(row["text"]) for row in rows] == [16] * 3
            assert open_data(tmp_path).examples[0].caption == "a cat"
        else:
            assert rows[0]["text"] is rows[1]["text"], "one object, however often a table names it"
            with pytest.raises(AsdmError, match=told):
                open_data(tmp_path)
    (tmp_path / "metadata.parquet").unlink()
    for name, content in [("0.txt", long), ("p.txt", f"a cat\n{long}\n"), ("p.jsonl", json.dumps({"text": long})),
                          ("p.json", json.dumps({"annotations": [{"image_id": 1, "id": 1, "caption": long}]})),
                          ("n.jsonl", json.dumps({"text": "a\0cat"}))]:  # fmt: skip
        (tmp_path / name).write_text(content)
    assert "more than 10,000" in open_data(tmp_path / "p.txt").skipped["p.txt:2"]
    for name in ("p.txt", "p.jsonl", "p.json", "n.jsonl"):
        with pytest.raises(AsdmError, match=r"more than 10,000 characters|not text in UTF-8"):
            read_captions(tmp_path / name, 10)
    (tmp_path / "p.txt").unlink()
    with pytest.raises(AsdmError, match="more than 10,000 characters"):
        open_data(tmp_path)


# -- trainings --------------------------------------------------------------------------------------------


def training():
    torch.manual_seed(0)
    weights = {"a": torch.nn.Parameter(torch.ones(2, 3))}
    optimizer = torch.optim.AdamW(weights.values())
    weights["a"].grad = torch.ones(2, 3)
    optimizer.step()
    return TrainingState(weights, optimizer, None)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("optimizer", lambda tensors: tensors.pop("0.exp_avg"), "another optimizer's"),
        ("optimizer", lambda tensors: tensors.update({"0.exp_avg": torch.zeros(7)}), "another optimizer's"),
        ("optimizer", lambda tensors: tensors.update({"99.step": torch.zeros(1)}), "no moment of this optimizer"),
        ("weights", lambda tensors: tensors.update({"a": torch.zeros(1)}), "of another model"),
        ("weights", None, "damaged or missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(name, change, said, tmp_path):
    training().save(tmp_path, 5)
    path = tmp_path / "checkpoint-0000005" / f"{name}.safetensors"
    tensors = load_file(path)
    if change is None:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        change(tensors)
        save_file(tensors, path)
    with pytest.raises(AsdmError, match=said):
        training().load_newest(tmp_path)


def test_folders_and_rows_of_others_are_passed_over(tmp_path):
    for name in ("checkpoint-x5", "checkpoint-" + "9" * 30, "checkpoint-0000004"):
        (tmp_path / name).mkdir()
    assert checkpoint_step(tmp_path) == 4
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"loss": 3}\n{"step": 3, "loss": 4}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "loss": 2}]


# -- models -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return save_pipeline(tiny_pipeline(), tmp_path / "model")


def changed(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("model_index.json", {"unet": ["os", "system"]}, "of the library os"),
        ("model_index.json", {"text_encoder": ["evil", "Evil"]}, "of the library evil"),
        ("model_index.json", {"text_encoder": ["transformers", "AutoModel"]}, "can run code"),
        ("model_index.json", {"vae": "AutoencoderKL"}, "cannot be loaded|lacks"),
        ("model_index.json", {"../../x": ["diffusers", "AutoencoderKL"]}, "no name of a part"),
        ("model_index.json", {"é" * 200: []}, "no name of a part"),
        ("model_index.json", {"x" * 300: ["diffusers", "AutoencoderKL"]}, "no name of a part"),
        ("model_index.json", {"x\0": [None, None]}, "no name of a part"),
        ("model_index.json", {"text_encoder": ["diffusers", "DiffusionPipeline"]}, "no part of a pipeline"),
        ("model_index.json", {"vae": ["pipeline_utils", "DiffusionPipeline"]}, "no part of a pipeline"),
        ("model_index.json", {"vae": ["pipeline_utils", "os"]}, "no part of a pipeline"),
        ("model_index.json", {"tokenizer": ["transformers", "RagRetriever"]}, "no part of a pipeline"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Evil"}}, "others' code"),
        ("text_encoder/config.json", {"attn_implementation": "someone/kernel"}, "others' code"),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights"),
        ("unet/config.json", {"layers_per_block": 100_000}, "more than 20000 modules"),
        ("text_encoder/config.json", {"num_hidden_layers": 100_000}, "more than 20000 modules"),
        ("text_encoder/config.json", {"hidden_size": 2**19}, "config describes"),
        ("unet/config.json", {"conv_in_kernel": 100_000}, "config describes"),
        ("vae/config.json", {"latent_channels": 10**6}, "config describes"),
        # the class is the one that model_index.json names, whatever the part's own config says
        ("text_encoder/config.json", {"hidden_size": 2**19, "architectures": None}, "config describes"),
        ("unet/config.json", {"conv_in_kernel": 100_000, "architectures": ["CLIPTextModel"]}, "config describes"),
        (
            "vae/config.json",
            {"block_out_channels": [2**14, 2**14], "_class_name": "AutoencoderTiny"},
            "config describes",
        ),
        ("unet/config.json", {"norm_num_groups": 0}, "cannot be loaded: integer modulo by zero"),
        ("text_encoder/config.json", {"vocab_size": 10**12}, "vocab_size=1000000000000: must be at most"),
    ],
)
def test_a_folder_that_asks_for_code_or_for_too_much_is_refused(file, fields, said, model):
    changed(model / file, **fields)
    with pytest.raises(AsdmError, match=said) as error:
        load_pipeline(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_pickles_alone_are_not_opened(part, model):
    (weights,) = (model / part).glob("*.safetensors")
    weights.rename(model / part / "pytorch_model.bin")
    with pytest.raises(AsdmError, match=rf"{part}: no .safetensors weights; pickles are not loaded"):
        load_pipeline(model)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_pipe_in_a_models_folder_is_refused(name, model):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(AsdmError, match=r"a pipe or a device|not a pipeline folder"):
        load_pipeline(model)


def test_a_config_that_names_models_elsewhere_fetches_none(model, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args))
    backbone = {"backbone": "someone/else", "use_pretrained_backbone": True, "use_timm_backbone": False}
    changed(model / "model_index.json", text_encoder=["transformers", "DetrModel"])
    changed(model / "text_encoder" / "config.json", architectures=["DetrModel"], model_type="detr", **backbone)
    with pytest.raises(AsdmError, match="cannot be loaded"):
        load_pipeline(model)
    (model / "vae" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(AsdmError, match="an adapter"):
        load_pipeline(model)
    assert asked == []
    before = hub.HF_HUB_OFFLINE
    with untrusted.without_network():
        with untrusted.without_network():
            pass
        assert hub.HF_HUB_OFFLINE
    assert before == hub.HF_HUB_OFFLINE


def test_what_comes_from_the_hub_is_checked_as_folders_are(model, tmp_path, monkeypatch):
    config = model / "text_encoder" / "config.json"
    index = json.loads((model / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: index)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: str(model))
    assert load_pipeline("someone/pipeline").unet is not None
    for place in ("pipelines.transformers_models.snapshot_download", "pipelines.decoders.hf_hub_download",
                  "generation.controlnet.hf_hub_download"):  # fmt: skip
        found = config if place.endswith("hf_hub_download") else config.parent
        monkeypatch.setattr(f"asdm.{place}", lambda *_, found=found, **__: str(found))
    changed(config, attn_implementation="someone/kernel")
    for load in (
        lambda: load_pipeline("someone/pipeline"),
        lambda: make_encoder("someone/encoder", tiny_pipeline()),
        lambda: load_decoder("someone/decoder", tiny_pipeline()),
        lambda: load_controlnet(Path("someone/controlnet"), tiny_pipeline()),
    ):
        with pytest.raises(AsdmError, match="others' code"):
            load()


def test_code_in_a_models_folder_is_not_run(model, tmp_path):
    code = f"open({str(tmp_path / 'escaped')!r}, 'w')"
    for name in ("unet/os.py", "pipeline.py", "asdm_unet.py"):
        (model / name).write_text(code)
    load_pipeline(model)
    (model / "unet" / "diffusers.py").write_text(code)  # by which diffusers would take its class from the folder
    with pytest.raises(AsdmError, match="custom code"):
        load_pipeline(model)
    assert not (tmp_path / "escaped").exists()


def test_a_limit_of_modules_ends_with_its_block():
    with pytest.raises(AsdmError, match="modules"), untrusted.bounded_modules("x"):
        for _ in range(untrusted.MAX_MODULES + 1):
            torch.nn.Sequential().add_module("0", torch.nn.Identity())
    torch.nn.Sequential(*[torch.nn.Identity() for _ in range(untrusted.MAX_MODULES + 1)])


def test_a_config_that_is_no_object_is_refused(model):
    (model / "unet" / "config.json").write_text("null")
    with pytest.raises(AsdmError):
        denoiser_without_weights(str(model))
    with pytest.raises(AsdmError, match="no object"):
        load_pipeline(model)


def test_a_shard_in_another_folder_is_refused(model):
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../other.safetensors"}}))
    with pytest.raises(AsdmError, match="another folder"):
        load_pipeline(model)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "x" * 300}}))
    with pytest.raises(AsdmError, match="File name too long"):
        load_pipeline(model)


def test_a_controlnet_that_lacks_a_tensor_is_refused(tmp_path):
    ControlNetModel.from_unet(tiny_unet(), conditioning_embedding_out_channels=(16, 32)).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors.pop("conv_in.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AsdmError, match="conv_in"):
        load_controlnet(tmp_path, tiny_pipeline())


def test_a_decoder_or_encoder_that_is_a_pickle_is_refused(tmp_path):
    decoder = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    decoder.save_pretrained(tmp_path / "decoder", safe_serialization=False)
    with pytest.raises(AsdmError, match=r"no .safetensors weights; pickles are not loaded"):
        make_encoder("clip", tiny_pipeline(), decoder=str(tmp_path / "decoder"))


# -- one folder, several processes ------------------------------------------------------------------------


def _write_some(folder, mark):
    for _ in range(20):
        write_new((folder / f"image-{number}.txt" for number in range(100)), lambda path: path.write_text(mark))


def test_processes_that_write_into_one_folder_take_other_names(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_some, args=(tmp_path, mark)) for mark in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    marks = [path.read_text() for path in tmp_path.iterdir()]
    assert sorted(marks) == ["a"] * 20 + ["b"] * 20


def test_a_description_is_read_back(tmp_path):
    info = PngInfo()
    info.add_text("asdm", '{"seed": 3}')
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png", pnginfo=info)
    assert read_about(tmp_path / "image.png") == {"seed": 3}
