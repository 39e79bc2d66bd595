"""Image-to-image is measured beside text-to-image: against right answers where the data names variants of a design."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from asdm import AsdmError, GenerationRequest, PruningPlan, build_student, evaluate, generate, with_unet
from asdm.benchmark.method import Method
from asdm.benchmark.results import BenchmarkRow
from asdm.benchmark.run import judge_methods
from asdm.data.sources import open_data
from asdm.evaluation.comparison import IMAGE_TO_IMAGE_STRENGTH
from asdm.evaluation.image_timing import ImageTiming
from asdm.evaluation.image_to_image import NO_IMAGES, SOURCES, TARGETS, ImageToImageJudge
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.report import _starting_rows, metrics_section
from asdm.evaluation.results import Evaluation
from asdm.evaluation.sampling import evaluation_sets
from asdm.evaluation.starting_images import image_to_image_sets
from asdm.images import to_images
from asdm.measure.latency import Timing
from conftest import PixelJudge, tiny_pipeline, tiny_pixart_pipeline, tiny_sdxl_pipeline


@pytest.fixture
def pixel_judge(monkeypatch):
    monkeypatch.setattr("asdm.evaluation.comparison.Judge", PixelJudge)
    return PixelJudge()


def starts_of(data, count=16, seed=0):
    return {each.split: each for each in image_to_image_sets(data, evaluation_sets(data, None, 16, 0), count, seed)}


def pruned(teacher):
    plan = PruningPlan.for_unet(teacher.unet, [{"edit": "remove", "unit": "mid_block"}])
    return with_unet(teacher, build_student(teacher.unet, plan))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_each_prompt_can_start_from_an_image_of_its_own(make):
    pipeline = make()
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    given = {"steps": 4, "strength": 0.5, "seed": 5}
    both = generate(pipeline, ["a", "b", "c"], image=[red, blue, red], batch_size=2, **given)
    for index, image in enumerate((red, blue, red)):
        alone = generate(pipeline, ["a", "b", "c"][index], image=image, **given | {"seed": 5 + index})
        torch.testing.assert_close(both[index], alone[0], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(both[0], both[1], atol=0.1)


def test_images_that_do_not_fit_the_prompts_are_refused():
    pipeline, image = tiny_pipeline(), Image.new("RGB", (16, 16))
    with pytest.raises(AsdmError, match="2 images for 1 prompts: give one for each"):
        generate(pipeline, ["a"], image=[image, image])
    with pytest.raises(AsdmError, match="different sizes; scale them to one"):
        generate(pipeline, ["a", "b"], image=[image, Image.new("RGB", (24, 16))])
    with pytest.raises(AsdmError, match="PixArtAlphaPipeline: diffusers has no image-to-image"):
        generate(tiny_pixart_pipeline(), ["a"], image=image)
    numbers = Image.new("F", image.size)
    for field in ("image", "mask"):
        with pytest.raises(AsdmError, match="floating-point numbers; convert it"):
            generate(pipeline, ["a"], **{"image": image, field: numbers})
        with pytest.raises(AsdmError, match=rf"^{field}.*floating-point numbers; convert it"):
            GenerationRequest(prompts=["a"], **{"image": image, field: numbers})


def test_a_variant_is_asked_for_from_another_one_of_its_design(designs):
    starts = starts_of(designs)
    assert {split: len(each.prompts) for split, each in starts.items()} == {"seen": 10, "held_out": 2}
    for split, each in starts.items():
        for prompt, source, target in zip(each.prompts, each.sources, each.targets, strict=True):
            assert prompt == target.caption != source.caption
            assert source.design == target.design is not None
            assert target.held_out == (split == "held_out")
            assert not source.held_out  # training saw another variant of each
    assert {target.caption for target in starts["held_out"].targets} == {"ant, line", "bee, flat"}
    assert starts == starts_of(designs)
    few = starts_of(designs, count=3)["seen"]
    assert few.targets == starts["seen"].targets[:3]
    assert starts_of(designs, seed=1) != starts
    assert starts_of(designs, count=0) == {}
    (size,) = {image.size for image in few.images(8)}
    assert size == (8, 8)


def test_without_designs_the_datas_own_images_are_varied(data_folder, tmp_path):
    starts = starts_of(data_folder, count=2)
    assert {split: len(each.prompts) for split, each in starts.items()} == {"seen": 2, "held_out": 1}
    for each in starts.values():
        assert each.prompts == [source.caption for source in each.sources] and each.targets == []
    (tmp_path / "captions.txt").write_text("a pear\nan apple\n")
    assert starts_of(tmp_path / "captions.txt") == {}
    assert starts_of(None) == {}
    # One caption for all images of a design leaves nothing to ask for.
    same = [{"file_name": f"{n}.png", "text": "a pear", "design": "pear"} for n in range(2)]
    (data_folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    assert starts_of(data_folder)["seen"].targets == []


def test_metrics_of_image_to_image_have_known_answers(designs, pixel_judge):
    starts = starts_of(designs)["seen"]
    real = RealImages.of(designs, [starts], pixel_judge, tiny_pipeline(), None)
    assert len(real.examples) == 16  # all of the data, not those of the set alone
    judge = ImageToImageJudge(pixel_judge, real)
    sources, targets = (
        pixel_judge.features(torch.stack([each.pixels(16) for each in examples]))
        for examples in (starts.sources, starts.targets)
    )
    judge.add_teacher(targets, starts, lambda: pytest.fail("targets need no other seed"))
    assert judge.metrics(targets, starts) == pytest.approx(
        {"exact_pair": 1, "style": 1, "target_distance": 0, "teacher_distance": 0}, abs=1e-5
    )
    found = judge.metrics(sources, starts)
    assert (found["exact_pair"], found["style"]) == (0, 0) and found["target_distance"] > 0.01
    assert found["teacher_distance"] == pytest.approx(found["target_distance"])
    half = torch.cat([targets[:5], sources[5:]])
    assert judge.metrics(half, starts)["exact_pair"] == 0.5
    unchanged, after_vae = judge.references("teacher", tiny_pipeline(), starts)
    assert (unchanged.name, after_vae.name) == (SOURCES, TARGETS)
    assert unchanged.exact_pair == 0 and unchanged.target_distance == pytest.approx(found["target_distance"])
    assert after_vae.target_distance > 0


def test_an_evaluation_asks_all_pipelines_for_the_same_variants(designs, pixel_judge, tmp_path):
    teacher = tiny_pipeline()
    pipelines = {"teacher": teacher, "same": teacher, "pruned": pruned(teacher)}
    given = {"data": designs, "samples": 4, "image_to_image": 3, "strength": 0.5, "steps": 4, "rounds": 1}
    found = evaluate(pipelines, **given, images_folder=tmp_path / "images")
    made = found.image_to_image
    assert (made.strength, made.note, made.has_targets) == (0.5, None, True)
    assert [(row.name, row.split, row.images) for row in made.rows] == [
        (name, split, count) for split, count in (("seen", 3), ("held_out", 2)) for name in pipelines
    ]
    same, other = made.of("same", "seen"), made.of("pruned", "seen")
    assert same.teacher_distance < 5e-7 < other.teacher_distance
    assert same.target_distance == made.of("teacher", "seen").target_distance and same.seed_part is None
    assert [row.name for row in made.references] == 2 * [SOURCES, TARGETS]
    # What was saved is what the pipeline makes of the set's first source.
    start = starts_of(designs, count=3)["seen"]
    drawn = generate(teacher, start.prompts, image=start.images(16), strength=0.5, steps=4)
    with Image.open(tmp_path / "images" / "image-to-image" / "seen" / "teacher" / "0000.png") as image:
        assert np.array_equal(np.array(image), np.array(to_images(drawn)[0]))
    for row in found.speed:
        assert row.image_to_image.ms < row.pipeline.ms  # two of four steps
    assert found.speed[0].image_to_image_speedup == 1 and found.speed[-1].image_to_image_ratio.low > 0
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found
    assert "Image-to-image, strength 0.5" in metrics_section(found)
    without = evaluate(pipelines, **given | {"image_to_image": 0})
    assert without.image_to_image is None and without.speed[0].image_to_image is None
    assert without.quality == found.quality and "Image-to-image" not in metrics_section(without)


def test_a_benchmark_judges_the_same_variants_by_the_same_metrics(designs, pixel_judge, monkeypatch, tmp_path):
    monkeypatch.setattr("asdm.benchmark.run.Judge", PixelJudge)
    teacher = tiny_pipeline()
    given = {"data": designs, "samples": 4, "image_to_image": 3, "strength": 0.5}
    chosen = [Method("original", "original", steps=4), Method("2 steps", "fewer steps", steps=2)]
    timed = [BenchmarkRow(place="x", name=each.name, group=each.group, steps=each.steps) for each in chosen]
    *_, (original, fewer) = judge_methods(teacher, chosen, timed, **given, images_folder=tmp_path)
    expected = evaluate({"x": teacher}, **given, steps=4, rounds=1).image_to_image
    for metric in ("exact_pair", "style", "target_distance"):
        by_split = {split: getattr(expected.of("x", split), metric) for split in ("seen", "held_out")}
        assert original.image_to_image[metric] == pytest.approx(by_split, abs=1e-6)
        assert set(fewer.image_to_image[metric]) == set(by_split)
    assert original.image_to_image["teacher_distance"]["seen"] < 5e-7 < fewer.image_to_image["teacher_distance"]["seen"]
    assert "seed_part" not in fewer.image_to_image  # targets are the scale
    assert len(list((tmp_path / "image-to-image" / "held_out" / "original").glob("*.png"))) == 2


def test_without_right_answers_two_seeds_of_the_teacher_give_the_scale(data_folder, pixel_judge):
    teacher = tiny_pipeline()
    given = {"data": data_folder, "samples": 4, "image_to_image": 2, "steps": 4, "rounds": 1}
    made = evaluate({"teacher": teacher, "pruned": pruned(teacher)}, **given).image_to_image
    assert made.strength == IMAGE_TO_IMAGE_STRENGTH and not made.has_targets
    (scale,) = [row for row in made.references if row.split == "seen"]
    assert scale.name == "teacher, another seed" and scale.teacher_distance > 0
    row = made.of("pruned", "seen")
    assert (row.exact_pair, row.style, row.target_distance) == (None, None, None)
    assert row.seed_part == pytest.approx(row.teacher_distance / scale.teacher_distance)
    assert made.of("teacher", "seen").seed_part == pytest.approx(0, abs=1e-4)


def test_an_evaluation_says_why_it_has_no_image_to_image(designs, pixel_judge):
    given = {"samples": 1, "steps": 4, "rounds": 1}
    transformer = evaluate({"it": tiny_pixart_pipeline()}, data=designs, **given)
    assert "diffusers has no image-to-image" in transformer.image_to_image.note
    assert len(transformer.quality) == 2 and transformer.speed[0].image_to_image is None
    from_text = evaluate({"it": tiny_pipeline()}, prompts=["a pear"], **given)
    assert from_text.image_to_image.note == NO_IMAGES and from_text.speed[0].image_to_image is not None
    short = evaluate({"it": tiny_pipeline()}, data=designs, **given | {"steps": 1})
    assert "must leave at least one of the 1 steps" in short.image_to_image.note and short.quality
    with pytest.raises(AsdmError, match="must leave at least one of the 4 steps"):
        evaluate({"it": tiny_pipeline()}, data=designs, strength=0.2, **given)


def test_the_time_of_an_image_from_an_image_is_put_together_of_known_parts():
    seconds = {
        "a: text": [1.0], "a: UNet": [2.0], "b: UNet": [1.0], "a: step": [0.5], "decoder": [4.0], "encoder": [3.0],
    }  # fmt: skip
    shared = {"text encoder": ("a: text", 1), "scheduler": ("a: step", 9), "VAE decoder": ("decoder", 1)}
    parts = {name: {**shared, "UNet": (f"{name}: UNet", 10)} for name in "ab"}
    timing = ImageTiming(Timing(seconds), parts, 1)
    found = timing.from_images({"a": 6, "b": 3}, dict.fromkeys("ab", "encoder"))
    assert found.latency("a").ms == pytest.approx(1000 * (1 + 3 + 6 * 2 + 5 * 0.5 + 4))
    assert found.latency("b").ms == pytest.approx(1000 * (1 + 3 + 3 * 1 + 2 * 0.5 + 4))
    assert timing.latency("a").ms == pytest.approx(1000 * (1 + 10 * 2 + 9 * 0.5 + 4))


def test_rows_may_name_their_design(designs):
    (ant,) = [each for each in open_data(designs).examples if each.caption == "ant, flat"]
    (photo,) = [each for each in open_data(designs).examples if each.caption == "ant, photo"]
    assert (ant.design, photo.design) == ("ant 1", None)


def test_rows_of_pictures_say_what_they_start_from(designs, pixel_judge, tmp_path):
    evaluate({"teacher": tiny_pipeline()}, data=designs, samples=2, steps=2, rounds=1, images_folder=tmp_path)
    start = starts_of(designs, count=2)["held_out"]
    rows = _starting_rows(start, ["teacher"], tmp_path, 10)
    assert [row.caption for row in rows] == [
        f"{target.caption}, from {source.caption}" for source, target in zip(start.sources, start.targets, strict=True)
    ]
    shown = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in rows[0].images]
    made = [Image.open(file) for file in (tmp_path / "image-to-image" / "held_out" / "teacher").glob("0000.png")]
    with start.sources[0].image() as source, start.targets[0].image() as target:
        expected = [source, target, *made]
        assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(shown, expected, strict=True))
