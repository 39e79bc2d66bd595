"""What `python -m tools.demo` does: render the images, train the parts, check the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from asdm_demo import images_folder, pipeline_folder
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.data.examples import Example, load_pixels
from asdm.diffusion.conditioning import decode_latents, encode_images
from asdm.diffusion.generation import default_guidance, default_steps, generate
from asdm.distillation.decoder import distill_decoder
from asdm.distillation.decoder_recipe import DecoderRecipe
from asdm.errors import AsdmError
from asdm.evaluation.decoders import DecodedSet, compare_decoder, held_out_set
from asdm.evaluation.image_folders import save_images
from asdm.evaluation.metrics import Judge, nearest_of, psnr
from asdm.evaluation.plots import image_sheet
from asdm.evaluation.real_images import RealImages, image_embeds
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.files import write_text
from asdm.images import to_images
from asdm.pipelines.clip import load_clip
from asdm.pipelines.decoders import save_decoder
from asdm.pipelines.loading import load_pipeline
from asdm.training.log import read_log
from tools.demo.emoji import IMAGE_SIZE, render_dataset
from tools.demo.recipe import LOOPS, Recipe

STAGES = ("images", "tokenizer", "clip", "vae", "unet", "assemble", "decoder", "check")
DECODER = DecoderRecipe(width=32, blocks=[8, 1, 0], steps=5000)  # below 1 MB, its encoder included
SAMPLED = 64  # captions of each split, from which the decoder is checked on latents that the pipeline samples
CHECKED, SHOWN = 200, 24  # images of each split, of which the sheet shows so many
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
    sampled = call(
        [caption for each in evaluation_sets(images_folder(), None, SAMPLED, 0) for caption in each.prompts],
        num_inference_steps=25,
        guidance_scale=default_guidance(pipeline),
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return {"held_out_images": held_out, "sampled": DecodedSet(sampled, gallery=held_out.gallery)}


def check(folder: Path, say: Callable[[str], None], progress: Report | None = None) -> dict[str, Any]:
    """Measure how good the built pipeline is, by a judge that nothing was trained on.

    Writes `check.json`, `samples.png` (samples of seen, held-out and open pairs, the real image under each) and
    `log.jsonl` (every tenth step of each training).
    """
    pipeline = load_pipeline(folder / "pipeline")
    sets = evaluation_sets(images_folder(), None, CHECKED, 0)
    checker = Checker(pipeline, sets)
    found: dict[str, Any] = {"steps": default_steps(pipeline), "guidance_scale": default_guidance(pipeline)}
    shown: list[tuple[Example, Tensor]] = []
    for each in sets:
        images = generate(pipeline, each.prompts, progress=_counting(progress, each.split))
        found[each.split] = {
            "samples": checker.metrics(images, each.examples),
            "real_images": checker.of_real_images(each.examples),
        }
        shown += list(zip(each.examples, images, strict=True))[:SHOWN]
        save_images(images, folder / "images" / each.split)
    write_text(folder / "check.json", json.dumps(found, indent=1) + "\n")
    write_sheet(shown, folder / "samples.png")
    write_log(folder)
    say(json.dumps(found, indent=1))
    return found


class Checker:
    """Compare images of pairs with all real images, by the judge and by the pipeline's own CLIPModel."""

    def __init__(self, pipeline: DiffusionPipeline, sets: list[EvaluationSet]):
        clip, self.judge = load_clip(pipeline), Judge()
        real = RealImages.of(images_folder(), sets, self.judge, pipeline, clip)
        assert clip is not None and real is not None
        self.pipeline, self.clip, self.real = pipeline, clip, real

    def metrics(self, images: Tensor, examples: list[Example]) -> dict[str, float]:
        """Return the metrics of images (images, 3, height, width), each to show one of `examples`."""
        features = self.judge.features(images)
        found = self.real.metrics(images, features, examples) | self.real.target_metrics(features, examples)
        return {"images": len(images), **found}

    @torch.no_grad()
    def of_real_images(self, examples: list[Example]) -> dict[str, Any]:
        """Return the metrics of real images: after the VAE, and what the CLIPModel retrieves for them."""
        _, pixels = load_pixels(examples, IMAGE_SIZE, {})
        images = torch.stack(pixels)
        rebuilt = decode_latents(self.pipeline, encode_images(self.pipeline.vae, images)).clamp(-1, 1)
        return {
            "after_vae": {"psnr_db": float(psnr(rebuilt, images).mean()), **self.metrics(rebuilt, examples)},
            "clip": self._retrieval(images, examples),
        }

    def _retrieval(self, images: Tensor, examples: list[Example]) -> dict[str, float]:
        """Return how often the nearest of all captions is right, and how often in its concept and in its style."""
        found = nearest_of(image_embeds(self.clip, images), self.real.text_embeds)
        nearest = [self.real.examples[row] for row in found]

        def part(of: Callable[[Example], Any]) -> float:
            return sum(of(one) == of(other) for one, other in zip(nearest, examples, strict=True)) / len(examples)

        return {
            "retrieval_at_1": part(lambda each: each.caption),
            "concept": part(lambda each: each.concept),
            "style": part(lambda each: each.style),
        }


def write_sheet(shown: list[tuple[Example, Tensor]], path: Path) -> None:
    """Draw generated images, each over the real one."""
    examples = [example for example, _ in shown]
    _, real = load_pixels(examples, IMAGE_SIZE, {})
    rows = [to_images(torch.stack(images)) for images in ([image for _, image in shown], real)]
    image_sheet([example.caption for example in examples], rows, side=96, across=12).save(path)


def write_log(folder: Path) -> None:
    """Gather every tenth step of the trained stages' logs in `log.jsonl`."""
    rows = [
        {"stage": stage} | row
        for stage in LOOPS
        for row in read_log(folder / stage / "log.jsonl")
        if row["step"] % 10 == 0
    ]
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _reporting(progress: Report) -> Callable[[str, dict[str, float]], None]:
    def report(name: str, row: dict[str, float]) -> None:
        progress(
            name,
            int(row["step"]),
            int(row["steps"]),
            f"loss {row['loss']:.4f}, {row['seconds']:.2f} s a step",
        )

    return report


def _counting(progress: Report | None, title: str) -> Callable[[int, int], None] | None:
    return None if progress is None else (lambda done, total: progress(title, done, total, ""))
