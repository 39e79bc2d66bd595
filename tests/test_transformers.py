"""A second family, PixArt's transformers: pruned, saved and loaded as UNets are."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from transformers import CLIPTokenizer

from asdm import (
    AsdmError,
    PruningPlan,
    Stage,
    analyze,
    build_student,
    cache_features,
    calibrate_cache,
    distill,
    evaluate,
    fit_compensation,
    generate,
    load_pipeline,
    make_plan,
    save_pipeline,
    with_unet,
)
from asdm.diffusion.conditioning import Conditioning
from asdm.diffusion.conditioning import predict as predict_from_prompts
from asdm.distillation.distill import require_stages
from asdm.distillation.recipes import recipe_stages
from asdm.distillation.semantics import make_encoder
from asdm.distillation.stages import LossWeights
from asdm.distillation.tasks import make_task
from asdm.distillation.teaching import WHOLE
from asdm.distillation.training_set import prepare
from asdm.estimates.forecast import Forecast
from asdm.evaluation.protocol.extractors import open_extractor
from asdm.evaluation.protocol.weights import DEMO_SOURCES
from asdm.evaluation.real_images import RealImages
from asdm.families import family_of
from asdm.pipelines.clip import load_clip
from asdm.student.edited_model import all_edits_of
from asdm.student.transformer import MODULE_NAME, AsdmPixArtTransformer2DModel
from conftest import save_clip, tiny_pipeline, tiny_pixart_pipeline, tiny_transformer, without_asdm

BRANCH = "transformer_blocks.2"


def predict(model):
    with torch.no_grad():
        return model(**family_of(model).random_inputs(model, 2), return_dict=False)[0]


@pytest.fixture
def model():
    return tiny_transformer()


def student_of(model, *edits):
    return build_student(model, PruningPlan.for_unet(model, edits))


def remove(unit, **fields):
    return {"edit": "remove", "unit": unit, **fields}


def test_plan_without_edits_is_bit_identical(model):
    assert torch.equal(predict(student_of(model)), predict(model))


def test_every_unit_can_be_removed_alone_and_changes_the_prediction(model):
    reference = predict(model)
    units = family_of(model).units(model)
    assert [unit.kind for unit in units[:4]] == ["block", "self_attention", "cross_attention", "feed_forward"]
    assert len(units) == 4 * len(model.transformer_blocks)
    for unit in units[:8]:
        prediction = predict(student_of(model, remove(unit.name)))
        assert prediction.shape == reference.shape and not torch.equal(prediction, reference), unit.name


def test_removing_a_branch_equals_zeroing_its_last_layer(model):
    for branch, layer in {"attn1": "to_out.0", "attn2": "to_out.0", "ff": "net.2"}.items():
        zeroed = tiny_transformer()
        torch.nn.init.zeros_(zeroed.get_submodule(f"{BRANCH}.{branch}.{layer}").weight)
        torch.nn.init.zeros_(zeroed.get_submodule(f"{BRANCH}.{branch}.{layer}").bias)
        student = student_of(model, remove(f"{BRANCH}.{branch}"))
        torch.testing.assert_close(predict(student), predict(zeroed), atol=1e-6, rtol=0)


def test_without_whole_blocks_it_is_a_stock_model_with_fewer_of_them(model):
    student = student_of(model, remove("transformer_blocks.1"), remove("transformer_blocks.3"))
    assert type(student) is PixArtTransformer2DModel
    assert len(student.transformer_blocks) == len(model.transformer_blocks) - 2
    by_hand = tiny_transformer()
    by_hand.transformer_blocks = torch.nn.ModuleList(
        block for index, block in enumerate(model.transformer_blocks) if index not in (1, 3)
    )
    assert torch.equal(predict(student), predict(by_hand))
    again = student_of(student, remove("transformer_blocks.1"))
    assert family_of(model).teacher_key("transformer_blocks.1.ff", again, model) == "transformer_blocks.4.ff"
    assert family_of(model).teacher_key("transformer_blocks.1", again, student) == "transformer_blocks.2"


def test_a_shorter_stock_model_loads_with_the_stock_class_and_knows_its_blocks(model, tmp_path):
    student = student_of(model, remove("transformer_blocks.1"))
    student.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded), predict(student))
    assert family_of(model).teacher_key("transformer_blocks.1", loaded, model) == "transformer_blocks.2"


def test_an_edited_student_is_saved_with_its_module_file_and_refused_by_the_stock_class(model, tmp_path):
    edits = [remove(f"{BRANCH}.attn1", compensate="linear"), remove("transformer_blocks.0", compensate="diagonal")]
    student = student_of(model, *edits)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "compensation" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    student.save_pretrained(tmp_path)
    assert (tmp_path / f"{MODULE_NAME}.py").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["norm_type"] == "asdm.ada_norm_single"
    loaded = AsdmPixArtTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded), predict(student)) and loaded.config.edits == student.config.edits
    with pytest.raises(NotImplementedError, match=r"asdm\.ada_norm_single"):
        PixArtTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("transformer_blocks.9"), "no such unit"),
        (remove("proj_out"), "no such unit"),
        (remove(f"{BRANCH}.ff", compensate="linear", compensate_time=True), "gets no time embedding"),
        ({"edit": "gri_attention", "unit": f"{BRANCH}.attn1"}, "not a self-attention"),
        ({"edit": "cond_conv", "unit": f"{BRANCH}.ff", "experts": [f"{BRANCH}.ff"]}, "no convolution"),
        ({"edit": "drop_layers", "layers_per_block": 1}, "is not for a PixArtTransformer2DModel"),
    ],
)
def test_what_it_does_not_allow_is_one_clear_line(model, edit, message):
    with pytest.raises(AsdmError, match=message) as error:
        PruningPlan.for_unet(model, [edit])
    assert "\n" not in str(error.value)


def test_the_last_block_stays(model):
    with pytest.raises(AsdmError, match="keep one"):
        student_of(model, *(remove(name) for name in family_of(model).blocks(model)))


def test_it_predicts_from_what_prompts_bring(model):
    arguments = family_of(model).random_inputs(model, 2)
    latents, hidden, timesteps = (arguments[name] for name in ("hidden_states", "encoder_hidden_states", "timestep"))
    mask = torch.ones(hidden.shape[:2])
    with torch.no_grad():
        found = predict_from_prompts(model, latents, timesteps, Conditioning(hidden, encoder_attention_mask=mask))
        torch.testing.assert_close(found, predict(model)[:, :4])
        mask[:, 3:] = 0
        fewer = predict_from_prompts(model, latents, timesteps, Conditioning(hidden, encoder_attention_mask=mask))
        shorter = predict_from_prompts(model, latents, timesteps, Conditioning(hidden[:, :3]))
    assert found.shape == latents.shape
    torch.testing.assert_close(fewer, shorter, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(fewer, found, atol=1e-4)


# -- the pipeline --------------------------------------------------------------------------------------


@pytest.fixture
def pipeline():
    return tiny_pixart_pipeline()


EDITED = [remove(f"{BRANCH}.attn1", compensate="linear"), remove("transformer_blocks.1", compensate="linear")]


@pytest.mark.parametrize("sensitivity", ["ablation", "taylor"])
def test_it_is_analysed_planned_and_compensated(pipeline, sensitivity):
    redundancy = analyze(pipeline, sensitivity=sensitivity, timesteps=1, samples=4, latency_rounds=1)
    assert len(redundancy.units) == 20 and all(unit.sensitivity > 0 for unit in redundancy.units)
    plan = make_plan(redundancy, params=0.8)
    student = build_student(pipeline.transformer, plan)
    assert sum(p.numel() for p in student.parameters()) <= 0.8 * redundancy.parameters
    report = fit_compensation(pipeline, student, timesteps=2, samples=4)
    assert report.error_after < report.error_before


def test_a_student_is_saved_and_loaded_with_and_without_the_package(pipeline, tmp_path):
    student = student_of(pipeline.transformer, *EDITED)
    fit_compensation(pipeline, with_unet(pipeline, student).transformer, timesteps=1, samples=2)
    save_pipeline(with_unet(pipeline, student), tmp_path / "student")
    loaded = load_pipeline(tmp_path / "student")
    assert type(loaded.transformer) is AsdmPixArtTransformer2DModel
    assert torch.equal(predict(loaded.transformer), predict(student))
    assert f"transformer/{MODULE_NAME}.py" in (tmp_path / "student" / "README.md").read_text()
    script = f"""
        import torch
        from diffusers import DiffusionPipeline
        pipeline = DiffusionPipeline.from_pretrained({str(tmp_path / "student")!r}, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline.transformer).__name__ == "AsdmPixArtTransformer2DModel"
        pipeline("an octopus", num_inference_steps=2, use_resolution_binning=False)
    """
    done = without_asdm(script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_shorter_one_is_a_stock_pipeline(pipeline, tmp_path):
    student = student_of(pipeline.transformer, remove("transformer_blocks.1"))
    save_pipeline(with_unet(pipeline, student), tmp_path / "student")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(loaded.transformer) is PixArtTransformer2DModel
    assert torch.equal(predict(loaded.transformer), predict(student))
    assert type(load_pipeline(tmp_path / "student").transformer) is PixArtTransformer2DModel
    card = (tmp_path / "student" / "README.md").read_text()
    assert "- remove transformer_blocks.1" in card and "- pixart" in card
    assert "stable-diffusion" not in card and "trust_remote_code" not in card
    again = student_of(load_pipeline(tmp_path / "student").transformer, remove("transformer_blocks.0"))
    assert [edit.unit for edit in all_edits_of(again)] == ["transformer_blocks.1", "transformer_blocks.0"]


@pytest.mark.parametrize("edits", [EDITED, [remove("transformer_blocks.1")]])
def test_it_is_distilled(pipeline, data_folder, tmp_path, edits):
    student = student_of(pipeline.transformer, *edits)
    before = {name: p.clone() for name, p in student.named_parameters()}
    stage = Stage(name="joint", steps=2, batch_size=2)
    distill(pipeline, student, data_folder, tmp_path / "run", stages=[stage])
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_the_time_that_its_steps_will_take_is_estimated(pipeline):
    forecast = Forecast(pipeline, budget={"macs": 0.8})
    assert forecast.plan.edits and 0 < forecast.speed.student_share < 1


def test_the_recipe_with_semantic_supervision_reads_the_block_in_the_middle(pipeline, data_folder, tmp_path):
    student = student_of(pipeline.transformer, remove(f"{BRANCH}.ff"))
    stages = recipe_stages("incubation", student, 20)
    stages = [stage.model_copy(update={"steps": 1, "batch_size": 2, "mixed_precision": "no"}) for stage in stages]
    rows = []
    distill(pipeline, student, data_folder, tmp_path / "run", stages=stages, progress=rows.append)
    assert rows[-1]["semantic"] > 0
    assert make_encoder("unet", pipeline).path == "transformer_blocks.2"


def test_captions_are_mixed_within_their_tokens(pipeline, data_folder, tmp_path):
    examples = prepare(pipeline, data_folder, tmp_path / "prepared")
    rows = [(3, 1.0), (6, 2.0), (4, 3.0), (1, 4.0)]  # tokens that count, and what they are; the last one is empty
    masks = torch.stack([(torch.arange(20) < count).float() for count, _ in rows])
    hidden = torch.tensor([value for _, value in rows]).view(4, 1, 1).expand(4, 20, 24)
    captions = Conditioning(hidden, encoder_attention_mask=masks)
    stage = Stage(name="s", steps=1, batch_size=4, caption_mixing=1.0)
    task = make_task(pipeline, student_of(pipeline.transformer), examples, stage)
    changed = []
    for seed in range(20):
        found, is_mixed = task._mixed(captions, torch.arange(4), torch.Generator().manual_seed(seed), WHOLE)
        values, counts = found.encoder_hidden_states[..., 0], found.encoder_attention_mask > 0
        read = [set(of_row[which].tolist()) for of_row, which in zip(values, counts, strict=True)]
        assert [len(tokens) == 2 for tokens in read] == is_mixed.tolist()
        assert all(own in tokens for (_, own), tokens in zip(rows, read, strict=True))
        changed += is_mixed[:3].tolist()
        assert not is_mixed[3], "there is no place within one token"
    assert sum(changed) > 0.3 * len(changed)  # some are put beside themselves, or beside the empty one


def test_captions_of_its_clip_are_read_by_clips_own_tokenizer(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "model")
    save_clip(tmp_path / "model" / "clip", 0, tiny_pipeline().tokenizer)
    loaded = load_pipeline(tmp_path / "model")
    encoder = make_encoder("clip", loaded)
    assert isinstance(encoder.tokenizer, CLIPTokenizer)
    assert encoder.text_features(["a fish"]).isfinite().all()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / "clip" / name).unlink()
    message = "clip: has no tokenizer, and the pipeline's is a T5Tokenizer, not CLIP's; save a CLIPTokenizer into it"
    losses = {"task": 1, "semantic_text": 1}
    stages = [Stage(name="s", steps=1, batch_size=2, losses=losses, semantics={"encoder": "clip"})]
    with pytest.raises(AsdmError, match=message):
        require_stages(loaded, stages, "data")
    with pytest.raises(AsdmError, match=message):
        RealImages(None, loaded, [], load_clip(loaded))
    with pytest.raises(AsdmError, match=message):
        open_extractor("clip", DEMO_SOURCES["clip"], None, loaded, "cpu")
    without_text = stages[0].model_copy(update={"losses": LossWeights(semantic=1)})
    require_stages(loaded, [without_text], "data")  # the images' tower needs no tokenizer


def test_it_is_evaluated(pipeline):
    student = with_unet(pipeline, student_of(pipeline.transformer, remove("transformer_blocks.1")))
    evaluation = evaluate({"teacher": pipeline, "student": student}, rounds=1, quality=False)
    teacher, other = evaluation.speed
    assert other.unet_parameters < teacher.unet_parameters and other.gmacs < teacher.gmacs


def test_it_generates_with_and_without_cached_features(pipeline):
    prompts = ["an octopus", "a tree, noto"]
    images = generate(pipeline, prompts, steps=4)
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(generate(pipeline, prompts[1], steps=4, seed=1), images[1:], atol=1e-4, rtol=0)
    with cache_features(pipeline, every=2, depth=1) as session:
        cached = generate(pipeline, prompts, steps=4)
    assert cached.shape == images.shape and not torch.equal(cached, images)
    with cache_features(pipeline, every=1, depth=1):
        torch.testing.assert_close(generate(pipeline, prompts, steps=4), images)
    assert session is not None
    schedule = calibrate_cache(pipeline, speedup=1.05, steps=4, samples=2)
    with cache_features(pipeline, schedule=schedule):
        assert generate(pipeline, prompts, steps=4).shape == images.shape


def test_its_blocks_are_compiled(pipeline):
    student = student_of(pipeline.transformer, remove(f"{BRANCH}.attn1", compensate="linear"))
    before = predict(student)
    student.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(predict(student), before)


def test_guidance_cannot_end_early_and_sizes_fit_its_patches(pipeline):
    with pytest.raises(AsdmError, match="PixArtAlphaPipeline: its guidance cannot end early"):
        generate(pipeline, "an octopus", steps=2, cfg_cutoff=0.5)
    with pytest.raises(AsdmError, match="the nearest is"):
        generate(pipeline, "an octopus", steps=2, size=18)
    assert generate(pipeline, "an octopus", steps=2, size=24).shape == (1, 3, 24, 24)
