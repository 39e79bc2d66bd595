"""Metrics say what they should on cases with a known answer, and the report holds what was measured."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asdm_demo import images_folder
from diffusers import HeunDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from matplotlib import pyplot as plt
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from asdm import AsdmError, PruningPlan, build_student, compress, evaluate, load_pipeline, save_pipeline, with_unet
from asdm.benchmark.costs import measure_cost
from asdm.benchmark.method import Method
from asdm.compression import steps as compression_steps
from asdm.data.examples import load_pixels
from asdm.data.sources import open_data
from asdm.diffusion.generation import default_guidance, generate
from asdm.errors import AsdmWarning
from asdm.evaluation import real_images as real_images_module
from asdm.evaluation import speed as speed_module
from asdm.evaluation.image_folders import load_distances
from asdm.evaluation.metrics import JUDGE_NAME, Judge, feature_distance, kid, psnr, recognition, retrieval_at_1
from asdm.evaluation.plots import loss_plot, redundancy_plot
from asdm.evaluation.real_images import RealImages, image_embeds
from asdm.evaluation.report import headline_of, metrics_section
from asdm.evaluation.results import Evaluation
from asdm.evaluation.sampling import common_guidance, evaluation_sets
from asdm.families import family_of
from asdm.pipelines.clip import clip_statistics
from asdm.sensitivity.analysis import structure_map
from conftest import PixelJudge, save_clip, tiny_pipeline, tiny_transformer, tiny_unet


def test_recognition_on_features_with_a_known_answer():
    real = torch.eye(6)
    labels = [(concept, style) for concept in "abc" for style in ("x", "y")]
    found = recognition(real, labels, real, labels)
    assert (found.exact_pair, found.concept_top1, found.concept_top5, found.style) == (1.0, 1.0, 1.0, 1.0)
    # The nearest image of each is the same concept in the other style.
    found = recognition(real[[1, 0, 3, 2, 5, 4]], labels, real, labels)
    assert (found.exact_pair, found.concept_top1, found.concept_top5, found.style) == (0.0, 1.0, 1.0, 0.0)
    wrong = [("z", "x")] * 6
    assert recognition(real, wrong, real, labels).concept_top5 == 0.0


def test_retrieval_and_distance_and_psnr():
    features = torch.eye(4)
    assert retrieval_at_1(features, features, [0, 1, 2, 3]) == 1.0
    assert retrieval_at_1(features, features, [0, 1, 3, 2]) == 0.5
    assert feature_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    assert feature_distance(features, features.roll(1, 0)) == pytest.approx(1.0)
    image = torch.zeros(1, 3, 4, 4)
    assert psnr(image + 0.2, image)[0] == pytest.approx(20.0, abs=1e-4)


@pytest.fixture(scope="module")
def real_images():
    return torch.stack(load_pixels(open_data("demo", "all").examples[:80], 64, {})[1])


@pytest.mark.slow
def test_the_judge_finds_more_noise_and_more_blur_worse(real_images):
    judge = Judge()
    reference, images = judge.features(real_images[::2]), real_images[1::2]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def blurred(by):
        small = torch.nn.functional.avg_pool2d(images, by)
        return torch.nn.functional.interpolate(small, 64, mode="bilinear", align_corners=False)

    def distance(changed):
        return kid(judge.features(changed), reference)[0]

    clean = distance(images)
    assert clean < distance(images + 0.1 * noise) < distance(images + 0.3 * noise)
    assert clean < distance(blurred(2)) < distance(blurred(4))
    assert distance(images) == clean


def test_the_judge_is_not_fooled_by_batches(real_images):
    judge = Judge()
    one, many = judge.features(real_images[:5], batch_size=1), judge.features(real_images[:5])
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-3)


def test_evaluation_sets_are_fixed_and_keep_the_splits_apart():
    sets = evaluation_sets("demo", None, 200, 0)
    assert [(s.split, len(s.prompts)) for s in sets] == [("seen", 200), ("held_out", 200), ("open", 70)]
    assert sets == evaluation_sets("demo", None, 200, 0)
    rows = [json.loads(line) for line in (images_folder() / "metadata.jsonl").open()]
    for found, kind in zip(sets[1:], (None, "open"), strict=True):
        wanted = {row["text"] for row in rows if row["held_out"] and row["held_out_kind"] == kind}
        assert wanted == set(found.prompts)
        assert not wanted & set(sets[0].prompts)


@pytest.mark.parametrize(
    ("kind", "splits"),
    [
        ("unlike", ["seen", "unlike"]),
        *((kind, ["seen", "held_out"]) for kind in ("../up", "seen", "two words", "", 3, "w" * 300)),
    ],
)
def test_a_kind_of_held_out_rows_is_a_short_word_of_its_own(data_folder, kind, splits):
    rows = [json.loads(line) for line in (data_folder / "metadata.jsonl").open()]
    held_out = next(row for row in rows if row.get("held_out"))
    held_out["held_out_kind"] = kind
    (data_folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [found.split for found in evaluation_sets(data_folder, None, 4, 0)] == splits


def test_evaluation_compares_on_the_same_prompts_and_seeds(data_folder, tmp_path):
    teacher = tiny_pipeline()
    same = with_unet(teacher, build_student(teacher.unet, PruningPlan.for_unet(teacher.unet)))
    plan = PruningPlan.for_unet(teacher.unet, [{"edit": "remove", "unit": "mid_block"}])
    pruned = with_unet(teacher, build_student(teacher.unet, plan))
    figures = evaluate(
        {"teacher": teacher, "same": same, "pruned": pruned},
        data=data_folder,
        steps=2,
        rounds=3,
        images_folder=tmp_path / "images",
    )
    assert [(row.name, row.split) for row in figures.quality] == [
        (name, split) for split in ("seen", "held_out") for name in ("teacher", "same", "pruned")
    ]
    assert figures.quality_of("same", "seen").teacher_distance == pytest.approx(0.0, abs=1e-6)
    assert figures.quality_of("pruned", "seen").teacher_distance > 1e-6
    assert figures.quality_of("teacher", "seen").concept_top1 is None
    assert figures.speed_of("teacher").unet_speedup == 1.0
    assert figures.speed_of("pruned").gmacs < figures.speed_of("teacher").gmacs
    folder = tmp_path / "images" / "held_out" / "pruned"
    with Image.open(folder / "0000.png") as image:
        assert image.size == (16, 16)
    mean = figures.quality_of("pruned", "held_out").teacher_distance
    assert load_distances(folder) == [pytest.approx(mean, abs=1e-5)], "one image is held out"


def test_pipelines_that_make_images_of_several_sizes_are_told():
    larger = tiny_pipeline()
    larger.register_modules(unet=tiny_unet(sample_size=16))
    with pytest.warns(AsdmWarning, match="teacher 16 pixels a side, larger 32 pixels a side: speed and distances"):
        evaluate({"teacher": tiny_pipeline(), "larger": larger}, quality=False, image_to_image=0, steps=2, rounds=1)


def test_images_are_judged_as_drawn_not_as_a_safety_checker_gives_them_out():
    class Suspicious(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, images, clip_input):
            return images * 0, [True] * len(images)

    plain = tiny_pipeline()
    parts = {**plain.components, "safety_checker": Suspicious(), "feature_extractor": CLIPImageProcessor()}
    checked = StableDiffusionPipeline(**parts)
    drawn = {"prompts": ["a pear"], "steps": 2}
    assert generate(checked, **drawn).eq(-1).all()
    figures = evaluate({"teacher": plain, "checked": checked}, prompts=["a pear"], steps=2, rounds=2)
    assert figures.quality_of("checked", "prompts").teacher_distance == pytest.approx(0.0, abs=1e-6)
    assert generate(checked, **drawn).eq(-1).all()  # for others it is as it was


def test_of_unlabelled_images_those_are_read_that_are_compared(data_folder, monkeypatch):
    sets = evaluation_sets(data_folder, None, 2, 0)
    judge, pipeline = Judge(), tiny_pipeline()
    whole = RealImages.of(data_folder, sets, judge, pipeline, None)
    assert len(whole.examples) == sum(len(each.examples) for each in sets) == 3
    monkeypatch.setattr(real_images_module, "_READ_TOGETHER", 2)
    torch.testing.assert_close(RealImages.of(data_folder, sets, judge, pipeline, None).features, whole.features)


def test_an_extrapolated_image_has_all_its_unet_calls(monkeypatch):
    """A second-order scheduler makes 2n - 1 in n steps."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    monkeypatch.setattr(speed_module, "LONGEST_TIMED_IMAGE_MS", 1)
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    (row,) = speed_module.measure_speed({"it": pipeline}, steps=25, guidance_scale=7.5, rounds=1).rows
    assert row.pipeline_extrapolated and len(calls) < 100
    call = row.pipeline_parts_ms["UNet"] / 49
    assert 0 < call < 5 * row.unet.ms and row.pipeline.ms >= 49 * call


def test_few_step_pipelines_sample_as_they_were_made_to():
    teacher, few_step = tiny_pipeline(), tiny_pipeline()
    few_step.scheduler = LCMScheduler.from_config(few_step.scheduler.config)
    batches = {"teacher": [], "few": []}
    for name, pipeline in {"teacher": teacher, "few": few_step}.items():
        pipeline.unet.register_forward_pre_hook(
            lambda _module, args, _kwargs, name=name: batches[name].append(len(args[0])), with_kwargs=True
        )
    figures = evaluate({"teacher": teacher, "few": few_step}, steps=6, rounds=2, quality=False)
    assert [row.steps for row in figures.speed] == [6, 4]
    assert batches["teacher"].count(1) == 1  # counting MACs
    images, left = divmod(batches["few"].count(1) - 1, 4)  # without guidance
    assert images >= 3 and left == 0  # warming up and timed


def test_a_few_step_pipeline_that_comes_first_leaves_the_others_their_guidance():
    teacher, few_step = tiny_pipeline(), tiny_pipeline()
    few_step.scheduler = LCMScheduler.from_config(few_step.scheduler.config)
    assert (
        common_guidance([few_step, teacher], None) == common_guidance([teacher], None) == default_guidance(teacher) > 1
    )
    assert common_guidance([few_step], None) == 1 and common_guidance([few_step, teacher], 2.0) == 2
    assert evaluate({"few": few_step, "teacher": teacher}, steps=2, rounds=1, quality=False).guidance_scale > 1


def test_the_speed_up_of_a_unet_that_embeds_its_guidance_is_that_of_its_own_calls():
    teacher = tiny_pipeline()
    student = with_unet(tiny_pipeline(), tiny_unet(time_cond_proj_dim=16))
    student.scheduler = LCMScheduler.from_config(student.scheduler.config)
    first, second = speed_module.measure_speed(
        {"teacher": teacher, "student": student}, steps=4, guidance_scale=3.0, rounds=2
    ).rows
    assert second.pipeline_speedup == pytest.approx(first.pipeline.ms / second.pipeline.ms)
    method = Method("student", "ours", steps=2)
    assert [measure_cost(each, method)[0].samples for each in (teacher, student)] == [2, 1]


def test_a_caption_that_several_images_have_is_found_by_each(pipeline, data_folder, tmp_path):
    save_clip(tmp_path / "clip", 0, pipeline.tokenizer)
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    examples = [replace(each, caption="a dog") for each in open_data(data_folder, "all").examples]
    real = RealImages(PixelJudge(), pipeline, examples, clip)
    images = torch.rand(len(examples), 3, 16, 16)
    assert real.metrics(images, PixelJudge().features(images), examples)["retrieval_at_1"] == 1


def test_the_diagram_of_a_unet_is_a_u_and_that_of_a_transformer_a_column():
    unet, transformer = tiny_unet(), tiny_transformer()
    places = family_of(unet).block_places(family_of(unet).blocks(unet))
    assert [(place.level, place.side) for place in places.values()] == [
        *((level, "encoder") for level in range(4)),
        (4, "middle"),
        *((level, "decoder") for level in (3, 2, 1, 0)),
    ]
    blocks = family_of(transformer).blocks(transformer)
    places = family_of(transformer).block_places(blocks)
    assert [(place.level, place.side) for place in places.values()] == [(i, "middle") for i in range(len(blocks))]
    figure = redundancy_plot(structure_map(transformer))
    titles = [text.get_text() for text in figure.axes[0].texts if "%" in text.get_text()]
    assert titles == [f"{block}  0%" for block in blocks]
    plt.close(figure)


def test_a_stage_of_no_steps_has_nothing_to_plot():
    logs = {"incubate": [], "joint": [{"step": 1, "loss": 2.0, "task": 1.0}, {"step": 2, "loss": 1.0, "task": 0.5}]}
    axes = loss_plot(logs).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["task (joint)"]
    plt.close("all")


def test_an_evaluation_of_0_1_0_loads(tmp_path):
    path = Path(__file__).parent / "evaluation_0_1.json"
    assert "median_ms" in path.read_text()
    found = Evaluation.load(path)
    teacher, pruned = found.speed[:2]
    assert (teacher.unet.ms, found.denoiser) == (json.loads(path.read_text())["speed"][0]["unet"]["median_ms"], "UNet")
    assert teacher.unet_speedup_interval == (1.0, 1.0)
    assert (found.image_to_image, teacher.image_to_image, teacher.image_to_image_ratio) == (None, None, None)
    low, high = pruned.unet_speedup_interval
    assert low < pruned.unet_speedup < high
    assert low == teacher.unet.low_ms / pruned.unet.high_ms
    found.save(tmp_path / "saved.json")
    assert Evaluation.load(tmp_path / "saved.json") == found
    assert "UNet parameters" in metrics_section(found)
    of_a_transformer = found.model_copy(update={"denoiser": "transformer"})
    assert "UNet" not in metrics_section(of_a_transformer) and "The transformer" in headline_of(of_a_transformer)
    with_decoder = found.speed[-1].model_copy(update={"name": "another, tiny decoder"})
    more = found.model_copy(update={"speed": [*found.speed, with_decoder]})
    assert headline_of(more, result_row=-2) == headline_of(found) != headline_of(more)


def test_without_the_judges_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(AsdmError, match=r"asdm-diffusion\[judge\]"):
        Judge()


@pytest.fixture
def model(tmp_path):
    return str(save_pipeline(tiny_pipeline(), tmp_path / "model"))


SETTINGS = {"params": 0.8, "refine": 0, "steps": 3, "samples": 3, "sampling_steps": 2}


def test_the_report_of_a_compression_is_its_last_file(model, data_folder, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compression_steps, "write_report", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", data=data_folder, **SETTINGS | {"steps": 0, "image_to_image": 0})
    assert {"plan.json", "evaluation.json", "README.md", "wins.html"} <= set(os.listdir(tmp_path / "out"))


def test_compress_makes_a_folder_that_loads_and_a_report_without_network(model, data_folder, tmp_path):
    from asdm import Stage

    stages = [Stage(name="joint", steps=3, batch_size=2, ema_decay=0)]
    (data_folder / "2.png").write_bytes(b"damaged")
    made = compress(model, tmp_path / "out", data=data_folder, stages=stages, **(SETTINGS | {"steps": 0, "refine": 1}))
    pipeline = load_pipeline(made.folder)
    total = sum(p.numel() for p in load_pipeline(model).unet.parameters())
    assert sum(p.numel() for p in pipeline.unet.parameters()) <= 0.8 * total
    assert list(made.skipped) == ["2.png"]
    assert [row.name for row in made.evaluation.speed] == ["teacher", "pruned", "distilled"]
    html = made.report.read_text()
    assert made.headline.replace("'", "&#39;") in html
    assert not re.search(r"""(src|href)=["'](?!data:)""", html)
    assert "2.png" in html
    assert made.plan.metrics.measured_sensitivity > 0
    assert "all edits together move" in html.replace("\n", " ")
    # Two plots; four prompts from text and four from images, each with the real image and three models'.
    assert html.count("<img") == 2 + 2 * 4 * 4
    assert "Image-to-image, held-out prompts" in html and "teacher, another seed" in html
    wins = (made.folder / "wins.html").read_text()
    assert wins.count("<article") == 4 and "distilled against teacher" in wins and JUDGE_NAME in wins
    assert not re.search(r"""(src|href)=["'](?!data:)""", wins)


@pytest.mark.slow
def test_compress_goes_on_where_it_was(model, data_folder, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    settings = SETTINGS | {"sensitivity": "taylor"}
    monkeypatch.setattr("asdm.compression.steps.evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", data=data_folder, **settings)
    plan = (tmp_path / "out" / "plan.json").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr("asdm.compression.steps.analyze", killed)
    monkeypatch.setattr("asdm.compression.steps.full_plan", killed)
    titles = set()
    compress(model, tmp_path / "out", data=data_folder, progress=lambda title, *_: titles.add(title), **settings)
    assert (tmp_path / "out" / "plan.json").read_bytes() == plan
    assert "distil" not in titles


@pytest.mark.slow
def test_compress_refuses_other_settings_and_missing_data_and_says_what_it_missed(model, tmp_path):
    with pytest.raises(AsdmError, match="need data"):
        compress(model, tmp_path / "out", params=0.8, steps=5)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AsdmError, match="no such data folder"):
        compress(model, tmp_path / "out", params=0.8, data=tmp_path / "absent")
    assert not (tmp_path / "out").exists()
    (tmp_path / "few-step.yaml").write_text("- {name: own, steps: 5, scope: consistency}")
    for recipe, message in {"absent": "no such recipe", tmp_path / "few-step.yaml": "sample otherwise"}.items():
        with pytest.raises(AsdmError, match=message):
            compress(model, tmp_path / "out", params=0.8, data="demo", recipe=str(recipe))
        assert not (tmp_path / "out").exists()
    short = {"sensitivity": "taylor", "refine": 0, "steps": 0, "samples": 0, "sampling_steps": 2}
    made = compress(model, tmp_path / "out", params=0.8, **short)
    with pytest.raises(AsdmError, match=r"made with other settings \(budget\)"):
        compress(model, tmp_path / "out", params=0.7, **short)
    # And says when the target was missed.
    assert "short of the 50x requested" in headline_of(made.evaluation, 50)
    assert "short of" not in headline_of(made.evaluation, 0.01)


def test_a_clip_of_another_size_sees_the_images_at_its_own(tmp_path):
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=size, vision_config=size | {"image_size": 32, "patch_size": 8})).eval()
    clip.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    clip = CLIPModel.from_pretrained(tmp_path)
    plain = image_embeds(clip, images)
    assert plain.shape == (2, clip.config.projection_dim)
    CLIPImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    found = clip_statistics(clip)
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "older.json")
    about = json.loads((tmp_path / "older.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": about}))  # as a CLIPProcessor's
    assert clip_statistics(clip) == found == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert not torch.allclose(image_embeds(clip, images), plain, atol=1e-3)
