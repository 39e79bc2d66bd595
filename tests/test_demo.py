"""The embedded pipeline: stock classes, a fixed hold-out, a recipe whose parts do what they say."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from asdm_demo import images_folder, pipeline_folder
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from asdm import generate, load_pipeline
from asdm.data.examples import load_pixels
from asdm.data.sources import open_data
from asdm.diffusion.conditioning import encode_images
from asdm.errors import AsdmError
from asdm.evaluation.decoders import DecodedSet, compare_decoder
from asdm.evaluation.metrics import Judge, cosine_similarity
from asdm.evaluation.sampling import evaluation_sets
from asdm.families.unet_structure import removable_units
from asdm.images import load_images
from asdm.pipelines.decoders import load_decoder
from asdm.training.loop import LoopSettings
from tools.demo import build, recipe
from tools.demo.__main__ import main
from tools.demo.emoji import (
    ONE_DESIGN,
    STYLES,
    Icons,
    Pair,
    all_pairs,
    held_out_kinds,
    held_out_pairs,
    seen_pairs,
)
from tools.demo.limit import Translator
from tools.demo.recipe import (
    RENDERING,
    TEXT_WIDTH,
    StyleSwap,
    TwoCaptions,
    make_clip,
    make_tokenizer,
    make_unet,
    make_vae,
    normalise_latents,
    take_over,
)
from tools.demo.tasks import ImageTowerTask, augmented, collages, inked, read_two_captions


def test_a_tenth_of_the_pairs_is_held_out_and_never_two_of_a_concept():
    held_out = held_out_pairs()
    assert len(all_pairs()) == len(STYLES) * len({pair.concept for pair in all_pairs()}) >= 2500
    assert len(held_out) == round(0.1 * len(all_pairs()))
    assert len({pair.concept for pair in held_out}) == len(held_out)
    assert set(held_out) <= set(all_pairs())
    assert not set(held_out) & set(seen_pairs())
    assert len(held_out) + len(seen_pairs()) == len(all_pairs())


def test_what_is_determined_has_its_design_seen_twice():
    determined, held_out = held_out_pairs("determined"), held_out_kinds()
    assert {pair.style for pair in determined} == set(ONE_DESIGN)
    assert {pair.style for pair in held_out_pairs("open")} == set(STYLES) - set(ONE_DESIGN)
    assert len(determined) > 2 * len(held_out_pairs("open"))
    for pair in determined:
        assert [style for style in ONE_DESIGN if Pair(pair.concept, style) in held_out] == [pair.style]
    count = Counter(pair.style for pair in determined)
    assert max(count.values()) - min(count.values()) <= 1


def test_metadata_says_what_is_held_out_and_how():
    rows = [json.loads(line) for line in (images_folder() / "metadata.jsonl").read_text().splitlines()]
    kinds = {row["text"]: row["held_out_kind"] or "determined" for row in rows if row["held_out"]}
    assert kinds == {pair.caption: kind for pair, kind in held_out_kinds().items()}
    assert {row["style"] for row in rows if row["design"] == row["concept"]} == set(ONE_DESIGN)
    assert not any(row["held_out_kind"] for row in rows if not row["held_out"])


def test_icons_are_read_from_iconifys_format(tmp_path):
    square = '<path fill="currentColor" d="M4 4h8v8H4z"/>'
    content = {"width": 16, "height": 16, "icons": {"box": {"body": square}}, "aliases": {"case": {"parent": "box"}}}
    (tmp_path / "icons.json").write_text(json.dumps(content))
    icons = Icons(tmp_path)
    assert 'viewBox="0 0 16 16"' in icons.svg("case") and square in icons.svg("case")
    with pytest.raises(AsdmError, match="no icon tin"):
        icons.svg("tin")
    pytest.importorskip("resvg_py")
    drawing = icons.drawing("box")
    assert drawing.size == (256, 256)
    assert drawing.getpixel((128, 128)) == (0x22, 0x22, 0x22, 255) and drawing.getpixel((10, 10))[3] == 0


def test_images_are_all_there_and_training_data_excludes_the_held_out():
    rows = [json.loads(line) for line in (images_folder() / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [pair.caption for pair in all_pairs()]
    data = open_data("demo")
    assert {example.caption for example in data.examples} == {pair.caption for pair in seen_pairs()}
    assert data.skipped == {}
    with data.examples[0].image() as image:
        assert image.size == (64, 64)


def test_the_embedded_decoder_draws_what_the_vae_does():
    pipeline = load_pipeline("demo")
    _, pixels = load_pixels(open_data("demo", "held_out").examples[:16], 64, {})
    real = torch.stack(pixels)
    held_out = DecodedSet(encode_images(pipeline.vae, real), real)
    found = compare_decoder(pipeline, load_decoder("demo", pipeline), held_out, rounds=2)
    assert found.parameters < found.vae_parameters / 5
    assert found.psnr > 30 and found.real_psnr > 27 and found.speedup > 1.5


def test_assets_stay_under_75_megabytes():
    total = sum(path.stat().st_size for path in pipeline_folder().parent.rglob("*") if path.is_file())
    assert total < 75e6


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


def test_the_check_knows_each_real_image_as_its_own(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (images_folder() / "metadata.jsonl").read_text().splitlines()][:15]
    for row in rows:
        (tmp_path / row["file_name"]).parent.mkdir(exist_ok=True)
        shutil.copy(images_folder() / row["file_name"], tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(build, "images_folder", lambda: tmp_path)
    (seen, *_) = sets = evaluation_sets(tmp_path, None, 8, 0)
    checker = build.Checker(load_pipeline("demo"), sets)
    images = load_images([example.file for example in seen.examples], 64)

    exact = checker.metrics(images, seen.examples)
    assert exact["exact_pair"] == exact["style"] == exact["concept_top1"] == 1 and exact["target_distance"] < 1e-5
    assert checker.metrics(images.roll(1, 0), seen.examples)["exact_pair"] == 0
    real = checker.of_real_images(seen.examples)
    assert 20 < real["after_vae"]["psnr_db"] < 60
    assert 0 <= real["clip"]["retrieval_at_1"] <= min(real["clip"]["concept"], real["clip"]["style"])
    build.write_sheet(list(zip(seen.examples, images, strict=True)), tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 8 * 64


def test_a_design_is_translated_from_its_two_other_drawings():
    net = Translator()
    others, again = torch.rand(2, 6, 64, 64), torch.rand(2, 6, 64, 64)
    drawn = net(others, 0)
    assert drawn.shape == (2, 3, 64, 64) and drawn.abs().max() <= 1
    assert not torch.equal(drawn, net(others, 1)) and not torch.equal(drawn, net(again, 0))


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
    again = make_tokenizer([pair.caption for pair in all_pairs()])
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()  # ties are ordered in one way


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
    assert 0.9 < named.float().mean() < 0.99
    assert {0, 2, 5} == set(source[named & (chosen == 0)].tolist())
    assert torch.equal(swap(chosen, step=3), swap(chosen, step=3))
    assert not torch.equal(swap(chosen, step=3), swap(chosen, step=4))


def test_no_block_can_tell_which_variant_of_a_design_is_drawn():
    pairs = [Pair("owl", style) for style in ("noto", "flat", "line")] + [Pair("egg", style) for style in STYLES]
    calls = []

    def swap(chosen, step):
        calls.append((chosen.tolist(), step))
        return torch.zeros(len(chosen), 4, 2)

    chosen = torch.arange(len(pairs)).repeat(200)
    captions = TwoCaptions(swap, pairs)
    captions(chosen, 5)
    (design, one), (rendering, other) = calls
    assert one != other
    told = list(zip((pairs[i] for i in chosen.tolist()), (pairs[i] for i in design), strict=True))
    assert all(pair.concept == read.concept for pair, read in told)
    styles = {pair: {read.style for own, read in told if own == pair} for pair in pairs}
    assert styles[Pair("owl", "line")] == {"flat", "line"}  # of an owl in gradient nothing is said
    assert styles[Pair("egg", "flat")] == set(ONE_DESIGN) and styles[Pair("egg", "noto")] == {"noto"}
    assert all(pairs[i].style == pairs[j].style for i, j in zip(chosen.tolist(), rendering, strict=True))
    assert {pairs[j].concept for i, j in zip(chosen.tolist(), rendering, strict=True) if i == 2} == {"owl", "egg"}
    captions(chosen, 5)
    assert calls[2:] == calls[:2]


def test_the_rendering_blocks_alone_read_the_second_captions():
    unet = make_unet().eval()
    latents, time = torch.randn(1, 4, 16, 16), torch.tensor([500])
    design, rendering = torch.randn(2, 1, 16, TEXT_WIDTH)
    expected = unet(latents, time, encoder_hidden_states=design).sample
    read_two_captions(unet, RENDERING)
    seen = {}
    for name in ("mid_block", "up_blocks.1", "up_blocks.2", "up_blocks.3"):
        block = unet.get_submodule(name)
        block.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out))
    two = [torch.cat([design, other], dim=1) for other in (design, rendering)]
    both = [unet(latents, time, encoder_hidden_states=states).sample for states in two]
    torch.testing.assert_close(both[0], expected, atol=1e-5, rtol=1e-4)
    for name, (first, second) in seen.items():
        assert torch.equal(first, second) == (name not in ("up_blocks.2", "up_blocks.3")), name


def test_a_step_is_reported_under_its_stages_name_whatever_its_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "seen_pairs", lambda: seen_pairs()[:16])
    for name in recipe.LOOPS:
        monkeypatch.setitem(recipe.LOOPS, name, LoopSettings(steps=1))
    reported = []
    options = {"minutes": None, "warm_start": False, "icons": None, "say": print}
    build.build("vae", tmp_path, progress=lambda *row: reported.append(row[:3]), **options)
    assert reported == [("vae", 1, 1)]


def test_augmented_images_are_images_and_their_own():
    images = load_images([images_folder() / pair.file_name for pair in seen_pairs()[:16]], 64)
    once, again = (augmented(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(once, again) and once.shape == images.shape
    assert once.min() >= -1 and once.max() <= 1
    assert (once - images).abs().flatten(1).mean(1).min() > 0.01


def test_collages_are_made_of_one_style_and_keep_places():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 8, 8).clone()
    images[:, 1] = torch.arange(64.0).view(8, 8)
    styles = torch.tensor([0, 1, 0, 1, 0, 1])
    made = collages(images, styles, torch.Generator().manual_seed(0))
    assert torch.equal(made[:, 1], images[:, 1])
    assert torch.equal(made[:, 0] % 2, styles.float().view(6, 1, 1).expand(6, 8, 8))
    assert all(len(image[0].unique()) > 1 for image in made)


def test_inked_images_are_black_on_white():
    images = load_images([images_folder() / pair.file_name for pair in seen_pairs()[:16]], 64)
    drawn = inked(images, torch.Generator().manual_seed(0))
    assert drawn.shape == images.shape and torch.equal(drawn[:, 0], drawn[:, 1])
    assert drawn.min() >= -1 and drawn.max() <= 1
    assert (drawn.abs() > 0.5).float().mean() > 0.8


def test_an_image_tower_trains_beside_a_frozen_text_tower():
    tokenizer = make_tokenizer([pair.caption for pair in all_pairs()])
    clip = make_clip(tokenizer)
    captions, names = torch.randn(8, 256), torch.randn(4, 256)
    task = ImageTowerTask(clip, captions, names, torch.arange(8) % 2)
    images = torch.rand(8, 3, 64, 64) * 2 - 1
    batch = {"images": images, "others": images.flip(0), "captions": torch.arange(8), "concepts": torch.arange(8) // 2}
    losses = task(batch, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    assert set(losses) == {"loss", "by_caption", "by_style", "by_concept"}
    assert not any(name.startswith("clip.text_model.") for name in task.trained())
    assert all(p.grad is not None for p in task.trained().values())


def test_words_that_two_tokenizers_know_keep_their_embeddings_and_none_is_anothers_twin(tmp_path):
    captions = [pair.caption for pair in all_pairs() if pair.style == "line"]
    first, second = make_tokenizer(captions[:300]), make_tokenizer(captions[200:500])  # of about the same size
    earlier, clip = make_clip(first), make_clip(second)
    earlier.save_pretrained(tmp_path / "clip")
    first.save_pretrained(tmp_path / "tokenizer")
    take_over(clip, second, tmp_path)
    words, earlier_words = (each.text_model.embeddings.token_embedding.weight for each in (clip, earlier))

    assert torch.equal(words[second.get_vocab()["line</w>"]], earlier_words[first.get_vocab()["line</w>"]])
    assert torch.equal(clip.visual_projection.weight, earlier.visual_projection.weight)
    likeness = torch.nn.functional.normalize(words, dim=1) @ torch.nn.functional.normalize(words, dim=1).T
    assert likeness.fill_diagonal_(0).max() < 0.5
