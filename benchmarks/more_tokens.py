"""What GRI attention loses where tokens are many: the embedded pipeline at 128 pixels, beside ToMe.

    python benchmarks/more_tokens.py train        # latents of 32x32: the embedded UNet trained on, in runs/more-tokens
    python benchmarks/more_tokens.py compare      # GRI and ToMe in the outer self-attentions of 1,024 tokens

`train` trains the UNet on its own task alone, on the embedded images at twice their size. It resumes where it stopped.
`compare` measures each student's UNet call in turns with the others', and its images beside the teacher's at equal
seeds. GRI attention is measured as it is, and after a short distillation. ToMe is used as published, without training.
ToMe comes from its own package: pip install -e '.[benchmark]'.
"""

from __future__ import annotations

import copy
from pathlib import Path

import typer
from common import finish, held_out_set, run
from diffusers import DiffusionPipeline, UNet2DConditionModel
from student import tome, with_gri

import asdm
from asdm.benchmark.techniques import outer_self_attentions
from asdm.distillation.recipes import default_hyperparameters, recipe_stages
from asdm.distillation.stages import LossWeights, Stage
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.real_images import RealImages
from asdm.families import denoiser_call
from asdm.measure.latency import measure_interleaved
from asdm.measure.machine import fast_training

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WORK = Path("runs/more-tokens")
SIDE = 32  # of the latents
BATCH = 8
GRI_KINDS = ((2, 2), (4, 4))  # regions a side, and tokens a side that are pooled
TOME_RATIOS = (0.5, 0.75)


@app.command()
@fast_training()
def train(steps: int = 800) -> None:
    """Train the embedded UNet further at latents of 32x32."""
    pipeline = asdm.load_pipeline("demo")
    pipeline.unet.register_to_config(sample_size=SIDE)
    unet = asdm.build_student(pipeline.unet, asdm.PruningPlan.for_unet(pipeline.unet, []))
    task = Stage(
        name="task",
        losses=LossWeights(task=1.0, output=0.0, feature=0.0),
        relative=False,
        **default_hyperparameters(unet, steps) | {"batch_size": BATCH},
    )
    asdm.distill(pipeline, unet, "demo", WORK / "training", stages=[task])
    asdm.save_pipeline(asdm.with_unet(pipeline, unet), WORK / "teacher")


@app.command()
@fast_training()
def compare(steps: int = 100, samples: int = 32, rounds: int = 20) -> None:
    """GRI attention, untrained and distilled, and ToMe: speed of a UNet call with guidance, distance to the teacher's
    images, exact pairs."""
    pipeline = asdm.load_pipeline(WORK / "teacher")
    models = {"full attention": pipeline.unet, **_students(pipeline, steps)}
    times = measure_interleaved({name: denoiser_call(unet) for name, unet in models.items()}, rounds=rounds)
    judge = Judge()
    held_out = held_out_set(samples)
    real = RealImages.of("demo", [held_out], judge, pipeline, None)
    rows, expected = [], None
    for name, unet in models.items():
        features = judge.features(asdm.generate(asdm.with_unet(pipeline, unet), held_out.prompts))
        expected = features if expected is None else expected
        rows.append(
            {
                "attention": name,
                "ms": times[name].ms,
                "speedup": str(times.speedup("full attention", name)),
                "teacher_distance": feature_distance(features, expected),
                "exact_pair": real.target_metrics(features, held_out.examples)["exact_pair"],
            }
        )
    finish("more_tokens", rows, tokens=SIDE**2, images=samples, distilled_steps=steps)


def _students(pipeline: DiffusionPipeline, steps: int) -> dict[str, UNet2DConditionModel]:
    unet, units = pipeline.unet, outer_self_attentions(pipeline.unet)
    found = {
        f"ToMe, ratio {ratio}": tome().apply_patch(copy.deepcopy(unet), ratio=ratio, max_downsample=1)
        for ratio in TOME_RATIOS
    }
    for regions, pool in GRI_KINDS:
        name = f"GRI, regions {regions}, pool {pool}"
        found[name] = with_gri(unet, units, regions, pool, weighted=True)
        found[f"{name}, distilled"] = student = with_gri(unet, units, regions, pool, weighted=True)
        stages = [stage.model_copy(update={"batch_size": BATCH}) for stage in recipe_stages("joint", student, steps)]
        asdm.distill(pipeline, student, WORK / "training" / "prepared", WORK / f"gri-{regions}-{pool}", stages=stages)
    return found


if __name__ == "__main__":
    run(app)
