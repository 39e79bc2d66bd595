"""Cached steps compute little, reuse what was computed before, and leave no trace."""

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import HookRegistry
from PIL import Image
from typer.testing import CliRunner

from asdm import (
    AsdmError,
    CacheSchedule,
    CfgCutoff,
    PruningPlan,
    build_student,
    cache_features,
    calibrate_cache,
    export,
    optimize,
    save_pipeline,
    switch_unets,
    with_unet,
)
from asdm.benchmark.baselines import deep_cache
from asdm.caching.calibration import best_steps, observe_sampling
from asdm.caching.extrapolation import extrapolation_errors
from asdm.caching.recording import _values_at
from asdm.caching.schedule import spaced_steps
from asdm.caching.session import CachingHook, cut_of
from asdm.cli import app
from asdm.diffusion.parameterization import noise_level
from asdm.families import BlockIO, CacheCut, ModelFamily
from asdm.families.tensors import fingerprint
from asdm.measure.macs import counting_macs
from conftest import predict, tiny_inpainting_pipeline, tiny_pipeline, tiny_sdxl_pipeline, tiny_unet, unet_inputs

DEPTHS = (1, 3)  # one layer, and the whole last block


def draw(pipeline, prompt="octopus, noto", steps=6, seed=0, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="np", **arguments)
    return made.images


def parts(pipeline, **more):
    return {**pipeline.components, "requires_safety_checker": False, **more}


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
@pytest.mark.parametrize("depth", DEPTHS)
def test_computing_at_every_step_changes_nothing_and_leaving_leaves_no_trace(make, depth):
    pipeline = make()
    before, modules = draw(pipeline), dict(pipeline.unet.named_modules())
    with cache_features(pipeline, every=1, depth=depth) as session:
        np.testing.assert_array_equal(draw(pipeline), before)
    assert (session.full_steps, session.cached_steps) == (6, 0)
    with cache_features(pipeline, every=3, depth=depth) as session:
        assert np.abs(draw(pipeline) - before).max() > 1e-3
    assert (session.full_steps, session.cached_steps) == (2, 4)
    assert dict(pipeline.unet.named_modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.unet.modules())
    assert not any({"forward", "_diffusers_hook"} & vars(module).keys() for module in pipeline.unet.modules())
    np.testing.assert_array_equal(draw(pipeline), before)


def macs_of(unet, session, is_cached):
    from asdm.families import denoiser_call

    with session.forced(is_cached), counting_macs(unet) as count:
        denoiser_call(unet, batch_size=1)()
    return count.below()


def test_each_layer_of_depth_is_computed_and_costs(pipeline):
    costs = []
    for depth in (1, 2, 3, 4):
        with cache_features(pipeline, every=2, depth=depth) as session:
            whole = macs_of(pipeline.unet, session, False)
            costs.append(macs_of(pipeline.unet, session, True))
    assert [*costs, whole] == sorted({*costs, whole})


@pytest.mark.parametrize(
    ("depth", "border"), [(1, "up_blocks.3.attentions.1"), (3, "up_blocks.2"), (11, "up_blocks.0.resnets.0")]
)
def test_only_what_a_computed_layer_reads_is_extrapolated(pipeline, depth, border):
    assert cut_of(pipeline, depth).read == {border}


def test_copies_at_even_steps_are_what_deepcache_draws(pipeline):
    pytest.importorskip("DeepCache")
    with deep_cache(6, 3).prepared(pipeline) as theirs:
        expected = draw(theirs)
    with cache_features(pipeline, every=3, order=0):
        np.testing.assert_allclose(draw(pipeline), expected, atol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_is_exact_for_polynomials_of_its_order(pipeline, order):
    with cache_features(pipeline, every=2, order=order) as session:
        module, state = torch.nn.Identity(), session.state
        HookRegistry.check_if_exists_or_initialize(module).register_hook(CachingHook(session, BlockIO()), "cache")

        def result(t, degree):
            return torch.full((1, 2), float(t) ** degree)

        for degree in range(order + 1):
            state.clear()
            state.is_cached = False
            for t in (1.0, 0.8, 0.6):
                state.sigma = t
                module(result(t, degree))
            state.is_cached, state.sigma = True, 0.5
            torch.testing.assert_close(module(torch.zeros(1, 2)), result(0.5, degree))


def test_nothing_is_reused_from_another_sampling(pipeline):
    expected = {seed: draw(pipeline, seed=seed) for seed in (0, 1)}
    with cache_features(pipeline, every=3):
        first = draw(pipeline, seed=0)
        second = draw(pipeline, seed=1)
        np.testing.assert_array_equal(draw(pipeline, seed=0), first)
        np.testing.assert_array_equal(draw(pipeline, seed=1), second)
        # In other sizes, with several images, without guidance.
        for change in ({"height": 24, "width": 16}, {"num_images_per_prompt": 3}, {"guidance_scale": 1.0}):
            alone = draw(pipeline, **change)
            draw(pipeline)
            np.testing.assert_array_equal(draw(pipeline, **change), alone)

        def fail(_pipeline, step, _timestep, _arguments):
            if step == 1:
                raise RuntimeError("in the middle")
            return {}

        with pytest.raises(RuntimeError, match="in the middle"):
            draw(pipeline, seed=5, callback_on_step_end=fail)
        np.testing.assert_array_equal(draw(pipeline, seed=0), first)
        # Image-to-image goes on where the failed call was, in the same prompt: a new sampling nonetheless.
        image = Image.new("RGB", (16, 16), "red")
        other = StableDiffusionImg2ImgPipeline(**parts(pipeline))
        alone = draw(other, image=image, strength=0.5)
        with pytest.raises(RuntimeError, match="in the middle"):
            draw(pipeline, seed=5, callback_on_step_end=fail)
        np.testing.assert_array_equal(draw(other, image=image, strength=0.5), alone)
    np.testing.assert_array_equal(draw(pipeline, seed=0), expected[0])


def test_a_pipeline_that_shares_the_unet_and_has_its_own_scheduler_is_not_confused(pipeline):
    other = with_unet(pipeline, pipeline.unet)
    other.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    expected = draw(other, steps=4, seed=3)
    with cache_features(pipeline, every=3):
        draw(pipeline)
        np.testing.assert_array_equal(draw(other, steps=4, seed=3), expected)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_other_schedulers(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    before = draw(pipeline)
    with cache_features(pipeline, every=2) as session:
        images = draw(pipeline)
    assert session.cached_steps > 0 and np.isfinite(images).all()
    with cache_features(pipeline, every=1):
        np.testing.assert_array_equal(draw(pipeline), before)


def test_inpainting_and_controlnet_with_students_without_a_mid_block(pipeline):
    unit = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    edits = [{"edit": "remove", "unit": "mid_block"}, {"edit": "gri_attention", "unit": unit, "regions": 2}]
    lean = with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits)))
    edits = [{"edit": "remove", "unit": name} for name in ("mid_block", "down_blocks.3")]
    short = with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits)))
    stock = with_unet(pipeline, tiny_unet(mid_block_type=None, layers_per_block=1))
    assert type(stock.unet) is UNet2DConditionModel
    image, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    for student in (lean, short, stock):
        for depth in DEPTHS:
            with cache_features(student, every=2, depth=depth) as session:
                draw(student)
                inpainting = StableDiffusionInpaintPipeline(**parts(student))
                draw(inpainting, image=image, mask_image=mask, height=16, width=16)
                if student is lean:
                    draw(StableDiffusionControlNetPipeline(**parts(student, controlnet=controlnet)), image=image)
            assert session.cached_steps > 0


def test_a_budget_decides_by_what_has_changed(pipeline):
    counts = []
    for budget in (0.0, 0.2, 1e9):
        with cache_features(pipeline, budget=budget) as session:
            draw(pipeline, steps=12)
        assert session.full_steps + session.cached_steps == 12
        counts.append(session.full_steps)
    assert counts[0] == 12 > counts[1] > counts[2] == 1


@pytest.mark.parametrize("spacing", ["uniform", "late"])
def test_the_full_steps_begin_with_the_first(spacing):
    for count, full in ((25, 10), (6, 6), (50, 7), (3, 1)):
        steps = spaced_steps(count, full, spacing)
        assert 0 in steps and len(steps) == full and max(steps) < count
    assert sum(spaced_steps(50, 10, "uniform")) < sum(spaced_steps(50, 10, "late"))


def test_a_speedup_is_turned_into_steps(pipeline):
    with cache_features(pipeline, speedup=1.2) as session:
        draw(pipeline, steps=10)
    assert 0 < session.cached_steps < 10
    with cache_features(pipeline, steps=[0, 4]) as session:
        draw(pipeline)
    assert (session.full_steps, session.cached_steps) == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"every": 2, "speedup": 2.0}, "got speedup, every"),
        ({"every": 0}, "every=0: must be a whole number from 1"),
        ({"speedup": 1000.0}, "speedup=1000: out of reach.*is the limit"),
        ({"every": 2, "order": 3}, "order=3: must be a whole number from 0 to 2"),
        ({"every": 2, "depth": 12}, "depth=12: .*12 layers; allowed are 1 to 11"),
        ({"schedule": "absent.json"}, "absent.json: no such file; `asdm analyze"),
        ({"speedup": 1.1, "spacing": "odd"}, "spacing='odd': must be one of"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_left_behind(pipeline, arguments, message):
    modules = dict(pipeline.unet.named_modules())
    with pytest.raises(AsdmError, match=message), cache_features(pipeline, **arguments):
        pass
    assert dict(pipeline.unet.named_modules()) == modules


@pytest.mark.parametrize("depth", DEPTHS)
def test_names_stay_as_they_are_within_the_block(pipeline, depth, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    lender = tiny_pipeline()
    targets = ["to_q", "to_v", "conv1", "conv", "ff.net.2"]
    lender.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    lora = get_peft_model_state_dict(lender.unet)
    lender.save_lora_weights(tmp_path / "lora", unet_lora_layers=lora)
    names, tensors = list(dict(pipeline.unet.named_modules())), list(pipeline.unet.state_dict())
    before = draw(pipeline)
    with cache_features(pipeline, every=2, depth=depth):
        draw(pipeline)
        assert list(dict(pipeline.unet.named_modules())) == names
        assert list(pipeline.unet.state_dict()) == tensors
        save_pipeline(pipeline, tmp_path / "saved")
        pipeline.load_lora_weights(tmp_path / "lora")
        assert get_peft_model_state_dict(pipeline.unet, adapter_name="default_0").keys() == lora.keys()
        draw(pipeline)
    other = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(draw(other), before, atol=1e-5)
    other.load_lora_weights(tmp_path / "lora")
    np.testing.assert_allclose(draw(pipeline), draw(other), atol=1e-5)
    assert np.abs(draw(pipeline) - before).max() > 1e-3


def test_a_unet_is_not_copied_with_what_it_remembers(pipeline):
    with cache_features(pipeline, every=2), pytest.raises(AsdmError, match="is not copied; leave the block"):
        copy.deepcopy(pipeline.unet)
    copy.deepcopy(pipeline.unet)


def test_what_needs_a_whole_unet_is_refused_within_the_block(pipeline, tmp_path):
    before = draw(pipeline)
    with cache_features(pipeline, every=2):
        with pytest.raises(AsdmError, match="optimize: the denoiser's features are cached; leave the block"):
            optimize(pipeline)
        with pytest.raises(AsdmError, match="export: the denoiser's features are cached; leave the block"):
            export(pipeline, tmp_path / "out")
        switched = switch_unets(pipeline, [tiny_unet(seed=1), pipeline.unet], below=[0.5])
        assert np.isfinite(draw(switched)).all()
        draw(pipeline, callback_on_step_end=CfgCutoff(pipeline, 0.5))
    np.testing.assert_array_equal(draw(pipeline), before)


def test_each_thread_has_its_own_sampling(pipeline):
    """Other pipelines share the UNet, and the block's own begins anew while they draw."""
    others = [with_unet(pipeline, pipeline.unet) for _ in range(2)]
    for other in others:
        other.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        other.tokenizer = copy.deepcopy(pipeline.tokenizer)  # whose padding each call sets
    with cache_features(pipeline, every=3) as session:
        own = draw(pipeline, seed=9)
        expected = [draw(other, seed=seed) for seed, other in enumerate(others)]
        assert session.cached_steps == 3 * 4
        with ThreadPoolExecutor(2) as threads:
            drawn = threads.map(lambda seed: [draw(others[seed], seed=seed) for _ in range(4)], range(2))
            for _ in range(4):
                np.testing.assert_array_equal(draw(pipeline, seed=9), own)
        for images, alone in zip(drawn, expected, strict=True):
            for image in images:
                np.testing.assert_array_equal(image, alone)
        assert session.cached_steps == (3 + 3 * 4) * 4


def test_a_pipeline_that_goes_on_where_another_failed_reuses_nothing(pipeline):
    """With a scheduler of its own, in the same prompt, within and behind a sampling of the block's pipeline."""
    image = Image.new("RGB", (16, 16), "red")
    other = StableDiffusionImg2ImgPipeline(**parts(pipeline))
    other.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)

    def fail(_pipeline, step, _timestep, _arguments):
        if step == 2:
            raise RuntimeError("in the middle")
        return {}

    def draw_another(_pipeline, step, _timestep, _arguments):
        if step == 2:
            drawn.append(draw(other, image=image, strength=0.5))
        return {}

    drawn = []
    with cache_features(pipeline, every=3):
        draw(pipeline)
        alone = draw(other, image=image, strength=0.5)
        with pytest.raises(RuntimeError, match="in the middle"):
            draw(pipeline, callback_on_step_end=fail)
        np.testing.assert_array_equal(draw(other, image=image, strength=0.5), alone)
        draw(pipeline, callback_on_step_end=draw_another)
        np.testing.assert_array_equal(drawn[0], alone)


def test_one_block_at_a_time(pipeline):
    with cache_features(pipeline, every=2):
        with pytest.raises(AsdmError, match="features are cached already"), cache_features(pipeline, every=2):
            pass
        assert sum(hasattr(module, "_diffusers_hook") for module in pipeline.unet.modules()) == len(
            cut_of(pipeline, 1).cached
        )


@pytest.mark.slow
def test_compiled_blocks_are_not_compiled_again(pipeline):
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    pipeline.unet.compile_repeated_blocks(backend=backend)
    draw(pipeline)
    before = len(compiled)
    with cache_features(pipeline, every=3):
        draw(pipeline)
        draw(pipeline, steps=9)
    assert before > 0 and len(compiled) == before


def test_a_unet_compiled_as_a_whole_is_refused(pipeline):
    pipeline.unet.compile()  # compiles nothing before it is called
    with pytest.raises(AsdmError, match="compile its repeated blocks"), cache_features(pipeline, every=2):
        pass


# -- calibration -----------------------------------------------------------------------------------------


def walk(steps=8, size=30):
    """Features that wander, and falling noise levels."""
    random = np.random.default_rng(0)
    features = np.cumsum(random.normal(size=(steps, size)), axis=0)
    return features, np.sort(random.uniform(0.1, 10, size=steps))[::-1]


@pytest.mark.parametrize("damping", [0.0, 0.5, 1.0])
def test_errors_of_extrapolations_follow_from_scalar_products(damping):
    features, sigmas = walk()
    errors = extrapolation_errors(features @ features.T, sigmas, damping)
    q, p, i = 1, 3, 6
    ahead = damping * (sigmas[i] - sigmas[p]) / (sigmas[p] - sigmas[q])
    guess = features[p] + ahead * (features[p] - features[q])
    assert errors[q, p, i] == pytest.approx(((guess - features[i]) ** 2).sum())
    assert errors[p, p, i] == pytest.approx(((features[p] - features[i]) ** 2).sum())


@pytest.mark.parametrize("full", [1, 2, 4, 8])
def test_the_best_steps_are_those_of_all_choices(full):
    features, sigmas = walk()
    errors = extrapolation_errors(features @ features.T, sigmas, 1.0) * np.linspace(1, 5, len(sigmas))

    def total(steps):
        runs, before = [], 0
        for last, following in itertools.pairwise([*steps, len(sigmas)]):
            runs.append(np.sqrt(errors[before, last, last + 1 : following]).sum() ** 2)
            before = last
        return sum(runs)

    choices = [(0, *rest) for rest in itertools.combinations(range(1, len(sigmas)), full - 1)]
    steps, distance = best_steps(errors, full)
    assert tuple(steps) == min(choices, key=total)
    assert distance == pytest.approx(total(steps))


def test_noise_levels_are_the_schedulers(pipeline):
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.set_timesteps(7)
    levels = [noise_level(pipeline.scheduler, float(timestep)) for timestep in pipeline.scheduler.timesteps]
    np.testing.assert_allclose(levels, pipeline.scheduler.sigmas[:-1].numpy(), rtol=1e-3)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_inpainting_pipeline, tiny_sdxl_pipeline])
def test_a_calibrated_schedule_is_nearer_than_even_copies_and_draws_as_it_says(make, tmp_path):
    pipeline = make()
    modules = dict(pipeline.unet.named_modules())
    observed = observe_sampling(pipeline, steps=8, samples=1)
    observed = replace(observed, costs={depth: (10.0, float(depth)) for depth in observed.costs})
    schedule = observed.schedule(2.0)
    assert schedule.steps == 8 and schedule.speedup >= 2.0
    assert schedule.distance < schedule.uniform_distance
    schedule.save(tmp_path / "cache_schedule.json")
    assert CacheSchedule.load(tmp_path / "cache_schedule.json") == schedule
    assert observed.distance(schedule=tmp_path / "cache_schedule.json") == pytest.approx(schedule.distance)
    assert dict(pipeline.unet.named_modules()) == modules
    assert observed.distance(every=1) < 1e-9
    deeper = observe_sampling(pipeline, steps=8, samples=1, depth=2)
    assert list(deeper.costs) == [2]
    assert replace(deeper, costs={2: (10.0, 2.0)}).schedule(2.0).depth == 2


def made_schedule(unet, **changes):
    settings = {"steps": 6, "full_steps": (0, 1, 4), "depth": 1, "order": 1}
    costs = {"full_ms": 10, "cached_ms": 1, "speedup": 1.8}
    return CacheSchedule(fingerprint=fingerprint(unet), **{**settings, **costs, **changes})


def test_a_schedule_says_which_steps_are_full_also_in_a_sampling_of_other_length(pipeline):
    schedule = made_schedule(pipeline.unet)
    with cache_features(pipeline, schedule=schedule) as session:
        draw(pipeline)
        assert (session.full_steps, session.cached_steps) == (3, 3)
        draw(pipeline, steps=12)
        assert (session.full_steps, session.cached_steps) == (3 + 6, 3 + 6)
    assert schedule.full_steps_of(6) == {0, 1, 4}
    longer = schedule.full_steps_of(12)
    assert {0, 2, 8} <= longer and len(longer) == 6  # what is dense stays dense
    assert schedule.full_steps_of(2) == {0} and schedule.full_steps_of(1) == {0}


def test_schedules_that_do_not_fit_are_named(pipeline, tmp_path):
    other = made_schedule(tiny_unet(layers_per_block=1))
    with pytest.raises(AsdmError, match="is for the architecture"), cache_features(pipeline, schedule=other):
        pass
    path = tmp_path / "cache_schedule.json"
    for text in ("[", "{}", made_schedule(pipeline.unet).model_dump_json().replace("[0,1,4]", "[1,4]")):
        path.write_text(text)
        with pytest.raises(AsdmError, match="not a cache schedule"):
            CacheSchedule.load(path)
    with pytest.raises(AsdmError, match="steps=3: too few"):
        calibrate_cache(pipeline, speedup=1.5, steps=3)
    with pytest.raises(AsdmError, match="speedup=1000: out of reach"):
        calibrate_cache(pipeline, speedup=1000)


def test_the_command_line_calibrates_and_uses_a_schedule(pipeline, tmp_path):
    model, drawn = tmp_path / "model", tmp_path / "drawn"
    save_pipeline(pipeline, model)
    run = CliRunner().invoke
    made = run(app, ["analyze", str(model), "--cache", "1.2", "--steps", "4", "--samples", "1"])
    assert made.exit_code == 0, made.output
    assert CacheSchedule.load(model / "cache_schedule.json").steps == 4
    cached = ["--cache", str(model / "cache_schedule.json")]
    made = run(app, ["generate", str(model), "pear", "--steps", "4", "--out", str(drawn), *cached])
    assert made.exit_code == 0 and len(list(drawn.iterdir())) == 1


def test_a_sampling_begins_where_its_scheduler_says(pipeline):
    """With second-order schedulers, image-to-image may begin with the second visit of a time step."""
    pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    other = StableDiffusionImg2ImgPipeline(**parts(pipeline))
    image = Image.new("RGB", (16, 16), "red")
    with cache_features(pipeline, every=2):
        first = draw(other, image=image, strength=0.5)
        np.testing.assert_array_equal(draw(other, image=image, strength=0.5), first)


def test_interleaved_samplings_reuse_nothing_from_each_other(pipeline):
    """A loop of one's own over several latents, in the same prompt."""
    inputs = unet_inputs(pipeline.unet)
    several = [inputs["sample"], inputs["sample"].flip(0)]
    states = {"encoder_hidden_states": inputs["encoder_hidden_states"]}

    def predictions():
        pipeline.scheduler.set_timesteps(6)
        return [
            predict(pipeline.unet, sample=sample, timestep=timestep, **states)
            for timestep in pipeline.scheduler.timesteps
            for sample in several
        ]

    expected = predictions()
    with cache_features(pipeline, every=3):
        found = predictions()
    # The second call of the first step shows it; all later ones are full.
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_calls_before_any_sampling_are_computed(pipeline):
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    expected = predict(pipeline.unet)
    with cache_features(pipeline, speedup=1.1) as session:
        for _ in range(3):
            assert torch.equal(predict(pipeline.unet), expected)
        assert (session.full_steps, session.cached_steps) == (3, 0)


def test_a_schedule_fits_with_adapters_and_fused_projections(pipeline):
    before = fingerprint(pipeline.unet)
    pipeline.unet.fuse_qkv_projections()
    assert fingerprint(pipeline.unet) == before
    pipeline.unet.unfuse_qkv_projections()
    peft = pytest.importorskip("peft")
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    assert fingerprint(pipeline.unet) == before != fingerprint(tiny_unet(layers_per_block=1))


def test_what_changes_features_in_place_does_not_change_what_is_remembered(pipeline):
    unet = pipeline.unet
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    deepest = sum(len(block.resnets) for block in unet.up_blocks) - 1
    with cache_features(pipeline, every=2, depth=deepest) as session:
        with session.forced(False):
            computed = predict(unet)
        with session.forced(True):
            for _ in range(2):
                assert torch.equal(predict(unet), computed)


# -- other families --------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Adds a branch to the image states; with text states, these come first in the output, as FLUX's do."""

    def __init__(self, with_text):
        super().__init__()
        self.linear, self.with_text = torch.nn.Linear(4, 4), with_text

    def forward(self, hidden_states, encoder_hidden_states):
        states = hidden_states + self.linear(hidden_states).tanh()
        return (encoder_hidden_states + 1, states) if self.with_text else states


class Transformer(torch.nn.Module):
    """Four blocks on tokens; the last one is always computed, as is the first of a relative cut."""

    def __init__(self, with_text):
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = torch.nn.ModuleList(Block(with_text) for _ in range(4))
        self.with_text, self.family = with_text, made_up_family(with_text)

    def forward(self, hidden_states, encoder_hidden_states, timestep, return_dict=False):
        states, text = hidden_states * (1 + timestep), encoder_hidden_states
        for block in self.transformer_blocks:
            output = block(hidden_states=states, encoder_hidden_states=text)
            text, states = output if self.with_text else (text, output)
        return (states + text,)


def made_up_family(with_text):
    cut = ["transformer_blocks.1", "transformer_blocks.2"]

    class Family(ModelFamily):
        component, model_class = "unet", Transformer

        def cache_cut(self, model, depth, fresh=()):
            return CacheCut(cut, frozenset(cut[-1:]), None if with_text else cut[0])

        def block_io(self, model, path):
            return BlockIO(image=1, text=0) if with_text else BlockIO()

    Family.__abstractmethods__ = frozenset()
    return Family()


@pytest.mark.parametrize("with_text", [False, True])
def test_features_of_any_family_are_cached_where_it_says(pipeline, with_text):
    denoiser = Transformer(with_text)
    pipeline.unet = denoiser
    pipeline.scheduler.set_timesteps(4)
    text = torch.randn(1, 3, 4)
    samples = [torch.randn(1, 3, 4) for _ in pipeline.scheduler.timesteps]
    steps = list(zip(samples, pipeline.scheduler.timesteps / 1000, strict=True))
    pipeline.scheduler.timesteps = pipeline.scheduler.timesteps / 1000
    first, *inner, last = denoiser.transformer_blocks
    states = []
    for sample, timestep in steps:
        entering = image_of(first(sample * (1 + timestep), text))
        left = entering
        for block in inner:
            left = image_of(block(left, text))
        states.append((entering, left))
    with torch.no_grad(), cache_features(pipeline, steps=[0, 2], order=0) as session:
        found = [denoiser(sample, encoder_hidden_states=text, timestep=timestep)[0] for sample, timestep in steps]
    assert (session.full_steps, session.cached_steps) == (2, 2)
    for step, source in ((0, 0), (1, 0), (2, 2), (3, 2)):
        left = states[source][1] if with_text else states[step][0] + states[source][1] - states[source][0]
        expected = image_of(last(left, text)) + text + 4 * with_text
        torch.testing.assert_close(found[step], expected)
    with _values_at(denoiser, {1: denoiser.family.cache_cut(denoiser, 1)}) as values:
        denoiser(samples[0], text, timestep=steps[0][1])
    torch.testing.assert_close(values[1], states[0][1] - (0 if with_text else states[0][0]))


def image_of(output):
    return output[1] if isinstance(output, tuple) else output


def test_schedules_of_version_0_1_load(pipeline, tmp_path):
    schedule = made_schedule(pipeline.unet)
    now = {"full_steps": "computed", "full_ms": "whole_ms", "cached_ms": "inheriting_ms"}
    saved = {now.get(name, name): value for name, value in schedule.model_dump(mode="json").items()}
    assert {"computed", "whole_ms", "inheriting_ms"} < saved.keys()
    (tmp_path / "inheritance.json").write_text(json.dumps(saved))
    assert CacheSchedule.load(tmp_path / "inheritance.json") == schedule
