"""Evaluation by a protocol: the metrics are their libraries', the job resumes, and what is missing is told first."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from asdm_demo import pipeline_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import linalg
from torch import nn
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchmetrics.image.ssim import StructuralSimilarityIndexMeasure
from transformers import CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from asdm import AsdmError, PruningPlan, build_student, evaluate_by_protocol, generate_for_scorer, save_pipeline
from asdm.data.sources import open_data
from asdm.evaluation.metrics import kid
from asdm.evaluation.protocol import distances, image_job
from asdm.evaluation.protocol.captions import read_captions
from asdm.evaluation.protocol.extractors import ClipExtractor, Lpips
from asdm.evaluation.protocol.features import FeatureCache, ImageFiles
from asdm.evaluation.protocol.image_job import ImageJob, ImageSettings
from asdm.evaluation.protocol.inputs import Network, _name_by_network, _prompts, _real_images, read_inputs
from asdm.evaluation.protocol.metrics import JUDGE
from asdm.evaluation.protocol.pictures import numbered, pictures_of
from asdm.evaluation.protocol.protocols import PROTOCOLS
from asdm.evaluation.protocol.results import ProtocolResults
from asdm.evaluation.protocol.weights import SOURCES, Source, find_weights
from asdm.files import folder_lock
from asdm.pipelines.derived import with_unet
from conftest import save_clip, tiny_pipeline, tiny_pixart_pipeline

SETTINGS = ImageSettings(steps=2, guidance_scale=2.0, seed=5, side=16)


class Stub(nn.Module):
    """In the place of Inception: a fixed random map of the pixels to 12 numbers."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.map = torch.randn(3 * 8 * 8, 12, generator=torch.Generator().manual_seed(0))

    def forward(self, pixels):
        return (pixels.float() / 255).flatten(1) @ self.map


@pytest.fixture
def sets():
    """Two sets of images (images, 3, 8, 8), uint8."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randint(0, 200, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    real = torch.randint(50, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return own, real


# -- metrics against their libraries -----------------------------------------------------------------------


def test_frechet_distance_is_torchmetrics_and_the_formula(sets):
    stub, (own, real) = Stub(), sets
    metric = FrechetInceptionDistance(feature=stub)
    metric.update(own, real=False)
    metric.update(real, real=True)
    found = distances.frechet_distance(stub(own), stub(real))
    assert found == pytest.approx(float(metric.compute()), rel=1e-4)  # torchmetrics returns float32
    ours, theirs = (stub(images).double().numpy() for images in sets)
    ours_cov, theirs_cov = (np.cov(values, rowvar=False) for values in (ours, theirs))
    root = linalg.sqrtm(ours_cov @ theirs_cov).real
    formula = np.square(ours.mean(0) - theirs.mean(0)).sum() + np.trace(ours_cov + theirs_cov - 2 * root)
    assert found == pytest.approx(formula, rel=1e-6)
    assert distances.frechet_distance(stub(own), stub(own)) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_torchmetrics(sets):
    stub, (own, real) = Stub(), sets
    metric = KernelInceptionDistance(feature=stub, subsets=7, subset_size=20)
    metric.update(own, real=False)
    metric.update(real, real=True)
    torch.manual_seed(3)
    mean, deviation = (float(value) for value in metric.compute())
    found = kid(stub(own), stub(real), subsets=7, subset_size=20, seed=3)
    assert found == (pytest.approx(mean, rel=1e-6), pytest.approx(deviation, rel=1e-6))


def test_the_deviation_of_a_kernel_distance_is_that_of_other_images_and_the_distance_of_all():
    generator = torch.Generator().manual_seed(0)

    def found(count):
        own, real = (torch.randn(count, 16, generator=generator) for _ in range(2))
        return kid(own + 0.3, real, subsets=20)

    deviation = torch.tensor([found(32)[0] for _ in range(20)]).std()
    assert 0.4 * deviation < torch.tensor([found(32)[1] for _ in range(10)]).mean() < 2 * deviation
    assert found(3)[1] is None and found(4)[1] > 0


def test_inception_score_is_torchmetrics_and_the_number_of_sure_classes(sets):
    stub, (own, _) = Stub(), sets
    metric = InceptionScore(feature=stub)
    metric.update(own)
    torch.manual_seed(3)
    mean, deviation = (float(value) for value in metric.compute())
    found = distances.inception_score(stub(own), seed=3)
    assert found == (pytest.approx(mean, rel=1e-6), pytest.approx(deviation, rel=1e-6))
    assert distances.inception_score(torch.zeros(40, 12))[0] == pytest.approx(1)
    sure = torch.eye(4).repeat(1000, 1) * 100
    assert distances.inception_score(sure)[0] == pytest.approx(4, rel=0.01)
    assert distances.inception_score(torch.zeros(2, 12))[1] is None


def test_cmmd_is_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    own, real = (nn.functional.normalize(torch.randn(n, 6, generator=generator), dim=1) for n in (9, 13))

    def kernel(one, other):
        return np.mean([[np.exp(-np.square(a - b).sum() / 200) for b in other] for a in one])

    ours, theirs = own.double().numpy(), real.double().numpy()
    formula = 1000 * (kernel(ours, ours) + kernel(theirs, theirs) - 2 * kernel(ours, theirs))
    assert distances.cmmd(own, real) == pytest.approx(formula, abs=1e-9)
    assert distances.cmmd(own, own) == pytest.approx(0, abs=1e-9)


def test_ssim_is_torchmetrics_image_by_image():
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randint(0, 256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in "ab")
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    found = distances.ssim(images, others)
    assert found.shape == (5,)
    assert float(found.mean()) == pytest.approx(float(metric(images / 255, others / 255)), abs=1e-6)
    assert distances.ssim(images, images).tolist() == pytest.approx([1] * 5)


def test_clip_score_is_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(4, 8, generator=generator)
    embeds = texts + torch.randn(4, 8, generator=generator)
    clip = SimpleNamespace(
        get_image_features=lambda pixels: embeds, get_text_features=lambda *_: texts, to=lambda _: clip, config=None
    )

    def processor(**_):
        return {"pixel_values": torch.zeros(1), "input_ids": torch.zeros(1), "attention_mask": torch.zeros(1)}

    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    expected = float(clip_score(images, ["a"] * 4, model_name_or_path=lambda: (clip, processor)))
    assert expected > 0
    assert 100 * float(distances.scores(embeds, texts).mean()) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def alexnet(monkeypatch):
    """AlexNet's layers with random weights, in the place of torchvision's."""
    torch.manual_seed(0)
    shapes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers = [layer for shape in shapes for layer in (nn.Conv2d(*shape), nn.ReLU())]
    layers = [*layers[:2], nn.MaxPool2d(3, 2), *layers[2:4], nn.MaxPool2d(3, 2), *layers[4:], nn.MaxPool2d(3, 2)]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)

    def features(*_, **__):
        asked.append([path.name for path in (Path(torch.hub.get_dir()) / "checkpoints").glob("*")])
        return nn.Sequential(*layers)

    asked = []
    monkeypatch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", features)
    return asked


def test_lpips_is_torchmetrics_pair_by_pair(alexnet, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.randint(0, 256, (3, 3, 64, 64), generator=generator, dtype=torch.uint8) for _ in "ab")
    hub = torch.hub.get_dir()
    (tmp_path / "alexnet.pth").touch()
    found = Lpips(tmp_path / "alexnet.pth", "cpu").pairs(images, others)
    assert torch.hub.get_dir() == hub and alexnet == [["alexnet.pth"]]
    Lpips(tmp_path / "alexnet.pth", "cpu", "alexnet-0.pth")
    assert alexnet[1:] == [["alexnet-0.pth"]], "by the name that torchvision looks for"
    metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    assert float(found.mean()) == pytest.approx(float(metric(images / 255, others / 255)), rel=1e-5)
    assert found.shape == (3,) and Lpips(tmp_path / "alexnet.pth", "cpu").pairs(images, images).tolist() == [0, 0, 0]


# -- prompts and files -------------------------------------------------------------------------------------


def test_captions_are_read_as_coco_bk_sdm_and_lists_have_them(tmp_path):
    coco = tmp_path / "captions.json"
    rows = [{"image_id": n // 2, "id": 100 - n, "caption": f"caption\n{n}"} for n in range(20)]
    coco.write_text(json.dumps({"annotations": rows}))
    found = read_captions(coco, 100)
    assert sorted(found) == sorted(f"caption {n}" for n in range(1, 20, 2)), "one of each image: the lowest id"
    assert found[:4] == read_captions(coco, 4) and found != sorted(found)
    table = tmp_path / "metadata.csv"
    table.write_text('img_name,sentence\na.jpg,a cat\nb.jpg,"a dog, asleep"\n')
    assert read_captions(table, 10) == ["a cat", "a dog, asleep"]
    table.write_text("file_name,text\na.jpg,a cat\n")
    assert read_captions(table, 10) == ["a cat"]
    text = tmp_path / "prompts.txt"
    text.write_text("a cat\n\na dog\n")
    assert read_captions(text, 1) == ["a cat"]
    coco.write_text(json.dumps({"annotations": [{"image_id": 1, "id": 1, "caption": "half \ud83d an emoji"}]}))
    assert read_captions(coco, 1) == ["half ? an emoji"]
    for content in ("[]", "{", "[" * 100_000, '{"annotations": [{"id": 1}]}', '{"annotations": []}', "7"):
        coco.write_text(content)
        with pytest.raises(AsdmError, match=r"^[^\n]+captions[^\n]+$"):
            read_captions(coco, 10)


def test_layouts_are_those_that_the_scorers_read(tmp_path):
    rows = [{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": f"{n} cats"} for n in range(2)]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = generate_for_scorer(
        {"m/x": tiny_pipeline()}, "geneval", tmp_path / "evaluation_metadata.jsonl", tmp_path / "out", steps=1
    )
    assert found == [tmp_path / "out" / "m_x"]
    files = sorted(str(path.relative_to(found[0])) for path in found[0].rglob("*.*"))
    assert files == [
        name
        for n in range(2)
        for name in (f"0000{n}/metadata.jsonl", *(f"0000{n}/samples/000{s}.png" for s in range(4)))
    ]
    assert json.loads((found[0] / "00001" / "metadata.jsonl").read_text()) == rows[1]
    samples = {(found[0] / "00000" / "samples" / f"000{s}.png").read_bytes() for s in range(4)}
    assert len(samples) == 4, "each sample has noise of its own"

    (tmp_path / "texts").mkdir()
    for name in ("1", "partiprompts0"):
        (tmp_path / "texts" / f"{name}.txt").write_text("a cat\nasleep")
    (grids,) = generate_for_scorer({"m": tiny_pipeline()}, "dpg", tmp_path / "texts", tmp_path / "dpg", steps=1)
    assert sorted(path.name for path in grids.iterdir()) == ["1.png", "partiprompts0.png"]
    with Image.open(grids / "1.png") as grid:
        assert grid.size == (32, 32)
        quarters = {grid.crop((x, y, x + 16, y + 16)).tobytes() for x in (0, 16) for y in (0, 16)}
    assert len(quarters) == 4


def test_the_embedded_protocol_asks_for_what_has_one_right_answer_first():
    data = {example.caption: example for example in open_data("demo", "all").examples}
    prompts = [data[caption] for caption in _prompts(PROTOCOLS["demo"], None)]
    kinds = [(example.held_out, example.held_out_kind) for example in prompts]
    assert kinds == 200 * [(True, None)] + 56 * [(False, None)]


def test_ids_of_prompts_name_no_other_folder(tmp_path):
    table = tmp_path / "dpg_bench.csv"
    table.write_text("item_id,text\nx1,a cat\nx1,a cat\nx2,a dog\n")
    assert [(each.file, each.images) for each in pictures_of("dpg", table).all] == [("x1.png", 4), ("x2.png", 4)]
    for bad in ("../x", "/x", "a/b", ".x"):
        table.write_text(f"item_id,text\n{bad},a cat\n")
        with pytest.raises(AsdmError, match="is no id of a prompt"):
            pictures_of("dpg", table)
    (tmp_path / "g.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(AsdmError, match=r"g.jsonl:1: not a row of geneval"):
        pictures_of("geneval", tmp_path / "g.jsonl")


def test_coco_images_are_squashed_and_stored_as_bk_sdm_stores_them():
    protocol = PROTOCOLS["coco30k"]
    noise = np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8)
    real = protocol.real(Image.fromarray(noise), 256)
    assert real.size == (256, 256)
    assert real.tobytes() != Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).tobytes(), "JPEG"
    assert protocol.stored(Image.new("RGB", (512, 512)), 256).size == (256, 256)
    assert protocol.stored(Image.new("RGB", (64, 64)), 64).size == (64, 64)


# -- the job of images -------------------------------------------------------------------------------------


def job_in(folder, prompts):
    return ImageJob(folder, numbered(prompts, ".png"), PartialState(cpu=True))


def contents(files):
    return [path.read_bytes() for path in files]


def test_a_job_resumes_with_what_is_missing_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    pipeline, prompts = tiny_pipeline(), [f"a cat {n}" for n in range(7)]
    whole = contents(job_in(tmp_path / "whole", prompts).generate("m", pipeline, SETTINGS, batch_size=2))
    assert len(set(whole)) == 7
    calls, generate = [], image_job.generate

    def interrupted(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(image_job, "generate", interrupted)
    job = job_in(tmp_path / "job", prompts)
    with pytest.raises(KeyboardInterrupt):
        job.generate("m", pipeline, SETTINGS, batch_size=2)
    done = sorted((tmp_path / "job" / "m").iterdir())
    assert [path.name for path in done] == [f"00000{n}.png" for n in range(4)]
    done[1].unlink()
    done[3].write_bytes(b"")  # as after a loss of power
    times = {path: path.stat().st_mtime_ns for path in (done[0], done[2])}
    assert contents(job.generate("m", pipeline, SETTINGS, batch_size=2)) == whole
    assert calls[3:] == [prompts[0:2], prompts[2:4], prompts[4:6], prompts[6:7]], "batches are always the same"
    assert times == {path: path.stat().st_mtime_ns for path in times}, "finished images stay"
    calls.clear()
    job.generate("m", pipeline, SETTINGS, batch_size=2)
    assert calls == []
    progress = []
    job.generate("m", pipeline, SETTINGS, limit=3, progress=lambda *args: progress.append(args))
    assert progress == [(3, 3)]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    job_in(tmp_path, ["x"]).claim({"m": (pipeline, SETTINGS)})
    (tmp_path / "m").mkdir()
    before = (tmp_path / "asdm.json").read_bytes()
    with torch.no_grad():
        other = tiny_pipeline()
        other.unet.conv_in.weight.mul_(1.001)  # all signs stay
        other_vae = tiny_pipeline()
        other_vae.vae.decoder.conv_out.bias.add_(1e-4)
    for prompts, of, told in [
        (["y"], (pipeline, SETTINGS), "images of other prompts"),
        (["x"], (pipeline, SETTINGS.model_copy(update={"steps": 3})), r"images of steps=2, not 3"),
        (["x"], (other, SETTINGS), "images of another model's weights"),
        (["x"], (other_vae, SETTINGS), "images of another model's weights"),
    ]:
        with pytest.raises(AsdmError, match=told):
            job_in(tmp_path, prompts).claim({"m": of})
    assert (tmp_path / "asdm.json").read_bytes() == before
    job_in(tmp_path, ["x"]).claim({"m": (pipeline, SETTINGS), "n": (other, SETTINGS)})
    (tmp_path / "m").rmdir()
    job_in(tmp_path, ["x"]).claim({"m": (other, SETTINGS)})  # its images were removed
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").touch()
    with pytest.raises(AsdmError, match="was not written by asdm"):
        job_in(tmp_path / "others", ["x"])


class Counting:
    """An extractor that counts the images that it reads."""

    title, identity, count = "mean colour", "mean", 0

    def images(self, pixels):
        self.count += len(pixels)
        return {"features": pixels.float().mean(dim=(2, 3))}


def test_features_are_computed_once_for_each_content(tmp_path, data_folder):
    paths, extractor = sorted(data_folder.glob("*.png")), Counting()
    cache = FeatureCache(tmp_path / "features", PartialState(cpu=True))
    found = cache.of_images("x", extractor, ImageFiles(paths))["features"]
    assert found.shape == (6, 3) and extractor.count == 6
    moved = tmp_path / "elsewhere"
    data_folder.rename(moved)
    paths = sorted(moved.glob("*.png"))
    assert torch.equal(cache.of_images("x", extractor, ImageFiles(paths))["features"], found)
    assert extractor.count == 6, "the content counts, not the place"
    Image.new("RGB", (16, 16), "red").save(paths[0])
    assert cache.of_images("x", extractor, ImageFiles(paths))["features"][0].tolist() == [255, 0, 0]
    assert extractor.count == 12
    for file in (tmp_path / "features").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    cache.of_images("x", extractor, ImageFiles(paths))
    assert extractor.count == 18, "a damaged file is computed again"
    paths[1].write_bytes(b"no image")
    assert len(cache.of_images("x", extractor, ImageFiles(paths, may_skip=True))["features"]) == 5
    with pytest.raises(AsdmError, match=r"1.png: not an image"):
        cache.of_images("x", extractor, ImageFiles(paths))


def test_features_are_of_one_network_with_its_inputs(tmp_path, weights, monkeypatch):
    folder = tmp_path / "clip"
    shutil.copytree(weights / "PickScore_v1", folder)
    cache = FeatureCache(tmp_path / "features", PartialState(cpu=True))

    def made():
        return ClipExtractor.of_folder(folder, "CLIP", "cpu")

    first = made()
    other = made()
    tokenizer = other._tokenizer
    other._tokenizer = lambda captions, **how: tokenizer(["a dog"] * len(captions), **how)
    assert made().identity == first.identity
    for number, extractor in enumerate([first, made(), other, other]):
        cache.of_texts("texts", extractor, ["a cat"])
        assert len(list(cache._folder.iterdir())) == 1 + number // 2, "other tokens are other inputs"
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    normalised = made()
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"] *= 1.001
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert len({first.identity, normalised.identity, made().identity}) == 3


def test_a_second_run_at_once_changes_nothing(tmp_path, data_folder):
    settings = {"images": data_folder, "captions": data_folder / "metadata.jsonl", "metrics": "ssim", "steps": 1}
    place, pipelines = tmp_path / "out", {"m": tiny_pipeline()}
    place.mkdir()
    (place / ".lock").touch()  # as a run leaves it that was killed at its beginning
    evaluate_by_protocol(pipelines, "coco30k", place, limit=1, **settings)
    shutil.rmtree(place / "images")  # as of a run that has written no image yet
    before = (place / "asdm.json").read_bytes()
    with folder_lock(place), pytest.raises(AsdmError, match="another run is at work"):
        evaluate_by_protocol(pipelines, "coco30k", place, limit=1, seed=1, **settings)
    assert (place / "asdm.json").read_bytes() == before


def test_real_images_are_files(tmp_path, data_folder):
    (data_folder / "folder.png").mkdir()
    (data_folder / "gone.png").symlink_to("/nowhere")
    os.mkfifo(data_folder / "pipe.png")
    (data_folder / "more").symlink_to("/")
    names = {path.name for path in _real_images(PROTOCOLS["demo"], data_folder, ["fid"])}
    assert names == {f"{n}.png" for n in range(6)}


# -- weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights as users have it, of tiny networks."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer")
    clips = ("CLIP-ViT-g-14-laion2B-s34B-b88K", "clip-vit-large-patch14-336", "PickScore_v1", "HPSv2-hf")
    for seed, name in enumerate(clips):
        save_clip(folder / name, seed, tokenizer)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "dinov2-large")
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "dinov2-large" / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def test_missing_weights_are_named_before_anything_is_generated(tmp_path, data_folder, monkeypatch, weights):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = {"images": data_folder, "captions": data_folder / "metadata.jsonl", "metrics": "ssim,fd-dinov2"}
    pipelines = {"m": tiny_pipeline()}
    for given, told in [
        ({}, r"the folder dinov2-large .*: it is not here, .*put it into a folder DIR and add --weights DIR$"),
        ({"weights": tmp_path}, rf"the folder dinov2-large .*: it is not in {tmp_path}, .*; put it into {tmp_path}$"),
        ({"metrics": "fd-dinov2=./gone"}, r"^gone: no config.json \(DINOv2"),
    ]:
        with pytest.raises(AsdmError, match=told) as error:
            evaluate_by_protocol(pipelines, "coco30k", tmp_path / "out", **{**settings, **given})
        assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()
    (tmp_path / "half").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "half" / name).write_text("{}")
    with pytest.raises(AsdmError, match=r"half: no model.safetensors"):
        find_weights(Source("dinov2", "DINOv2", "owner/half"), None, tmp_path)


@pytest.mark.parametrize("fault", ["pickle alone", "pickle by another name", "others' code", "truncated", "no judge"])
def test_networks_are_refused_before_anything_is_generated(fault, tmp_path, data_folder, weights, monkeypatch):
    place = tmp_path / "weights" / "PickScore_v1"
    shutil.copytree(weights / "PickScore_v1", place)
    file, metric = place / "model.safetensors", "pickscore"
    if fault == "pickle alone":
        file.rename(place / "pytorch_model.bin")
    elif fault == "pickle by another name":
        torch.save({"x": torch.zeros(2)}, file)
    elif fault == "others' code":
        (place / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Evil"}}')
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        metric = "fid"
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    settings = {"images": data_folder, "captions": data_folder / "metadata.jsonl", "metrics": metric}
    with pytest.raises(AsdmError, match=r"a pickle|others' code|truncated|is not installed") as error:
        evaluate_by_protocol({"m": tiny_pipeline()}, "demo", tmp_path / "out", weights=tmp_path / "weights", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_files_of_weights_are_whole_and_hold_tensors_alone(tmp_path):
    def source(name):
        return Source("lpips", "AlexNet", url=lambda: f"file://{tmp_path / 'remote' / name}")

    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    torch.save({"x": torch.zeros(2)}, tmp_path / "net.pth")
    assert find_weights(source("net.pth"), None, tmp_path) == tmp_path / "net.pth"
    (tmp_path / "net.pth").rename(tmp_path / "net-00000000.pth")
    with pytest.raises(AsdmError, match=r"net-00000000.pth: damaged \(its SHA-256 begins with"):
        find_weights(source("net-00000000.pth"), None, tmp_path)
    torch.save(Runs(), tmp_path / "bad.pth")
    with pytest.raises(AsdmError, match="not a file of weights"):
        find_weights(source("bad.pth"), None, tmp_path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(AsdmError, match=r"AlexNet needs gone.pth: it is not in .*, and a download fails"):
        find_weights(source("gone.pth"), None, tmp_path)


# -- the whole evaluation ----------------------------------------------------------------------------------


def student_of(pipeline):
    plan = PruningPlan.for_unet(pipeline.unet, [{"edit": "remove", "unit": "up_blocks.3.resnets.2"}])
    return with_unet(pipeline, build_student(pipeline.unet, plan))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_pixart_pipeline])
def test_published_metrics_by_networks_of_a_folder(make, tmp_path, data_folder, weights, monkeypatch):
    teacher, other = make(), make()
    denoiser = other.unet if hasattr(other, "unet") else other.transformer
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(1.2)
    metrics = "clip,cmmd,fd-dinov2,ssim,pickscore,hpsv2"
    settings = {"images": data_folder, "captions": data_folder / "metadata.jsonl", "metrics": metrics, "steps": 2}
    pipelines = {"teacher": teacher, "same": teacher, "other": other}
    found = evaluate_by_protocol(pipelines, "coco30k", tmp_path / "out", weights=weights, limit=4, **settings)
    own, same, student = found.rows
    assert found == ProtocolResults.load(tmp_path / "out" / "evaluation.json")
    assert found.real_images == 6 and found.prompts == 4 and found.stored_side == 16
    assert same.ssim == pytest.approx(1) and student.ssim < 1 and own.ssim is None
    for field in ("clip_score", "cmmd", "fd_dinov2", "pickscore", "hpsv2"):
        values = [getattr(row, field) for row in found.rows]
        assert values[0] == values[1] != values[2] and None not in values, field
    assert same.wins == {"clip": 0.5, "pickscore": 0.5, "hpsv2": 0.5} and own.wins == {}
    scale = float(CLIPModel.from_pretrained(weights / "PickScore_v1").logit_scale.detach().exp())
    assert abs(own.pickscore) > abs(own.hpsv2) and abs(own.pickscore) <= scale
    assert found.networks["FD-DINOv2"] == "DINOv2 ViT-L/14 (dinov2-large)"
    notes = "\n".join(found.notes)
    assert (
        "4 of the protocol's 30,000 prompts" in notes and "other: sampled at 16 px, its own size, not at 512" in notes
    )
    assert "other: 2 steps, not 25" in notes
    folder = tmp_path / "out" / "images"
    assert [len(list((folder / name).glob("*.jpg"))) for name in ("teacher", "same", "other")] == [4, 4, 4]
    assert (tmp_path / "out" / "wins-other.html").exists()

    def computed(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(image_job, "generate", computed)
    monkeypatch.setattr("asdm.evaluation.protocol.extractors.image_embeds", computed)
    again = evaluate_by_protocol(pipelines, "coco30k", tmp_path / "out", weights=weights, limit=4, **settings)
    assert again == found


def test_the_demos_protocol_judges_and_writes_a_win_sheet(tmp_path, data_folder, monkeypatch):
    teacher = tiny_pipeline()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a <b>cat</b>\na dog\na bird & a bee\n")
    settings = {"images": data_folder, "captions": prompts, "steps": 2}
    found = evaluate_by_protocol({"t": teacher, "s": student_of(teacher)}, "demo", tmp_path / "out", **settings)
    own, student = found.rows
    assert {"FD", "IS", "KID"} == set(found.networks), "the tiny pipeline has no CLIP"
    for name in ("CLIP", "CMMD"):
        assert f"no {name}: there is no folder clip beside the first model" in found.notes
    for row in found.rows:
        assert row.frechet_distance > 0 and row.fid is None
        assert row.inception_score >= 1 and row.kid is not None and row.clip_score is None
    assert own.teacher_distance == pytest.approx(0, abs=1e-6) and student.teacher_distance > 0
    html = (tmp_path / "out" / "wins.html").read_text()
    assert html.count("<article") == 3 and "a &lt;b&gt;cat&lt;/b&gt;" in html and "<b>cat" not in html
    assert html.count("data:image/jpeg;base64,") == 6 and 'src="images' not in html
    assert "default-src 'none'" in html and "http:" not in html and "https:" not in html
    for path in data_folder.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(AsdmError, match="0 of the real images can be decoded"):
        evaluate_by_protocol({"t": teacher}, "demo", tmp_path / "out", **settings)
    with pytest.raises(AsdmError, match="limit=1: fd needs two images or more"):
        evaluate_by_protocol({"t": teacher}, "demo", tmp_path / "few", limit=1, **settings)
    (tmp_path / "alex.pth").write_bytes(b"")
    monkeypatch.setattr("asdm.evaluation.protocol.inputs.find_weights", lambda *_: tmp_path / "alex.pth")
    with pytest.raises(AsdmError, match=r"metrics=lpips: AlexNet reads images of 32 px or more, and these have 16"):
        evaluate_by_protocol({"t": teacher}, "demo", tmp_path / "few", metrics="lpips", **settings)
    with pytest.raises(AsdmError, match=r"size=10: must be a positive multiple of 8"):
        evaluate_by_protocol({"t": teacher}, "demo", tmp_path / "few", size=10, **settings)
    assert not (tmp_path / "few").exists()


def test_only_the_distance_of_inceptions_features_is_the_fid():
    assert read_inputs("demo", metrics="fid,kid").metrics == ["fd", "kid"]
    assert read_inputs("demo", metrics="fd,fid").metrics == ["fd"]
    networks = {"inception": Network(SOURCES["inception"], Path("inception.pth"))}
    assert [_name_by_network(name, networks) for name in ("fd", "fid", "kid")] == ["fid", "fid", "kid"]


def test_results_that_call_the_judges_distance_fid_load(tmp_path):
    row = {"name": "t", "images": 2, "side": 64, "steps": 25, "guidance_scale": 4.0, "scheduler": "DDIM", "fid": 12.5}
    about = {"title": "x", "date": "2026-11-01", "machine": "x", "dtype": "float32", "seed": 0, "prompts": 2}
    path = tmp_path / "evaluation.json"
    for network, fields in ((JUDGE, (None, 12.5)), ("Inception-v3 of the original FID", (12.5, None))):
        rest = {"protocol": "demo", "stored_side": 64, "real_images": 2, "notes": [], "rows": [row]}
        path.write_text(json.dumps(about | rest | {"networks": {"FID": network, "KID": network}}))
        found = ProtocolResults.load(path)
        assert (found.rows[0].fid, found.rows[0].frechet_distance) == fields
        assert list(found.networks) == ["FID" if fields[0] else "FD", "KID"]


def command(folder, model, data_folder, *options):
    arguments = [sys.executable, "-m", "asdm", "evaluate", str(model), "--protocol", "demo", "--metrics", "fid"]
    arguments += ["--captions", str(data_folder / "prompts.txt"), "--images", str(data_folder), "--steps", "2"]
    return [*arguments, "--folder", str(folder), "--device", "cpu", "--batch-size", "2", *options]


@pytest.mark.slow
def test_killed_and_shared_jobs_end_in_the_same_files(tmp_path, data_folder):
    (data_folder / "prompts.txt").write_text("".join(f"a cat {n}\n" for n in range(24)))
    model = save_pipeline(tiny_pipeline(), tmp_path / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "alone", model, data_folder), check=True, env=environment)

    def files(folder):
        return {path.name: path.read_bytes() for path in (tmp_path / folder / "images").rglob("*.png")}

    for least in (2, 12):
        started = subprocess.Popen(command(tmp_path / "killed", model, data_folder), env=environment)
        while len(files("killed")) < least and started.poll() is None:
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
        started.wait()
        for content in files("killed").values():
            assert content.endswith(b"IEND\xaeB`\x82"), "no file is half-written"
    subprocess.run(command(tmp_path / "killed", model, data_folder), check=True, env=environment)
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    program = command(tmp_path / "shared", model, data_folder)
    subprocess.run([program[0], *shared, *program[2:]], check=True, env=environment)
    expected = files("alone")
    assert len(expected) == 24
    for folder in ("killed", "shared"):
        assert files(folder) == expected
        rows = [
            ProtocolResults.load(tmp_path / each / "evaluation.json").rows[0].frechet_distance
            for each in ("alone", folder)
        ]
        assert rows[0] == rows[1]
