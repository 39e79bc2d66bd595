"""Inheriting steps compute little, answer with what was computed before, and leave no trace."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from asdm import AsdmError, PruningPlan, build_student, inherit_features, with_unet
from asdm.evaluation.macs import counting_macs
from asdm.inference.feature_inheritance import _Inheriting, computed_steps, inheriting_modules
from conftest import tiny_pipeline, tiny_sdxl_pipeline, tiny_unet

GRANULARITIES = ("block", "layer", "unit")


def draw(pipeline, prompt="octopus, noto", steps=6, seed=0, **arguments) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="np", **arguments)
    return made.images


def parts(pipeline, **more):
    return {**pipeline.components, "requires_safety_checker": False, **more}


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_computing_at_every_step_changes_nothing_and_leaving_leaves_no_trace(make, granularity):
    pipeline = make()
    before, modules = draw(pipeline), dict(pipeline.unet.named_modules())
    with inherit_features(pipeline, every=1, granularity=granularity) as session:
        np.testing.assert_array_equal(draw(pipeline), before)
    assert (session.computed, session.inherited) == (6, 0)
    with inherit_features(pipeline, every=3, granularity=granularity) as session:
        assert not np.array_equal(draw(pipeline), before)
    assert (session.computed, session.inherited) == (2, 4)
    assert dict(pipeline.unet.named_modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.unet.modules())
    np.testing.assert_array_equal(draw(pipeline), before)


def macs_of(unet, session, inheriting):
    from asdm.evaluation.latency import unet_call

    with session.forced(inheriting), counting_macs(unet) as count:
        unet_call(unet, batch_size=1)()
    return count.below()


def test_inheriting_costs_less_the_more_inherits(pipeline):
    costs = {}
    for granularity in GRANULARITIES:
        with inherit_features(pipeline, every=2, granularity=granularity) as session:
            whole = macs_of(pipeline.unet, session, False)
            costs[granularity] = macs_of(pipeline.unet, session, True) / whole
    assert costs["layer"] < costs["unit"] < 1
    assert costs["layer"] < costs["block"] < 1


def ramp_unet():
    """A module whose output is a polynomial of the time step."""
    return torch.nn.Identity()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_is_exact_for_polynomials_of_its_order(pipeline, order):
    with inherit_features(pipeline, every=2, order=order) as session:
        module = _Inheriting(ramp_unet(), session, None)
        session.generation += 1

        def result(t, degree):
            return torch.full((1, 2), float(t) ** degree)

        for degree in range(order + 1):
            session.generation += 1
            session.inheriting = False
            for t in (1.0, 0.8, 0.6):
                session.timestep = t
                module(result(t, degree))
            session.inheriting, session.timestep = True, 0.5
            torch.testing.assert_close(module(torch.zeros(1, 2)), result(0.5, degree))


def test_nothing_is_inherited_from_another_sampling(pipeline):
    expected = {seed: draw(pipeline, seed=seed) for seed in (0, 1)}
    with inherit_features(pipeline, every=3):
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
    with inherit_features(pipeline, every=3):
        draw(pipeline)
        np.testing.assert_array_equal(draw(other, steps=4, seed=3), expected)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_other_schedulers(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    before = draw(pipeline)
    with inherit_features(pipeline, every=2) as session:
        images = draw(pipeline)
    assert session.inherited > 0 and np.isfinite(images).all()
    with inherit_features(pipeline, every=1):
        np.testing.assert_array_equal(draw(pipeline), before)


def test_inpainting_and_controlnet_with_students_without_a_mid_block(pipeline):
    unit = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    edits = [{"edit": "remove", "unit": "mid_block"}, {"edit": "gri_attention", "unit": unit, "regions": 2}]
    lean = with_unet(pipeline, build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits)))
    stock = with_unet(pipeline, tiny_unet(mid_block_type=None, layers_per_block=1))
    assert type(stock.unet) is UNet2DConditionModel
    image, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(16, 32))
    for student in (lean, stock):
        for granularity in GRANULARITIES:
            with inherit_features(student, every=2, granularity=granularity) as session:
                draw(student)
                inpainting = StableDiffusionInpaintPipeline(**parts(student))
                draw(inpainting, image=image, mask_image=mask, height=16, width=16)
                if student is lean:
                    draw(StableDiffusionControlNetPipeline(**parts(student, controlnet=controlnet)), image=image)
            assert session.inherited > 0


def test_a_budget_decides_by_what_has_changed(pipeline):
    counts = []
    for budget in (0.0, 0.2, 1e9):
        with inherit_features(pipeline, budget=budget) as session:
            draw(pipeline, steps=12)
        assert session.computed + session.inherited == 12
        counts.append(session.computed)
    assert counts[0] == 12 > counts[1] > counts[2] == 1


@pytest.mark.parametrize("spacing", ["uniform", "early", "late"])
def test_the_steps_that_compute_begin_with_the_first(spacing):
    for count, computed in ((25, 10), (6, 6), (50, 7), (3, 1)):
        steps = computed_steps(count, computed, spacing)
        assert 0 in steps and len(steps) == computed and max(steps) < count
    early, late = (sum(computed_steps(50, 10, kind)) for kind in ("early", "late"))
    assert early < sum(computed_steps(50, 10, "uniform")) < late


def test_a_speedup_is_turned_into_steps(pipeline):
    with inherit_features(pipeline, speedup=1.2) as session:
        draw(pipeline, steps=10)
    assert 0 < session.inherited < 10
    with inherit_features(pipeline, steps=[0, 4]) as session:
        draw(pipeline)
    assert (session.computed, session.inherited) == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"every": 2, "speedup": 2.0}, "got speedup, every"),
        ({"every": 0}, "every=0: out of range"),
        ({"speedup": 1000.0}, "speedup=1000: out of reach.*is the limit"),
        ({"every": 2, "order": 3}, "order=3: allowed are"),
        ({"every": 2, "granularity": "pixel"}, "granularity=pixel: allowed are block, layer, unit"),
        ({"speedup": 1.1, "spacing": "odd"}, "spacing=odd: allowed are"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_left_behind(pipeline, arguments, message):
    modules = dict(pipeline.unet.named_modules())
    with pytest.raises(AsdmError, match=message), inherit_features(pipeline, **arguments):
        pass
    assert dict(pipeline.unet.named_modules()) == modules


def test_one_block_at_a_time(pipeline):
    with inherit_features(pipeline, every=2):
        with pytest.raises(AsdmError, match="inherits features already"), inherit_features(pipeline, every=2):
            pass
        assert sum(isinstance(module, _Inheriting) for module in pipeline.unet.modules()) == len(
            inheriting_modules(tiny_unet(), "layer")
        )
