"""UNets made for inpainting, which also read a mask and the latents of what it leaves."""

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from asdm import PruningPlan, Remove, build_student, compress, distill, generate, load_pipeline, save_pipeline
from asdm.data.calibration import calibration_calls
from asdm.data.preparation import prepare_data
from asdm.diffusion.conditioning import decode_latents, encode_images, masked_latents
from asdm.distillation.recipes import joint_stages
from asdm.pipelines.derived import with_unet
from conftest import tiny_inpainting_pipeline, tiny_pipeline, tiny_sdxl_pipeline

PICTURE = Image.new("RGB", (16, 16), "red")
LEFT = Image.new("L", (16, 16), 0)
LEFT.paste(255, (0, 0, 8, 16))


def test_masks_and_the_latents_of_what_they_leave():
    pipeline = tiny_inpainting_pipeline()
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    masked = masked_latents(pipeline, images, torch.Generator().manual_seed(0))
    assert masked.shape == (8, 5, 8, 8)
    masks = masked[:, :1]
    assert masks[3].all() and masks[7].all()
    assert all(0 < masks[i].mean() < 1 for i in (0, 1, 2, 4, 5, 6))
    kept = images * (1 - masks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(masked[:, 1:], encode_images(pipeline.vae, kept))


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline, tiny_inpainting_pipeline])
def test_an_image_keeps_its_size(make):
    pipeline = make()
    for size, expected in (((24, 40), (24, 40)), ((30, 17), (24, 16))):
        filled = generate(pipeline, ["x"], steps=2, image=PICTURE.resize(size), mask=LEFT.resize(size), strength=1.0)
        assert filled.shape == (1, 3, *expected[::-1])
    alone = generate(pipeline, ["x"], steps=2, image=PICTURE.resize((24, 40)), strength=1.0)
    assert alone.shape == (1, 3, 40, 24)


def test_it_is_observed_on_images_with_masks(data_folder):
    for data in (data_folder, None):
        calls = calibration_calls(tiny_inpainting_pipeline(), data, None, timesteps=2, samples=2, seed=0)
        first, second = (call.arguments["sample"] for call in calls)
        assert first.shape == (2, 9, 8, 8)
        assert torch.equal(first[:, 4:], second[:, 4:])
        assert first[:, 4].any() and set(first[:, 4].unique().tolist()) <= {0.0, 1.0}


def test_captions_alone_are_drawn_and_masked(tmp_path):
    (tmp_path / "captions.txt").write_text("a house\na fish\n")
    pipeline = tiny_inpainting_pipeline()
    latents, captions = prepare_data(pipeline, tmp_path / "captions.txt", tmp_path / "prepared", steps=2).batch([0, 1])
    pictures = decode_latents(pipeline, latents)
    expected = masked_latents(pipeline, pictures, torch.Generator())[:, 1:]
    gray = masked_latents(pipeline, torch.zeros_like(pictures), torch.Generator())[:, 1:]
    assert captions.masked.shape == (2, 5, 8, 8)
    assert (captions.masked[:, 1:] - expected).square().mean() < (captions.masked[:, 1:] - gray).square().mean()


@pytest.mark.slow
def test_the_whole_job(data_folder, tmp_path):
    save_pipeline(tiny_inpainting_pipeline(), tmp_path / "model")
    settings = {"params": 0.8, "sensitivity": "taylor", "refine": 0, "steps": 2, "samples": 2, "sampling_steps": 2}
    made = compress(str(tmp_path / "model"), tmp_path / "out", data=data_folder, **settings)
    assert {row.name for row in made.evaluation.quality} == {"teacher", "pruned", "distilled"}
    student = load_pipeline(tmp_path / "out")
    assert type(student) is StableDiffusionInpaintPipeline
    assert student.unet.config.in_channels == 9
    assert "mask_image=mask" in (tmp_path / "out" / "README.md").read_text()
    filled = generate(student, ["a house"], steps=2, image=PICTURE, mask=LEFT, strength=1.0)
    assert filled.shape == (1, 3, 16, 16)
    assert not torch.equal(filled, generate(student, ["a house"], steps=2))
    assert not torch.equal(filled, generate(student, ["a house"], steps=2, image=PICTURE))


def test_distillation_reads_the_masks_in_both_branches_of_guidance(data_folder, tmp_path):
    pipeline = tiny_inpainting_pipeline()
    plan = PruningPlan.for_unet(pipeline.unet, [Remove(unit="mid_block.attentions.0")])
    student = build_student(pipeline.unet, plan)
    stage = joint_stages(student, 2)[0].model_copy(update={"guidance_scale": 3.0, "batch_size": 2})
    examples = distill(pipeline, student, data_folder, tmp_path / "training", stages=[stage])
    assert examples.prepared.batch(range(5))[1].masked.shape == (5, 5, 8, 8)
    assert generate(with_unet(pipeline, student), ["a house"], steps=2).isfinite().all()


def test_other_pipelines_inpaint_too():
    pipeline = tiny_pipeline()
    filled = generate(pipeline, ["a house"], steps=2, image=PICTURE, mask=LEFT, strength=1.0)
    whole = generate(pipeline, ["a house"], steps=2, image=PICTURE, strength=1.0)
    assert filled.shape == whole.shape and not torch.equal(filled, whole)
