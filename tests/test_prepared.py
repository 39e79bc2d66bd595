"""Data sources other than folders, and latents and embeddings that are prepared from any of them."""

import io
import json
import tarfile

import datasets
import pytest
import torch
import webdataset
from diffusers import EulerDiscreteScheduler
from PIL import Image

import asdm.data.sources as data_module
from asdm import AsdmError, Stage, distill, evaluate, record_teacher, with_unet
from asdm.data import examples
from asdm.data.calibration import calibration_calls
from asdm.data.preparation import prepare_data
from asdm.data.prepared import PreparedData
from asdm.data.sources import open_data, open_source
from asdm.diffusion.conditioning import embed_prompts, encode_images
from asdm.distillation.distill import require_stages
from asdm.distillation.training_set import prepare
from asdm.evaluation.metrics import Judge
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.sampling import evaluation_sets
from conftest import tiny_pipeline, tiny_unet


def png(number, size=16):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number * 20 % 256, 99, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, samples):
    with tarfile.open(path, "w") as shard:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                header = tarfile.TarInfo(f"{key}.{suffix}")
                header.size = len(content)
                shard.addfile(header, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Two shards as img2dataset writes them, with one bad image, one lost caption, one held-out sample."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(
        folder / "00000.tar",
        {
            "000000000": {"png": png(1), "txt": b"a red house", "json": b'{"caption": "other", "width": 16}'},
            "000000001": {"png": png(2), "json": b'{"caption": "a blue house"}'},
            "000000002": {"png": b"not an image", "txt": b"broken"},
            "000000003": {"png": png(3)},
        },
    )
    write_shard(
        folder / "00001.tar",
        {
            "000010000": {"png": png(4), "txt": b"a fish"},
            "000010001": {"png": png(5), "txt": b"kept apart", "json": b'{"held_out": true}'},
        },
    )
    return folder


def test_shards_by_folder_by_path_and_by_pattern(shards):
    expected = ["a red house", "a blue house", "broken", "a fish"]
    pattern = f"{shards}/{{00000..00001}}.tar"
    for source in (shards, pattern, f"file://{pattern}"):
        data = open_data(source)
        assert [example.caption for example in data.examples] == expected
        assert list(data.skipped) == ["00000.tar/000000003"]
        assert "it has no caption" in data.skipped["00000.tar/000000003"]
    assert [example.caption for example in open_data(shards, "held_out").examples] == ["kept apart"]
    assert len(open_data(shards / "00001.tar")) == 1
    with pytest.raises(AsdmError, match=r"00002.tar: no such shard \(1 of 2\)"):
        open_data(f"{shards}/{{00001..00002}}.tar")


def test_what_is_skipped_is_counted_where_shards_have_the_same_keys(pipeline, tmp_path):
    samples = {"0": {"png": png(1), "txt": b"a fish"}, "1": {"png": b"broken", "txt": b"a cat"}, "2": {"png": png(2)}}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for shard in ("0.tar", "1.tar"):
            write_shard(tmp_path / folder / shard, samples)
    assert set(open_data(tmp_path / "a").skipped) == {"0.tar/2", "1.tar/2"}
    assert len(open_data(f"{tmp_path}/{{a,b}}/0.tar").skipped) == 2
    prepared = prepare_data(pipeline, tmp_path / "a", tmp_path / "prepared")
    assert set(prepared.skipped) == {"0.tar/1", "0.tar/2", "1.tar/1", "1.tar/2"}


def test_a_shard_that_breaks_off_gives_what_it_has_and_is_named(shards):
    whole = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(whole[:2000])
    data = open_data(shards)
    assert "a fish" in [example.caption for example in data.examples]
    assert any(name.endswith("00000.tar") and "not read to its end" in why for name, why in data.skipped.items())


@pytest.mark.parametrize("length", [0, 100], ids=["at a file's end", "in a header"])
def test_a_shard_that_breaks_off_between_files_is_named_too(tmp_path, length):
    write_shard(tmp_path / "0.tar", {str(number): {"txt": b"text", "png": png(number)} for number in range(3)})
    start = (tmp_path / "0.tar").read_bytes().index(b"1.txt")
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[: start + length])
    data = open_data(tmp_path)
    assert [example.name for example in data.examples] == ["0.tar/0"]
    assert "not read to its end" in data.skipped[str(tmp_path / "0.tar")]


@pytest.mark.parametrize("name", ["co:lon", "hf:owner", "pipe:cat"])
def test_a_folder_of_shards_may_have_a_colon_in_its_name(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    write_shard(tmp_path / name / "0.TAR", {"0": {"png": png(1), "txt": b"a fish"}})
    monkeypatch.chdir(tmp_path)
    assert [example.caption for example in open_data(f"./{name}").examples] == ["a fish"]


def test_a_shard_that_does_not_come_is_asked_for_again(pipeline, shards, tmp_path):
    whole = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(whole[:2000])
    url, folder = f"file://{shards}/{{00000..00001}}.tar", tmp_path / "prepared"
    with pytest.raises(AsdmError, match=r"1 of 2 shards could not be read \(.*00000.tar: not read to its end"):
        prepare_data(pipeline, url, folder)
    assert not (folder / "00000.tar").exists()
    second = (folder / "00001.tar").stat().st_mtime_ns
    (shards / "00000.tar").write_bytes(whole)
    assert prepare_data(pipeline, url, folder).captions == ["a red house", "a blue house", "a fish"]
    assert (folder / "00001.tar").stat().st_mtime_ns == second and not list(folder.glob("*.unread.txt"))
    (shards / "00000.tar").write_bytes(whole[:2000])
    without = prepare_data(pipeline, url, tmp_path / "without", ignore_missing_shards=True)
    assert without.captions[-1] == "a fish" and any("not read to its end" in why for why in without.skipped.values())


def test_a_dataset_that_breaks_off_gives_what_it_has_and_is_asked_for_again(pipeline, tmp_path, monkeypatch):
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    is_up = []

    def rows():
        for number in range(3):
            if number == 2 and not is_up:
                raise ConnectionError("Server disconnected")
            yield {"image": {"bytes": png(number), "path": None}, "text": f"house {number}"}

    streamed = datasets.IterableDataset.from_generator(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    with pytest.raises(AsdmError, match=r"1 of 1 shards could not be read \(shard 0: not read to its end: Server"):
        prepare_data(pipeline, "hf:owner/images", tmp_path / "prepared")
    without = prepare_data(pipeline, "hf:owner/images", tmp_path / "without", ignore_missing_shards=True)
    assert without.captions == ["house 0", "house 1"] and list(without.skipped) == ["shard 0"]
    is_up.append(True)
    assert len(prepare_data(pipeline, "hf:owner/images", tmp_path / "prepared")) == 3


def test_where_nothing_can_be_decoded_nothing_is_prepared_however_often(pipeline, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG", compress_level=0)
    broken = buffer.getvalue()[:2000]
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "00000.tar", {"0": {"png": broken, "txt": b"red"}})
    for _ in range(2):
        with pytest.raises(AsdmError, match=r"no images with captions \(1 skipped"):
            prepare_data(pipeline, tmp_path / "shards", tmp_path / "prepared")


@pytest.mark.parametrize("about", [b"null", b"[1]", b'{"caption": 3}'])
def test_a_shards_json_that_is_not_one_of_fields(shards, about):
    write_shard(shards / "00002.tar", {"1": {"png": png(1), "json": about}, "2": {"png": png(1), "txt": b"last"}})
    data = open_data(shards)
    assert data.examples[-1].caption == "last" and "00002.tar/1" in data.skipped


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_hugging_face_datasets(tmp_path, kind):
    rows = {"image": [Image.new("RGB", (16, 16), "red")] * 3, "text": ["one", "", "three"], "style": ["a", "b", "c"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    if kind == "saved":
        dataset.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        dataset.to_parquet(tmp_path / "set" / "train.parquet")
    data = open_data(f"hf:{tmp_path / 'set'}")
    assert [(example.caption, example.style) for example in data.examples] == [("one", "a"), ("three", "c")]
    assert data.examples[0].pixels(16).shape == (3, 16, 16)
    assert data.skipped == {"0/1": "its caption is empty"}


def test_a_datasets_caption_is_that_of_the_column_that_says_something(tmp_path):
    rows = {"image": [Image.new("RGB", (16, 16))] * 2, "caption": [None, "two"], "text": ["one", "other"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    assert [example.caption for example in open_data(f"hf:{tmp_path / 'set'}").examples] == ["one", "two"]


def test_a_split_that_a_saved_dataset_has_not_is_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (16, 16))], "text": ["one"]})
    rows = rows.cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "set")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "sets")
    assert len(open_data(f"hf:{tmp_path / 'set'}@train")) == len(open_data(f"hf:{tmp_path / 'sets'}@test")) == 1
    with pytest.raises(AsdmError, match=r"set@test: holds a single split, .*; leave @test out"):
        open_data(f"hf:{tmp_path / 'set'}@test")
    with pytest.raises(AsdmError, match=r"has no split train; name one of its own: hf:.*sets@test"):
        open_data(f"hf:{tmp_path / 'sets'}")


def test_a_dataset_on_disk_that_has_changed_is_other_data(tmp_path, monkeypatch):
    def save(color):
        rows = {"image": [Image.new("RGB", (16, 16), color)], "text": ["one"]}
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
        return open_source(f"hf:{tmp_path / 'set'}").identity

    before = save("red")
    monkeypatch.chdir(tmp_path)
    assert open_source("hf:set").identity == before
    assert save("blue") != before


def test_datasets_that_cannot_be_used_are_refused_with_what_they_have(tmp_path):
    datasets.Dataset.from_dict({"label": [1, 2]}).save_to_disk(tmp_path / "set")
    with pytest.raises(AsdmError, match="its columns are label; it needs one of images"):
        open_data(f"hf:{tmp_path / 'set'}")
    with pytest.raises(AsdmError, match="no such dataset or split"):
        open_data(f"hf:{tmp_path / 'absent'}")


def test_captions_alone_are_drawn_by_the_teacher(pipeline, tmp_path):
    (tmp_path / "captions.txt").write_text("a house\n\n  a  fish \n")
    prepared = prepare_data(pipeline, tmp_path / "captions.txt", tmp_path / "prepared", steps=3)
    assert prepared.captions == ["a house", "a fish"]
    latents, _ = prepared.batch([0, 1])
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline(
        prepared.captions, num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="latent"
    ).images
    torch.testing.assert_close(latents, drawn, atol=2e-2, rtol=2e-3)  # kept in half precision
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(AsdmError, match=r"empty\.txt: has no caption; write one a line"):
        prepare_data(pipeline, tmp_path / "empty.txt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("part", "weights", "value", "source", "what"),
    [
        ("text_encoder", "final_layer_norm.bias", float("nan"), "shards", "encoder_hidden_states .* text encoder are"),
        ("text_encoder", "final_layer_norm.bias", 1e6, "shards", "encoder_hidden_states .* text encoder are"),
        ("vae", "quant_conv.bias", 1e6, "shards", "latents .* VAE are"),
        ("unet", "conv_out.bias", float("nan"), "captions.txt", "latents .* denoiser are"),
    ],
)
def test_what_is_not_finite_in_float16_is_refused_with_its_part(shards, tmp_path, part, weights, value, source, what):
    pipeline = tiny_pipeline()
    (tmp_path / "captions.txt").write_text("a red house\n")
    named = getattr(pipeline, part).named_parameters()
    next(parameter for name, parameter in named if name.endswith(weights)).data.fill_(value)
    message = rf"its {what} damaged, or its precision overflows; .* float32"
    with pytest.raises(AsdmError, match=message):
        prepare_data(pipeline, tmp_path / source, tmp_path / "prepared", steps=1)
    assert not list((tmp_path / "prepared").glob("*.tar"))


def test_prepared_samples_are_the_encoded_images_and_captions(pipeline, shards, tmp_path):
    prepared = prepare_data(pipeline, shards, tmp_path / "prepared")
    assert prepared.captions == ["a red house", "a blue house", "a fish"]
    assert set(prepared.skipped) == {"00000.tar/000000002", "00000.tar/000000003"}
    examples = {example.caption: example for example in open_data(shards).examples}
    chosen = [examples[prepared.captions[index]] for index in (2, 0)]
    latents, captions = prepared.batch([2, 0])
    expected = encode_images(pipeline.vae, torch.stack([example.pixels(16) for example in chosen]))
    torch.testing.assert_close(latents, expected, atol=1e-2, rtol=1e-3)
    embedded = embed_prompts(pipeline, [example.caption for example in chosen]).encoder_hidden_states
    torch.testing.assert_close(captions.encoder_hidden_states, embedded, atol=1e-2, rtol=1e-3)


def test_prepared_shards_are_webdataset_shards(pipeline, shards, tmp_path):
    prepare_data(pipeline, shards, tmp_path / "prepared")
    url = str(tmp_path / "prepared" / "{00000..00001}.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    assert [sample["txt"] for sample in samples] == ["a red house", "a blue house", "a fish"]
    assert samples[0]["npz"]["latents"].shape == (4, 8, 8)


def test_an_interrupted_preparation_goes_on_at_the_next_piece(pipeline, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "PIECE", 2)
    whole = prepare_data(pipeline, data_folder, tmp_path / "whole")
    done = []

    def interrupt(number, count):
        done.append(number)
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_data(pipeline, data_folder, tmp_path / "twice", progress=interrupt)
    for opened in (PreparedData, open_data):
        with pytest.raises(AsdmError, match="not prepared to its end"):
            opened(tmp_path / "twice")
    first = (tmp_path / "twice" / "00000.tar").stat().st_mtime_ns
    resumed = prepare_data(pipeline, data_folder, tmp_path / "twice")
    assert (tmp_path / "twice" / "00000.tar").stat().st_mtime_ns == first
    assert resumed.captions == whole.captions and len(whole) == 5
    assert torch.equal(resumed.batch(range(5))[0], whole.batch(range(5))[0])
    assert not list(tmp_path.glob("twice/.*"))


def test_prepared_folders_are_calibrated_on_and_judged_by_their_captions(pipeline, shards, tmp_path):
    prepare_data(pipeline, shards, tmp_path / "prepared")
    calls = calibration_calls(pipeline, tmp_path / "prepared", None, timesteps=2, samples=2, seed=0)
    assert calls[0].arguments["sample"].shape == (2, 4, 8, 8)
    evaluation = evaluate({"teacher": pipeline}, data=tmp_path / "prepared", samples=2, steps=2, rounds=1)
    assert [(row.split, row.images) for row in evaluation.quality] == [("seen", 2)]


@pytest.mark.parametrize("start", ["./", "data.v1/", "./a.b/c.d/"])
def test_samples_are_told_apart_in_folders_of_any_name(tmp_path, monkeypatch, start):
    samples = {f"{start}{n:05d}": {"png": png(n), "txt": b"a house"} for n in range(5)}
    write_shard(tmp_path / "0.tar", samples)
    monkeypatch.setattr("asdm.data.shards.MAX_SAMPLE", 2 * len(png(0)))
    data = open_data(tmp_path / "0.tar")
    assert len(data.examples) == 5 and not data.skipped


def test_images_that_were_generated_with_other_settings_are_refused(pipeline, shards, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("a red house\n")
    made = tmp_path / "prepared"
    prepare_data(pipeline, captions, made, steps=1, seed=3)
    for changed, message in {"steps": "prepared with steps=1, not 2", "seed": "prepared with seed=3, not 2"}.items():
        with pytest.raises(AsdmError, match=f"prepared: {message}; use another output folder"):
            prepare_data(pipeline, captions, made, **{"steps": 1, "seed": 3, changed: 2})
    assert len(prepare_data(pipeline, captions, made, steps=1, seed=3)) == 1
    marker = json.loads((made / "asdm.json").read_text())
    earlier = {name: value for name, value in marker.items() if name not in ("steps", "seed")}
    (made / "asdm.json").write_text(json.dumps(earlier))
    assert len(prepare_data(pipeline, captions, made)) == 1
    # Neither matters for images of files.
    for seed in (0, 1):
        prepare_data(pipeline, shards, tmp_path / "encoded", steps=1 + seed, seed=seed)


def test_images_that_another_denoiser_generated_are_refused_as_the_teachers(pipeline, tmp_path):
    captions, made = tmp_path / "captions.txt", tmp_path / "prepared"
    captions.write_text("a red house\n")
    prepare_data(pipeline, captions, made, steps=1)
    for dtype in (torch.float16, torch.float32):
        require_stages(tiny_pipeline().to(dtype), [Stage(name="all", scope="joint", steps=1)], made)
    other = with_unet(pipeline, tiny_unet(seed=5))
    with pytest.raises(AsdmError, match="prepared by another model"):
        prepare_data(other, captions, made, steps=1)
    for use in (distill, lambda *given, **_: record_teacher(other, made)):
        with pytest.raises(AsdmError, match="its images were generated by another model than this teacher; prepare"):
            use(other, tiny_unet(), made, tmp_path / "run", steps=1)
    # A student is calibrated on its teacher's images, and a decoder learns from any.
    assert len(calibration_calls(other, made, None, timesteps=2, samples=1, seed=0)) == 2
    assert len(prepare(other, made, tmp_path / "decoder")) == 1
    sampler = with_unet(pipeline, pipeline.unet)
    sampler.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    message = r"prepared with scheduler=DDIMScheduler \(epsilon\), not EulerDiscreteScheduler \(epsilon\); use another"
    with pytest.raises(AsdmError, match=message):
        prepare_data(sampler, captions, made, steps=1)
    for name in ("asdm.json", "prepared.json"):  # as earlier versions wrote them
        about = json.loads((made / name).read_text())
        kept = {key: value for key, value in about.items() if key not in ("denoiser", "scheduler")}
        (made / name).write_text(json.dumps(kept))
    assert len(prepare_data(other, captions, made, steps=1)) == 1
    require_stages(other, [Stage(name="all", scope="joint", steps=1)], made)


def test_what_another_model_prepared_is_refused(pipeline, shards, tmp_path):
    prepare_data(pipeline, shards, tmp_path / "prepared")
    for part in ("vae", "text_encoder"):
        other = tiny_pipeline()
        with torch.no_grad():
            list(getattr(other, part).parameters())[-3].neg_()
        with pytest.raises(AsdmError, match="prepared by another model"):
            prepare_data(other, shards, tmp_path / "prepared")
        with pytest.raises(AsdmError, match="prepared by another model"):
            calibration_calls(other, tmp_path / "prepared", None, timesteps=2, samples=2, seed=0)
    for dtype in (torch.float16, torch.bfloat16):
        assert len(prepare_data(tiny_pipeline().to(dtype), shards, tmp_path / "prepared")) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(AsdmError, match="was not written by asdm"):
        prepare_data(pipeline, shards, tmp_path / "mine")
    assert json.loads((tmp_path / "prepared" / "asdm.json").read_text())["kind"] == "prepared"


def test_labelled_shards_are_judged_wherever_their_samples_lie(tmp_path, monkeypatch):
    """Held-out samples behind those that are looked at of all, and keys that two shards share."""
    for shard in range(3):
        about = {"concept": f"house {shard}", "style": "flat", "held_out": shard == 2}
        samples = {
            f"{number:04d}": {
                "png": png(2 * shard + number), "txt": f"house {shard} {number}".encode(),
                "json": json.dumps(about).encode(),
            }
            for number in range(2)
        }  # fmt: skip
        write_shard(tmp_path / f"{shard}.tar", samples)
    monkeypatch.setattr(data_module, "AT_HAND", 4)
    sets = evaluation_sets(tmp_path, None, 4, 0)
    assert [len(each.examples) for each in sets] == [4, 2]
    pipeline, judge = tiny_pipeline(), Judge()
    real = RealImages.of(tmp_path, sets, judge, pipeline, None)
    assert len(real.examples) == 6
    for each in sets:
        images = torch.stack([example.pixels(16) for example in each.examples])
        assert real.metrics(images, judge.features(images), each.examples)["concept_top1"] == 1.0
