"""Images for a benchmark that scores them by its own program: GenEval and DPG-Bench."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffusers import DiffusionPipeline

from asdm import checks
from asdm.choices import ImageLayout
from asdm.evaluation.image_folders import folder_names
from asdm.evaluation.protocol.image_job import ImageJob
from asdm.evaluation.protocol.pictures import pictures_of
from asdm.evaluation.protocol.settings import launch_state, settings_of
from asdm.evaluation.sampling import common_guidance, sampling_of
from asdm.files import folder_lock

Progress = Callable[[str, int, int], None]


@checks.arguments(
    pipelines=checks.named(checks.PIPELINE),
    layout=checks.literal(ImageLayout),
    prompts=checks.path,
    folder=checks.path,
    limit=checks.whole(1, 10**6),
    steps=checks.STEPS,
    guidance_scale=checks.GUIDANCE,
    size=checks.whole(8, 8192),
    seed=checks.SEED,
    batch_size=checks.whole(1, 10**4),
    progress=checks.function,
)
def generate_for_scorer(
    pipelines: dict[str, DiffusionPipeline],
    layout: ImageLayout,
    prompts: str | Path,
    folder: str | Path,
    *,
    limit: int | None = None,
    steps: int = 25,
    guidance_scale: float | None = None,
    size: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Generate the images of GenEval or DPG-Bench, in folders that the benchmark's own scorer reads.

    The processes of a launch share the work, and a second call resumes it. Four images of each prompt are generated, as
    both benchmarks have it.

    Args:
        layout: "geneval" for `00000/samples/0000.png` with `00000/metadata.jsonl`, "dpg" for a grid `ID.png` of each
            prompt.
        prompts: the benchmark's file of prompts (`evaluation_metadata.jsonl`; `dpg_bench.csv` or the folder of texts).
        limit: the first prompts alone.
        guidance_scale: of all but few-step pipelines; by default that of the first of them.

    Returns:
        The folder of each pipeline, to give to the scorer.

    Raises:
        AsdmError: the prompts cannot be read, the folder holds images of other settings, or an argument is out of
            range.
    """
    first, place = next(iter(pipelines.values())), Path(folder)
    state = launch_state(first)
    guidance = common_guidance(pipelines.values(), guidance_scale)
    settings = {
        name: settings_of(pipeline, sampling_of(pipeline, steps, guidance), size, seed)
        for name, pipeline in pipelines.items()
    }
    job = ImageJob(place, pictures_of(layout, Path(prompts)), state)
    names = folder_names(list(pipelines))
    place.mkdir(parents=True, exist_ok=True)
    with folder_lock(place):
        job.claim({names[name]: (pipeline, settings[name]) for name, pipeline in pipelines.items()})
        for name, pipeline in pipelines.items():
            report = None if progress is None else partial(progress, f"images: {name}")
            job.generate(names[name], pipeline, settings[name], limit=limit, batch_size=batch_size, progress=report)
    return [place / names[name] for name in pipelines]
