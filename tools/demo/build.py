"""Render the images, train the stages, check what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from asdm.data.examples import Example, load_pixels
from asdm.data.sources import open_data
from asdm.demo import images_folder, pipeline_folder
from asdm.diffusion.conditioning import decode_latents, encode_images
from asdm.diffusion.generation import default_guidance
from asdm.distillation.decoder import distill_decoder
from asdm.distillation.decoder_recipe import DecoderRecipe
from asdm.errors import AsdmError
from asdm.evaluation.comparison import evaluate
from asdm.evaluation.decoders import DecodedSet, compare_decoder, held_out_set
from asdm.evaluation.metrics import Judge, psnr, recognition, retrieval_at_1
from asdm.evaluation.plots import image_sheet
from asdm.evaluation.real_images import image_embeds, text_embeds
from asdm.evaluation.sampling import evaluation_sets
from asdm.files import write_text
from asdm.images import load_images
from asdm.pipelines.clip import load_clip
from asdm.pipelines.decoders import save_decoder
from asdm.pipelines.loading import load_pipeline
from asdm.training.log import read_log
from tools.demo.emoji import held_out_pairs, render_dataset, seen_pairs
from tools.demo.recipe import LOOPS, Recipe

STAGES = ("images", "tokenizer", "clip", "vae", "unet", "assemble", "decoder", "check")
DECODER = DecoderRecipe(width=32, blocks=[6, 4, 0], steps=3000)  # below 1 MB, its encoder included
SAMPLED = 64  # captions of either split, from which the decoder is checked on latents that the pipeline samples
Report = Callable[[str, int, int, str], None]


def build(
    stage: str,
    folder: Path,
    *,
    minutes: float | None,
    warm_start: bool,
    noto_font: Path | None,
    twemoji_folder: Path | None,
    progress: Report,
    say: Callable[[str], None],
) -> None:
    """Run one stage of the recipe, or all but `images`, in `folder`.

    Raises:
        AsdmError: no such stage, or `images` without its sources.
    """
    if stage not in (*STAGES, "all"):
        raise AsdmError(f"{stage}: no such stage; allowed: {', '.join(STAGES)}, all")
    if stage == "images":
        if noto_font is None or twemoji_folder is None:
            raise AsdmError("images: needs --noto-font and --twemoji; see docs/demo.md for where to get them")
        say(f"{render_dataset(noto_font, twemoji_folder, images_folder())} images in {images_folder()}")
        return
    recipe = Recipe(images_folder(), folder, _reporting(progress), pipeline_folder() if warm_start else None)
    for name in STAGES[1:] if stage == "all" else [stage]:
        if name == "check":
            check(folder, say, progress)
        elif name == "decoder":
            if not train_decoder(folder, minutes, progress, say):
                say(f"{name}: stopped after {minutes:g} minutes; run again to go on")
                return
        elif not recipe.build(name, None if minutes is None else 60 * minutes):
            say(f"{name}: stopped after {minutes:g} minutes; run again to go on")
            return


def train_decoder(folder: Path, minutes: float | None, progress: Report, say: Callable[[str], None]) -> bool:
    """Train a tiny decoder beside the built pipeline's VAE, or the embedded one's; return whether it is done.

    Writes the folder `decoder` and `decoder_check.json`: how it compares on held-out images, and on latents that the
    pipeline samples.
    """
    built = folder / "pipeline"
    pipeline = load_pipeline(built if built.is_dir() else pipeline_folder())
    made = distill_decoder(
        pipeline,
        images_folder(),
        folder / "decoder.training",
        recipe=DECODER,
        minutes=minutes,
        progress=lambda row: progress("decoder", int(row["step"]), int(row["steps"]), f"pixels {row['pixels']:.4f}"),
    )
    if not made.is_done:
        return False
    save_decoder(made.decoder, folder / "decoder", {"teacher": "demo", "recipe": DECODER.model_dump(mode="json")})
    found = {name: compare_decoder(pipeline, made.decoder, each) for name, each in _decoded_sets(pipeline).items()}
    text = json.dumps({name: each.model_dump() for name, each in found.items()}, indent=1)
    write_text(folder / "decoder_check.json", text + "\n")
    say(text)
    return True


def _decoded_sets(pipeline: DiffusionPipeline) -> dict[str, DecodedSet]:
    """Return what a decoder is checked on, by name."""
    held_out = held_out_set(pipeline, images_folder())
    assert held_out is not None
    call: Any = pipeline
    captions = [pair.caption for pairs in (seen_pairs(), held_out_pairs()) for pair in pairs[:SAMPLED]]
    sampled = call(
        captions,
        num_inference_steps=25,
        guidance_scale=default_guidance(pipeline),
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return {"held_out_images": held_out, "sampled": DecodedSet(sampled, gallery=held_out.gallery)}


def check(folder: Path, say: Callable[[str], None], progress: Report | None = None) -> dict[str, Any]:
    """Return how good the built pipeline is, by a judge that nothing was trained on.

    Writes `check.json`, `samples.png` (48 samples, half of them held out, the real image under each) and
    `log.jsonl` (every tenth step of each stage).
    """
    pipeline = load_pipeline(folder / "pipeline")
    evaluation = evaluate(
        {"demo": pipeline},
        data=images_folder(),
        clip=load_clip(pipeline),
        progress=None if progress is None else (lambda title, done, total: progress(title, done, total, "")),
        images_folder=folder / "images",
    )
    figures: dict[str, Any] = {row.split: row.model_dump(exclude={"name", "split"}) for row in evaluation.quality}
    figures["real_images"] = real_image_figures(pipeline)
    figures["steps"], figures["guidance_scale"] = evaluation.steps, evaluation.guidance_scale
    write_text(folder / "check.json", json.dumps(figures, indent=1) + "\n")
    write_sheet(folder)
    write_log(folder)
    say(json.dumps(figures, indent=1))
    return figures


@torch.no_grad()
def real_image_figures(pipeline: DiffusionPipeline) -> dict[str, float]:
    """Return what the figures are for real images: the VAE's PSNR on held-out ones, how well the judge knows them
    again after the VAE, and among all other real images; and the CLIPModel's retrieval on seen and held-out ones."""
    held_out = load_images([images_folder() / pair.file_name for pair in held_out_pairs()], 64)
    latents = encode_images(pipeline.vae, held_out)
    rebuilt = decode_latents(pipeline, latents).clamp(-1, 1)
    examples, pixels = load_pixels(open_data(images_folder(), "all").examples, 64, {})
    labels = [(str(example.concept), str(example.style)) for example in examples]
    judge = Judge()
    features = judge.features(torch.stack(pixels))
    wanted = [(pair.concept, pair.style) for pair in held_out_pairs()]
    known = recognition(judge.features(rebuilt), wanted, features, labels)
    rows = [labels.index(label) for label in wanted]
    others = recognition(features[rows], wanted, features, labels, without=rows)
    clip = load_clip(pipeline)
    assert clip is not None
    captions = text_embeds(clip, pipeline.tokenizer, [example.caption for example in examples])
    images = image_embeds(clip, torch.stack(pixels))
    by_split = {
        split: [i for i, e in enumerate(examples) if e.held_out == (split == "held_out")]
        for split in ("seen", "held_out")
    }
    return {
        "held_out_psnr_db": float(psnr(rebuilt, held_out).mean()),
        "held_out_concept_top1_after_vae": known.concept_top1,
        "held_out_style_after_vae": known.style,
        # What can be asked of a drawing that is not the real image itself.
        "held_out_concept_top5_among_others": others.concept_top5,
        "held_out_style_among_others": others.style,
        **{f"{split}_retrieval_at_1": retrieval_at_1(images[rows], captions, rows) for split, rows in by_split.items()},
    }


def write_sheet(folder: Path) -> None:
    """Draw `samples.png` from the images that `check` made: 24 seen and 24 held-out pairs."""
    from PIL import Image

    captions, drawn, real = [], [], []
    for evaluation_set in evaluation_sets(images_folder(), None, 128, 0):
        examples: list[Example] = evaluation_set.examples
        step = len(examples) // 24
        for index in range(0, 24 * step, step):
            path = folder / "images" / evaluation_set.split / "demo" / f"{index:04d}.png"
            captions.append(examples[index].caption)
            drawn.append(Image.open(path).convert("RGB"))
            real.append(examples[index].image().convert("RGB"))
    image_sheet(captions, [drawn, real], side=96, across=12).save(folder / "samples.png")


def write_log(folder: Path) -> None:
    """Gather every tenth step of the trained stages' logs in `log.jsonl`."""
    rows = [
        {"stage": stage} | row
        for stage in LOOPS
        for row in read_log(folder / stage / "log.jsonl")
        if row["step"] % 10 == 0
    ]
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _reporting(progress: Report) -> Callable[[dict[str, float]], None]:
    def report(row: dict[str, float]) -> None:
        title = next((name for name, loop in LOOPS.items() if loop.steps == row["steps"]), "train")
        progress(
            title,
            int(row["step"]),
            int(row["steps"]),
            f"loss {row['loss']:.4f}, {row['seconds']:.2f} s a step",
        )

    return report
