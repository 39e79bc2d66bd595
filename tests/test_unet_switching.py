"""The time step says which UNet answers, in every kind of pipeline."""

import pickle

import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from asdm import (
    AsdmError,
    PruningPlan,
    analyze,
    build_student,
    cache_features,
    export,
    generate,
    switch_unets,
    with_unet,
)
from asdm.evaluation.protocol.image_job import identity_of
from asdm.measure.latency import Latency
from asdm.pipelines.derived import with_scheduler
from asdm.runtime import switching as unet_switching
from conftest import (
    ip_adapter,
    lora_file,
    predict,
    tiny_pipeline,
    tiny_sdxl_pipeline,
    tiny_transformer,
    tiny_unet,
    unet_inputs,
)


def lean(pipeline, *units):
    edits = [{"edit": "remove", "unit": unit} for unit in units or ("mid_block.resnets.1",)]
    return build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, edits))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_each_answers_in_its_part_of_the_schedule(make):
    pipeline = make()
    student = lean(pipeline)
    switched = switch_unets(pipeline, [student, pipeline.unet], below=[0.4]).unet
    for timestep, expected in ((900, student), (400, student), (399, pipeline.unet), (0, pipeline.unet)):
        inputs = unet_inputs(pipeline.unet) | {"timestep": torch.tensor(timestep)}
        assert torch.equal(predict(switched, **inputs), predict(expected, **inputs)), timestep


def test_time_steps_that_are_no_part_of_a_schedule_are_refused():
    pipeline = with_scheduler(tiny_sdxl_pipeline(), EDMEulerScheduler())
    for how in ({"below": [0.5]}, {"speedup": 1.2}):
        with pytest.raises(AsdmError, match="EDMEulerScheduler: its noise levels"):
            switch_unets(pipeline, [pipeline.unet, pipeline.unet], **how)


def test_it_draws_from_text_and_from_images(pipeline):
    student = lean(pipeline)
    switched = switch_unets(pipeline, [student, pipeline.unet], below=[0.5])
    alone = [generate(each, ["octopus"], steps=4) for each in (pipeline, with_unet(pipeline, student))]
    drawn = generate(switched, ["octopus"], steps=4)
    assert not any(torch.equal(drawn, other) for other in alone)
    # At low strength the sampling begins below the switch: the original's part alone.
    image = Image.new("RGB", (16, 16), "red")
    images = [generate(each, ["x"], steps=10, image=image, strength=0.3) for each in (switched, pipeline)]
    assert torch.equal(*images)
    assert type(StableDiffusionImg2ImgPipeline(**switched.components, requires_safety_checker=False).unet) is type(
        switched.unet
    )


def test_images_of_other_boundaries_or_edits_are_told_apart(pipeline):
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"

    def pooled(regions):
        edit = {"edit": "gri_attention", "unit": attention, "regions": regions, "pool": 2}
        return build_student(pipeline.unet, PruningPlan.for_unet(pipeline.unet, [edit]))

    def identity(student, below):
        return identity_of(switch_unets(pipeline, [student, pipeline.unet], below=[below]))["model"]

    assert identity(pooled(2), 0.2) == identity(pooled(2), 0.2)
    assert len({identity(pooled(2), 0.2), identity(pooled(2), 0.8), identity(pooled(3), 0.2)}) == 3


def test_sdxl_draws_and_features_are_not_cached_across_unets():
    pipeline = tiny_sdxl_pipeline()
    switched = switch_unets(pipeline, [lean(pipeline), pipeline.unet], below=[0.5])
    assert generate(switched, ["octopus"], steps=4).isfinite().all()
    with pytest.raises(AsdmError, match="has no blocks of its own"), cache_features(switched, every=2):
        pass


def test_memory_counts_shared_tensors_once(pipeline):
    size = sum(p.numel() * p.element_size() for p in pipeline.unet.parameters()) / 1e6
    twice = switch_unets(pipeline, [pipeline.unet, pipeline.unet], below=[0.5])
    assert twice.unet.megabytes == pytest.approx(size)
    apart = switch_unets(pipeline, [lean(pipeline), pipeline.unet], below=[0.5])
    assert size < apart.unet.megabytes < 2 * size


def test_a_speedup_decides_where_to_switch(pipeline, monkeypatch):
    """With a first UNet that takes half the time, `part` of the steps with it take `1 - part / 2` of the time."""
    times = {"0": Latency(5.0, 5.0, 5.0, 5), "1": Latency(10.0, 10.0, 10.0, 5)}
    monkeypatch.setattr(unet_switching, "measure_interleaved", lambda calls, **_: times)
    for target, part in ((1.25, 0.4), (1.6, 0.75)):
        switched = switch_unets(pipeline, [lean(pipeline), pipeline.unet], speedup=target)
        assert switched.unet.boundaries == pytest.approx([1000 * (1 - part)], abs=1)
    with pytest.raises(AsdmError, match=r"the first denoiser alone is 2\.00 times as fast"):
        switch_unets(pipeline, [lean(pipeline), pipeline.unet], speedup=2.0)


def test_what_does_not_fit_is_named(pipeline, tmp_path):
    student = lean(pipeline)
    for unets, settings, message in (
        ([student, pipeline.unet], {"below": []}, "for 2 denoisers give 1 falling"),
        ([student, pipeline.unet], {"below": [1.5]}, "falling fractions of the schedule"),
        ([student, pipeline.unet], {"speedup": 50.0}, "speedup=50: out of reach"),
        ([student, pipeline.unet], {}, "either below or speedup"),
        ([student, tiny_unet(in_channels=9)], {"below": [0.5]}, "in_channels: 4 and 9"),
        ([student, tiny_unet().bfloat16()], {"below": [0.5]}, "dtype: torch.float32 and torch.bfloat16; bring"),
    ):
        with pytest.raises(AsdmError, match=message):
            switch_unets(pipeline, unets, **settings)
    with pytest.raises(AsdmError, match="compiled; give the original of it, its attribute _orig_mod"):
        switch_unets(pipeline, [torch.compile(student), pipeline.unet], below=[0.5])
    with pytest.raises(AsdmError, match="save the pipeline of each"):
        switch_unets(pipeline, [student, pipeline.unet], below=[0.5]).save_pretrained(tmp_path)


def test_what_changes_a_unet_changes_each_of_them(pipeline):
    student = lean(pipeline)
    switched = switch_unets(pipeline, [student, pipeline.unet], below=[0.5])
    plain = generate(switched, ["octopus"], steps=4)
    switched.enable_attention_slicing(1)
    assert torch.allclose(generate(switched, ["octopus"], steps=4), plain, atol=1e-4)
    switched.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert all(unet.up_blocks[0].b1 == 1.2 for unet in (student, pipeline.unet))
    switched.disable_freeu()
    switched.disable_attention_slicing()
    assert torch.equal(generate(switched, ["octopus"], steps=4), plain)


def test_it_goes_to_other_processes(pipeline):
    switched = switch_unets(pipeline, [lean(pipeline), pipeline.unet], below=[0.5]).unet
    there = pickle.loads(pickle.dumps(switched))
    for timestep in (900, 100):
        inputs = unet_inputs(pipeline.unet) | {"timestep": torch.tensor(timestep)}
        assert torch.equal(predict(there, **inputs), predict(switched, **inputs))


def test_what_needs_one_unet_is_refused_in_a_line(pipeline, tmp_path):
    switched = switch_unets(pipeline, [lean(pipeline), pipeline.unet], below=[0.5])
    lora = lora_file(tiny_unet(), tmp_path / "lora.safetensors")
    with pytest.raises(AsdmError, match=r"^down_blocks: several denoisers .* the pipeline of each"):
        analyze(switched, samples=1)
    with pytest.raises(AsdmError, match=r"^export: several denoisers"):
        export(switched, tmp_path / "graphs", to="onnx")
    with pytest.raises(AsdmError, match="take no LoRA"):
        switched.load_lora_weights(lora)
    with pytest.raises(AsdmError, match="take no IP-Adapter"):
        switched.load_ip_adapter(ip_adapter(pipeline.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
    assert not hasattr(switched.unet, "down_blocks")


def test_denoisers_of_two_families_are_refused(pipeline):
    with pytest.raises(AsdmError, match=r"^a UNet and a .*: switch between denoisers of one kind"):
        switch_unets(pipeline, [pipeline.unet, tiny_transformer()], below=[0.5])
