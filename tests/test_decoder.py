"""A tiny decoder is taught by the VAE, takes its place wherever images are made, and is refused where it cannot."""

import json
import sys

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import asdm
from asdm import AsdmError, DecoderRecipe, cli, distill_decoder, generate, load_pipeline, save_decoder, with_decoder
from asdm.diffusion.conditioning import decode_latents, encode_images
from asdm.distillation.decoder_recipe import read_decoder_recipe
from asdm.distillation.decoder_task import DecoderBatch, DecoderTask
from asdm.evaluation import decoders as decoders_module
from asdm.evaluation import real_images
from asdm.evaluation.decoders import DecodedSet, compare_decoder, held_out_set
from asdm.pipelines import decoders
from asdm.pipelines.decoders import make_tiny
from asdm.training.log import read_log
from asdm.training.task import BatchSlice
from conftest import (
    PixelJudge,
    tiny_decoder,
    tiny_inpainting_pipeline,
    tiny_pipeline,
    tiny_pixart_pipeline,
    tiny_sdxl_pipeline,
)

SMALL = {"width": 8, "blocks": [1, 1], "batch_size": 2, "mixed_precision": "no", "checkpoint_every": 2}


@pytest.fixture
def decoder_folder(tmp_path):
    return save_decoder(tiny_decoder(), tmp_path / "decoder", {"teacher": "x"})


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Run `asdm ARGS` with the tiny pipeline as each model; returns exit status and error."""

    def call(*arguments):
        monkeypatch.setattr("asdm.cli.loading.load_model", lambda *_, **__: tiny_pipeline())
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["asdm", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as exit_:
            status = exit_.code or 0
        return status, capfd.readouterr()

    return call


def test_the_card_of_a_teacher_whose_name_is_not_utf_8_is_written(tmp_path):
    folder = save_decoder(tiny_decoder(), tmp_path / "decoder", {"teacher": "t\udce9"})
    assert r"taught by the VAE of `t\udce9`" in (folder / "README.md").read_text("utf-8")


# -- training ---------------------------------------------------------------------------------------------


def test_it_learns_the_vaes_images_and_its_latents(pipeline, data_folder, tmp_path):
    vae = {name: tensor.clone() for name, tensor in pipeline.vae.state_dict().items()}
    recipe = DecoderRecipe(**SMALL, steps=60, features_every=2, warmup_steps=5)
    made = distill_decoder(pipeline, data_folder, tmp_path / "work", recipe=recipe)
    assert made.is_done and type(made.decoder) is AutoencoderTiny
    rows = read_log(tmp_path / "work" / "log.jsonl")
    assert [("features" in row) for row in rows[:4]] == [True, False, True, False]
    assert ["encoder" in row for row in rows[:4]] == [True, False, True, False]
    for term, share in (("pixels", 0.5), ("encoder", 0.7), ("features", 0.8)):
        found = [row[term] for row in rows if term in row]
        assert sum(found[-5:]) < share * sum(found[:5]), term
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encode_images(pipeline.vae, images)
    found = made.decoder.decode(latents).sample
    wanted, untaught = decode_latents(pipeline, latents), tiny_decoder().decode(latents).sample
    assert (found - wanted).square().mean() < 0.5 * (untaught - wanted).square().mean()
    assert all(torch.equal(tensor, vae[name]) for name, tensor in pipeline.vae.state_dict().items())
    assert all(parameter.requires_grad for parameter in pipeline.vae.parameters())


def test_it_resumes_where_it_stopped_bit_for_bit(pipeline, data_folder, tmp_path):
    recipe = DecoderRecipe(**SMALL, steps=6)
    whole = distill_decoder(pipeline, data_folder, tmp_path / "whole", recipe=recipe)
    part = distill_decoder(pipeline, data_folder, tmp_path / "part", recipe=recipe, minutes=1e-6)
    assert not part.is_done and len(read_log(tmp_path / "part" / "log.jsonl")) == 1
    rest = distill_decoder(pipeline, data_folder, tmp_path / "part", recipe=recipe)
    assert rest.is_done
    for name, tensor in whole.decoder.state_dict().items():
        assert torch.equal(rest.decoder.state_dict()[name], tensor), name
    longer = distill_decoder(pipeline, data_folder, tmp_path / "part", recipe=recipe.model_copy(update={"steps": 7}))
    assert longer.is_done
    with pytest.raises(AsdmError, match="begun with other settings \\(width\\)"):
        distill_decoder(
            pipeline, data_folder, tmp_path / "part", recipe=recipe.model_copy(update={"width": 9, "steps": 7})
        )
    other = tiny_pipeline()
    torch.nn.init.normal_(other.vae.decoder.conv_out.weight)
    with pytest.raises(AsdmError, match="prepared by another model"):
        distill_decoder(other, data_folder, tmp_path / "part", recipe=recipe)


def test_captions_alone_serve_and_so_do_prepared_latents(pipeline, tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\na dog\n")
    asdm.prepare_data(pipeline, captions, tmp_path / "prepared", steps=2)
    recipe = DecoderRecipe(**SMALL, steps=1, features=0.0)
    made = distill_decoder(pipeline, tmp_path / "prepared", tmp_path / "work", recipe=recipe)
    assert made.is_done and len(made.examples) == 2
    assert read_log(tmp_path / "work" / "log.jsonl")[0].keys() == {"loss", "pixels", "encoder", "step", "learning_rate"}


@pytest.mark.parametrize("crop", [4, 8])
def test_a_batch_in_parts_has_the_whole_ones_gradient(pipeline, crop):
    recipe = DecoderRecipe(**SMALL, crop=crop)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradient(parts):
        task = DecoderTask(pipeline, tiny_decoder(), recipe)
        for index in range(parts):
            generator = torch.Generator().manual_seed(1)
            losses = task(DecoderBatch(latents, torch.arange(4), 2), generator, BatchSlice(index, parts))
            (losses["loss"] / parts).backward()
        return torch.cat([p.grad.flatten() for p in task.trained().values()])

    torch.testing.assert_close(gradient(2), gradient(1))


def test_the_size_follows_the_vae_and_the_recipe(pipeline, tmp_path):
    tiny = DecoderRecipe(width=8).tiny_for(pipeline)
    assert tiny.config.num_decoder_blocks == (6, 0) and tiny.config.num_encoder_blocks == (0, 3)
    with pytest.raises(AsdmError, match="blocks=3,3,3,1: the levels of this model's VAE are 2"):
        DecoderRecipe(blocks=[3, 3, 3, 1]).tiny_for(pipeline)
    file = tmp_path / "recipe.yaml"
    file.write_text("steps: 7\nblocks: [2, 1]\n")
    assert read_decoder_recipe(file) == DecoderRecipe(steps=7, blocks=[2, 1])
    for text, told in [
        ("steps: nan", "steps"),
        ("- 1", "write its fields by name"),
        ("stps: 1", "stps"),
        ("a: [", "YAML"),
    ]:
        file.write_text(text)
        with pytest.raises(AsdmError, match=rf"^[^\n]*{told}[^\n]*$"):
            read_decoder_recipe(file)
    with pytest.raises(AsdmError, match="no such recipe"):
        read_decoder_recipe(tmp_path / "gone.yaml")


def test_a_tiny_vae_teaches_none_and_one_in_half_precision_neither(pipeline, data_folder, tmp_path):
    with pytest.raises(AsdmError, match="its VAE is an AutoencoderTiny already"):
        distill_decoder(with_decoder(pipeline, tiny_decoder()), data_folder, tmp_path / "work")
    pipeline.vae.half()
    with pytest.raises(AsdmError, match="load the pipeline in float32"):
        distill_decoder(pipeline, data_folder, tmp_path / "work")
    assert not (tmp_path / "work").exists()


# -- in a pipeline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline, tiny_pixart_pipeline, tiny_inpainting_pipeline])
def test_it_takes_the_vaes_place_in_each_kind_of_pipeline(make, decoder_folder):
    pipeline = make()
    vae = pipeline.vae
    fast = with_decoder(pipeline, decoder_folder)
    assert pipeline.vae is vae and type(fast.vae) is AutoencoderTiny and fast.vae_scale_factor == 2
    images = generate(fast, ["a cat"], steps=2)
    assert images.shape == (1, 3, 16, 16)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(decode_latents(fast, latents), fast.vae.decode(latents).sample)  # no scaling factor
    assert not torch.equal(images, generate(pipeline, ["a cat"], steps=2))
    if make is not tiny_pixart_pipeline:
        mask = Image.new("L", (16, 16), 255)
        for inputs in ({}, {"mask": mask}):
            image = Image.new("RGB", (16, 16), "red")
            assert generate(fast, ["a cat"], steps=2, image=image, **inputs).shape == (1, 3, 16, 16)


def test_the_latents_are_those_that_the_denoiser_gives(pipeline):
    """Of a decoder that copies its latents to pixels, an image is the latents, though the VAE scales by 0.5."""
    tiny = with_decoder(pipeline, tiny_decoder())
    seen = []
    tiny.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generate(tiny, ["a cat"], steps=2, guidance_scale=1.0)
    sampling = {"num_inference_steps": 2, "guidance_scale": 1.0, "generator": [torch.Generator().manual_seed(0)]}
    latents = pipeline(["a cat"], output_type="latent", **sampling).images
    torch.testing.assert_close(seen[0], latents)


def test_it_decodes_in_tiles_of_its_own_size(pipeline):
    tiny = with_decoder(pipeline, tiny_decoder()).vae
    latents = torch.randn(1, 4, 24, 24)
    with torch.no_grad():
        whole = tiny.decode(latents).sample
        tiny.enable_tiling()
        assert torch.equal(tiny.decode(latents).sample, whole)
        tiny.tile_latent_min_size = 16
        assert tiny.decode(latents).sample.shape == whole.shape


def test_a_saved_pipeline_with_it_is_a_stock_one(pipeline, decoder_folder, tmp_path):
    fast = with_decoder(pipeline, decoder_folder)
    folder = asdm.save_pipeline(fast, tmp_path / "fast")
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.vae) is AutoencoderTiny
    before = generate(fast, ["a cat"], steps=2)
    for loaded in (stock, load_pipeline(folder)):
        torch.testing.assert_close(generate(loaded, ["a cat"], steps=2), before)


def test_what_does_not_fit_is_told_in_a_line(pipeline, decoder_folder, tmp_path, monkeypatch):
    for tiny, told in [
        (tiny_decoder(channels=16), "decodes latents of 16 channels, and this model's have 4"),
        (tiny_decoder(blocks=(1, 1, 1)), "an image has 4 times the latents' side, and with this model's VAE 2 times"),
    ]:
        with pytest.raises(AsdmError, match=rf"^[^\n]*{told}[^\n]*$"):
            with_decoder(pipeline, tiny)
    asdm.save_pipeline(pipeline, tmp_path / "pipeline")
    registered = {"bare": tmp_path / "pipeline"}
    monkeypatch.setattr(decoders, "registered_folder", lambda name, _group: registered.get(name))
    for name, told in [
        ("./gone", "no such folder of a decoder"),
        (tmp_path / "pipeline", "not a decoder in diffusers' format"),
        (tmp_path / "pipeline" / "vae", "a AutoencoderKL; must be an AutoencoderTiny"),
        ("bare", "has no decoder beside it; train one: asdm distill-decoder bare"),
        ("random:taesd", "only a model of random weights takes it"),
        ("random:x", "no such decoder of random weights"),
    ]:
        with pytest.raises(AsdmError, match=rf"^[^\n]*{told}[^\n]*$"):
            with_decoder(pipeline, name)
    weights = decoder_folder / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    broken = {
        "lacks": {name: tensor for name, tensor in whole.items() if name != "decoder.layers.0.bias"},
        "its weights are no numbers": {**whole, "decoder.layers.0.bias": whole["decoder.layers.0.bias"] * torch.nan},
        "cannot be loaded": {**whole, "decoder.layers.0.bias": torch.zeros(3)},
    }
    for told, tensors in broken.items():
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(AsdmError, match=rf"^[^\n]*{told}[^\n]*$"):
            with_decoder(pipeline, decoder_folder)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AsdmError, match="truncated or damaged"):
        with_decoder(pipeline, decoder_folder)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(AsdmError, match="pickles are not loaded"):
        with_decoder(pipeline, decoder_folder)


def test_random_weights_have_a_random_decoder_of_taesds_size(pipeline):
    pipeline.register_to_config(_name_or_path="random:tiny")
    tiny = with_decoder(pipeline, "random:taesd").vae
    assert tiny.config.decoder_block_out_channels == (64, 64) and tiny.config.num_decoder_blocks == (3, 1)
    for_sd15 = make_tiny(4, 64, (3, 3, 3, 1))
    stock = AutoencoderTiny()
    assert {name: p.shape for name, p in for_sd15.named_parameters()} == {
        name: p.shape for name, p in stock.named_parameters()
    }


def test_a_decoder_is_compared_with_the_vae(pipeline, data_folder):
    tiny = tiny_decoder()
    of = held_out_set(pipeline, data_folder)
    assert of.latents.shape == (1, 4, 8, 8) and len(of.gallery) == 6
    found = compare_decoder(pipeline, tiny, of, rounds=1)
    assert found.images == 1 and found.ms > 0 and 0 <= found.told_apart <= 1
    assert found.parameters == sum(p.numel() for p in tiny.decoder.parameters())
    wanted = decode_latents(pipeline, of.latents).clamp(-1, 1)
    mse = (tiny.decode(of.latents).sample.clamp(-1, 1) - wanted).square().mean()
    assert found.psnr == pytest.approx(float(10 * torch.log10(4 / mse)), abs=1e-3)
    alone = compare_decoder(pipeline, tiny, DecodedSet(of.latents), rounds=1)
    assert alone.real_psnr is None and alone.told_apart == 0  # of one image, the nearest is its own


def test_few_images_of_the_gallery_are_in_memory_at_once(pipeline, data_folder, monkeypatch):
    at_once = []

    class Counting(PixelJudge):
        def features(self, images):
            at_once.append(len(images))
            return super().features(images)

    monkeypatch.setattr(decoders_module, "Judge", Counting)
    monkeypatch.setattr(real_images, "_READ_TOGETHER", 2)
    of = held_out_set(pipeline, data_folder)
    assert compare_decoder(pipeline, tiny_decoder(), of, rounds=1).told_apart is not None
    assert at_once == [1, 1, 2, 2, 2]  # of the VAE, of the decoder, and real ones


# -- in the commands --------------------------------------------------------------------------------------


def test_the_command_trains_one_and_generates_with_it(run, data_folder, tmp_path):
    sizes = ("--width", 8, "--blocks", "1,1", "--batch-size", 2, "--steps", 2, "--device", "cpu")
    command = ("distill-decoder", "demo", "--data", data_folder, "--out", "decoder", *sizes)
    status, (out, error) = run(*command)
    assert status == 0, error
    assert "speed-up of decoding" in out and "decoder.training" in out
    marker = json.loads((tmp_path / "decoder" / "asdm.json").read_text())
    assert marker["kind"] == "decoder" and marker["teacher"] == "demo" and marker["recipe"]["blocks"] == [1, 1]
    weights = load_file(tmp_path / "decoder" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert run(*command)[0] == 0  # done already
    status, (_, error) = run("generate", "demo", "x", "--steps", 1, "--decoder", "decoder", "--out", "images")
    assert status == 0, error
    with Image.open(next((tmp_path / "images").glob("*.png"))) as image:
        assert json.loads(image.info["asdm"])["decoder"] == "decoder" and "VAE: decoder" in image.info["parameters"]


def test_a_stopped_training_writes_no_decoder(run, data_folder, tmp_path):
    sizes = ("--width", 8, "--blocks", "1,1", "--batch-size", 2, "--minutes", 1e-6)
    status, (out, _) = run("distill-decoder", "demo", "--data", data_folder, "--out", "decoder", *sizes)
    assert status == 0 and "run again to go on" in out and not (tmp_path / "decoder").exists()


def test_mistakes_with_decoders_are_one_line(run, decoder_folder, data_folder):
    for arguments, told in [
        (["generate", "demo", "x", "--decoder", "./gone"], "no such folder of a decoder"),
        (
            ["export", "demo", "--to", "checkpoint", "--out", "x.safetensors", "--decoder", decoder_folder],
            "does not go",
        ),
        (["compress", "demo", "--out", "x", "--params", "0.9", "--steps", "0", "--save-decoder"], "give decoder too"),
        (["benchmark", "demo", "--decoder", "./gone"], "no such folder of a decoder"),
        (["distill-decoder", "demo", "--data", data_folder, "--out", "x", "--blocks", "a"], "--blocks=a"),
        (["distill-decoder", "demo", "--data", data_folder, "--out", "x", "--blocks", "1,-1"], "blocks"),
        (["distill-decoder", "demo", "--data", data_folder, "--out", "x", "--recipe", "gone.yaml"], "no such recipe"),
        (["distill-decoder", "demo", "--data", data_folder, "--out", data_folder], "not written by asdm"),
    ]:
        status, (_, error) = run(*arguments)
        assert status == 2 and told in error and len(error.splitlines()) == 1, (arguments, error)
