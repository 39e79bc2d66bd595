"""The command behind `asdm demo-build`: render the images, train the stages, check what came out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from asdm_demo import images_folder, pipeline_folder
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from asdm.diffusion.conditioning import decode_latents, encode_images
from asdm.diffusion.generation import default_guidance, default_steps, generate
from asdm.distillation.decoder import distill_decoder
from asdm.distillation.decoder_recipe import DecoderRecipe
from asdm.errors import AsdmError
from asdm.evaluation.decoders import DecodedSet, compare_decoder, held_out_set
from asdm.evaluation.image_folders import save_images
from asdm.evaluation.metrics import (
    Judge,
    cosine_similarity,
    feature_distance,
    kid,
    psnr,
    recognition,
    retrieval_at_1,
)
from asdm.evaluation.plots import image_sheet
from asdm.evaluation.real_images import image_embeds, text_embeds
from asdm.files import write_text
from asdm.images import load_images, to_images
from asdm.pipelines.clip import load_clip
from asdm.pipelines.decoders import save_decoder
from asdm.pipelines.loading import load_pipeline
from asdm.training.log import read_log
from tools.demo.emoji import IMAGE_SIZE, Pair, all_pairs, held_out_pairs, render_dataset, seen_pairs
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
    icons: Path | None,
    progress: Report,
    say: Callable[[str], None],
) -> None:
    """Run one stage of the recipe, or all but `images`, in `folder`.

    Raises:
        AsdmError: no such stage, or `images` without its source.
    """
    if stage not in (*STAGES, "all"):
        raise AsdmError(f"{stage}: no such stage; allowed: {', '.join(STAGES)}, all")
    if stage == "images":
        if icons is None:
            raise AsdmError("images: needs --icons; docs/demo.md says where to get the packages")
        say(f"{render_dataset(icons, images_folder())} images in {images_folder()}")
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
    """How good the built pipeline is, by a judge that nothing was trained on.

    Writes `check.json`, `samples.png` (72 samples of seen, determined and open pairs, the real image under each) and
    `log.jsonl` (every tenth step of each stage).
    """
    pipeline = load_pipeline(folder / "pipeline")
    gallery = Gallery(pipeline)
    figures: dict[str, Any] = {"real_images": gallery.real_figures(), "steps": default_steps(pipeline)}
    figures["guidance_scale"] = default_guidance(pipeline)
    drawn: list[tuple[Pair, Tensor]] = []
    for name, pairs in sets_of_pairs().items():
        images = generate(pipeline, [pair.caption for pair in pairs], progress=_counting(progress, name))
        figures[name] = gallery.figures(images, pairs)
        drawn += list(zip(pairs, images, strict=True))[:: max(1, len(pairs) // 24)][:24]
        save_images(images, folder / "images" / name)
    write_text(folder / "check.json", json.dumps(figures, indent=1) + "\n")
    write_sheet(drawn, folder / "samples.png")
    write_log(folder)
    say(json.dumps(figures, indent=1))
    return figures


def sets_of_pairs(seen: int = 128) -> dict[str, list[Pair]]:
    """What a pipeline is asked to draw: some seen pairs, and all held-out ones by their kind."""
    return {
        "seen": random.Random(0).sample(seen_pairs(), seen),
        "determined": held_out_pairs("determined"),
        "open": held_out_pairs("open"),
    }


class Gallery:
    """All real images, as the judge and the pipeline's own CLIPModel see them."""

    @torch.no_grad()
    def __init__(self, pipeline: DiffusionPipeline):
        clip = load_clip(pipeline)
        assert clip is not None
        self.pipeline, self.clip, self.judge = pipeline, clip, Judge()
        self.pairs = all_pairs()
        self.images = load_images([images_folder() / pair.file_name for pair in self.pairs], IMAGE_SIZE)
        self.features = self.judge.features(self.images)
        self.captions = text_embeds(clip, pipeline, [pair.caption for pair in self.pairs])

    def rows(self, pairs: list[Pair]) -> list[int]:
        where = {pair: row for row, pair in enumerate(self.pairs)}
        return [where[pair] for pair in pairs]

    def figures(self, images: Tensor, pairs: list[Pair]) -> dict[str, float]:
        """What the images of `pairs` show, in parts of all: `exact` where the nearest of all real images is the pair's
        own, and `distance` to that one (1 - cosine of the judge's features)."""
        features = self.judge.features(images)
        rows = self.rows(pairs)
        named = recognition(features, _labels(pairs), self.features, _labels(self.pairs))
        nearest = cosine_similarity(features, self.features).argmax(dim=1)
        deviation = kid(features, self.features[rows])
        return {
            "images": len(images),
            "exact": float((nearest == torch.tensor(rows)).float().mean()),
            "distance": feature_distance(features, self.features[rows]),
            "concept_top1": named.concept_top1,
            "concept_top5": named.concept_top5,
            "style": named.style,
            "kid": deviation[0],
            "retrieval_at_1": retrieval_at_1(image_embeds(self.clip, images), self.captions, rows),
        }

    @torch.no_grad()
    def real_figures(self) -> dict[str, Any]:
        """What the figures are for real images: after the VAE, and of the CLIPModel."""
        figures: dict[str, Any] = {}
        for name, pairs in (sets_of_pairs(512)).items():
            real = self.images[self.rows(pairs)]
            latents = encode_images(self.pipeline.vae, real)
            rebuilt = decode_latents(self.pipeline, latents).clamp(-1, 1)
            after = self.figures(rebuilt, pairs)
            figures[name] = {
                "psnr_db": float(psnr(rebuilt, real).mean()),
                **{f"{key}_after_vae": after[key] for key in ("exact", "distance", "concept_top5", "style")},
                **self._retrieval(real, pairs),
            }
        return figures

    def _retrieval(self, images: Tensor, pairs: list[Pair]) -> dict[str, float]:
        """The nearest of all captions by the CLIPModel: how often it is right, in its concept and in its style."""
        found = cosine_similarity(image_embeds(self.clip, images), self.captions).argmax(dim=1).tolist()
        nearest = [self.pairs[row] for row in found]

        def part(right: Callable[[Pair, Pair], bool]) -> float:
            return sum(right(*both) for both in zip(nearest, pairs, strict=True)) / len(pairs)

        return {
            "retrieval_at_1": part(lambda one, other: one == other),
            "retrieval_of_concept": part(lambda one, other: one.concept == other.concept),
            "retrieval_of_style": part(lambda one, other: one.style == other.style),
        }


def write_sheet(drawn: list[tuple[Pair, Tensor]], path: Path) -> None:
    """Draw images of pairs, each over the real one."""
    pairs = [pair for pair, _ in drawn]
    real = [Image.open(images_folder() / pair.file_name).convert("RGB") for pair in pairs]
    images = to_images(torch.stack([image for _, image in drawn]))
    image_sheet([pair.caption for pair in pairs], [images, real], side=96, across=12).save(path)


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


def _labels(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.concept, pair.style) for pair in pairs]


def _counting(progress: Report | None, title: str) -> Callable[[int, int], None] | None:
    return None if progress is None else (lambda done, total: progress(title, done, total, ""))
