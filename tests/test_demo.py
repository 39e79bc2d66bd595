"""The embedded default: stock classes, a fixed hold-out, a recipe whose parts do what they say."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from asdm import generate, load_pipeline
from asdm.data.examples import load_pixels
from asdm.data.sources import open_data
from asdm.demo import images_folder, pipeline_folder
from asdm.evaluation.metrics import Judge, cosine_similarity
from asdm.families.unet_structure import removable_units
from asdm.images import load_images
from tools.demo.__main__ import main
from tools.demo.emoji import STYLES, Pair, all_pairs, held_out_pairs, seen_pairs
from tools.demo.recipe import StyleSwap, make_tokenizer, make_unet, make_vae, normalise_latents


def test_a_tenth_of_the_pairs_is_held_out_and_never_both_styles_of_a_concept():
    held_out = held_out_pairs()
    assert len(all_pairs()) == 2 * len({pair.concept for pair in all_pairs()}) >= 1000
    assert len(held_out) == round(0.1 * len(all_pairs()))
    assert len({pair.concept for pair in held_out}) == len(held_out)
    assert set(held_out) <= set(all_pairs())
    assert not set(held_out) & set(seen_pairs())
    assert len(held_out) + len(seen_pairs()) == len(all_pairs())
    assert {sum(pair.style == style for pair in held_out) for style in STYLES} == {len(held_out) // 2}


def test_images_are_all_there_and_training_data_excludes_the_held_out():
    rows = [json.loads(line) for line in (images_folder() / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [pair.caption for pair in all_pairs()]
    data = open_data("demo")
    assert {example.caption for example in data.examples} == {pair.caption for pair in seen_pairs()}
    assert data.skipped == {}
    with data.examples[0].image() as image:
        assert image.size == (64, 64)


def test_assets_stay_under_60_megabytes():
    total = sum(path.stat().st_size for path in pipeline_folder().parent.rglob("*") if path.is_file())
    assert total < 60e6


def test_the_pipeline_loads_without_our_package():
    code = (
        "import sys, torch; from diffusers import StableDiffusionPipeline as P;"
        f"p = P.from_pretrained({str(pipeline_folder())!r}); p.set_progress_bar_config(disable=True);"
        "i = p('octopus, noto', num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0];"
        "assert i.size == (64, 64); assert 'asdm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_image_to_image_and_inpainting_are_made_from_it():
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder())
    image = Image.open(images_folder() / "noto" / "octopus.png")
    mask = Image.new("L", (64, 64), 255)
    for kind, extra in ((StableDiffusionImg2ImgPipeline, {}), (StableDiffusionInpaintPipeline, {"mask_image": mask})):
        other = kind.from_pipe(pipeline)
        other.set_progress_bar_config(disable=True)
        size = {} if kind is StableDiffusionImg2ImgPipeline else {"height": 64, "width": 64}
        drawn = other("octopus, noto", image=image, strength=0.6, num_inference_steps=4, **size, **extra).images[0]
        assert drawn.size == (64, 64)


def test_its_unet_has_sd1s_topology():
    names = {unit.name for unit in removable_units(load_pipeline("demo").unet)}
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        sd = UNet2DConditionModel(cross_attention_dim=768)
    assert names == {unit.name for unit in removable_units(sd)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no such stage"),
        (["clip", "--folder", "built"], "no tokenizer; run that stage first"),
        (["assemble", "--folder", "built", "--warm-start"], "no checkpoint; run that stage first"),
    ],
)
def test_a_mistake_in_the_recipes_command_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tools.demo", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_it_draws_what_it_is_asked_to():
    """Of 24 real images, a drawn one's own is among the nearest three almost always (by chance, 3 of 24).

    The figures that count are those of `python -m tools.demo check`.
    """
    chosen, real = load_pixels(open_data("demo").sample(24, 0), 64, {})
    judge = Judge()
    drawn = generate(load_pipeline("demo"), [example.caption for example in chosen], steps=15)
    order = cosine_similarity(judge.features(drawn), judge.features(torch.stack(real))).argsort(1, descending=True)
    found = sum(row in nearest for row, nearest in enumerate(order[:, :3].tolist()))
    assert found >= 20


def test_normalised_latents_have_unit_scale_and_the_same_reconstructions():
    vae = make_vae().eval()
    images = load_images([images_folder() / pair.file_name for pair in seen_pairs()[:24]], 64)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        normalise_latents(vae, images)
        latents = vae.encode(images).latent_dist
        after = vae.decode(latents.mean).sample
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(latents.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_the_tokenizer_knows_its_words_and_splits_others():
    tokenizer = make_tokenizer([pair.caption for pair in all_pairs()])
    assert tokenizer.tokenize("Octopus, noto") == ["octopus</w>", ",</w>", "noto</w>"]
    assert max(len(tokenizer(pair.caption).input_ids) for pair in all_pairs()) <= tokenizer.model_max_length
    unknown = tokenizer("zzyx éß 日本").input_ids
    assert tokenizer.unk_token_id not in unknown[1:-1]


def test_the_recipe_starts_from_the_same_weights_each_time():
    for name, tensor in make_unet().state_dict().items():
        assert torch.equal(tensor, make_unet().state_dict()[name]), name
        break
    assert sum(p.numel() for p in make_unet().parameters()) / 1e6 == pytest.approx(17.6, abs=0.1)


def test_captions_take_their_style_from_another_or_from_none():
    concepts, styles = "aabbcd", ["noto", "twemoji", "noto", "twemoji", "noto", "noto"]
    pairs = [Pair(concept, style) for concept, style in zip(concepts, styles, strict=True)]
    lengths = torch.tensor([1, 1, 1, 2, 2, 1])
    empty = 6
    embeddings = torch.arange(7.0)[:, None, None].expand(7, 5, 3)  # each caption's tokens hold its number
    swap = StyleSwap(embeddings, lengths, pairs)
    chosen = torch.arange(6).repeat(100)
    drawn = swap(chosen, step=3)[:, :, 0].long()
    behind = torch.arange(5) > lengths[chosen][:, None]
    assert (drawn == chosen[:, None])[~behind].all()  # the opening token and the concept's
    source = drawn[:, -1]
    assert all((row[mask] == number).all() for row, mask, number in zip(drawn, behind, source, strict=True))
    named = source != empty
    for a, b in zip(chosen[named].tolist(), source[named].tolist(), strict=True):
        assert styles[a] == styles[b] and lengths[a] == lengths[b]
    assert not named[chosen >= 4].any()  # seen in one style only
    assert 0.8 < named[chosen < 4].float().mean() < 0.9
    assert {0, 2} == set(source[named & (chosen == 0)].tolist()) - {5}
    assert torch.equal(swap(chosen, step=3), swap(chosen, step=3))
    assert not torch.equal(swap(chosen, step=3), swap(chosen, step=4))
