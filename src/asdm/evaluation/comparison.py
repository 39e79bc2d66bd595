"""Teacher and students side by side: speed in one run, quality on the same prompts and seeds."""

from __future__ import annotations

import copy
import json
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from pydantic import ConfigDict, ValidationError, model_validator
from torch import Tensor
from transformers import CLIPModel

from asdm import checks
from asdm.data.calibration import DEFAULT_PROMPTS
from asdm.data.examples import Example, can_be_decoded, load_pixels
from asdm.data.sources import open_data
from asdm.diffusion.conditioning import image_size
from asdm.diffusion.generation import default_guidance, default_steps, generate, is_few_step, require_steps
from asdm.errors import AsdmError, one_line
from asdm.evaluation.image_timing import IMAGES, ImageJob, time_images
from asdm.evaluation.metrics import Judge, feature_distance, kid, recognition, retrieval_at_1
from asdm.families.unet_calls import unet_call
from asdm.files import write_text
from asdm.images import to_images
from asdm.measure.latency import Latency, Ratio, measure_interleaved
from asdm.measure.load import LoadMeter, busy_line
from asdm.measure.macs import counting_macs
from asdm.pipelines.clip import clip_statistics
from asdm.pipelines.derived import without_safety_checker
from asdm.records import Record, first_fault

Progress = Callable[[str, int, int], None]
UNET_ROUNDS = 10
_LONGEST_TIMED_PIPELINE_MS = 10_000
_READ_TOGETHER = 64  # images, whose pixels are let go once they are judged


class SpeedFigures(Record):
    """One pipeline's cost; an image takes it `steps`. UNet calls are at batch 2 (one image with guidance), GMACs per
    sample.

    Latencies are those of a machine that does nothing else, and each speed-up is over the first pipeline, with the
    interval that holds the true one. `pipeline_parts_ms`: an image's milliseconds by part. `pipeline_extrapolated`: two
    steps were timed and counted as often as they come, as an image takes too long.
    """

    name: str
    unet_parameters: int
    unet_megabytes: float
    gmacs: float
    gmacs_without_attention: float
    unet: Latency
    unet_speedup: float
    unet_speedup_interval: tuple[float, float]
    pipeline: Latency
    pipeline_speedup: float
    pipeline_speedup_interval: tuple[float, float]
    pipeline_parts_ms: dict[str, float] = {}
    pipeline_extrapolated: bool
    steps: int

    @property
    def unet_ratio(self) -> Ratio:
        """How many times faster a UNet call is than the teacher's."""
        return Ratio(self.unet_speedup, *self.unet_speedup_interval)

    @property
    def pipeline_ratio(self) -> Ratio:
        """How many times faster an image is than the teacher's."""
        return Ratio(self.pipeline_speedup, *self.pipeline_speedup_interval)


class QualityFigures(Record):
    """One pipeline's images on one split; a figure is None where the data cannot tell it.

    `teacher_distance` is 1 - cosine of the judge's features to the first pipeline's image of the same seed.
    """

    name: str
    split: str
    images: int
    teacher_distance: float
    kid: float | None = None
    kid_deviation: float | None = None
    concept_top1: float | None = None
    concept_top5: float | None = None
    style: float | None = None
    retrieval_at_1: float | None = None


class Evaluation(Record):
    """What several pipelines cost and what their images are like, from one run.

    `other_cores`: how many cores other processes kept busy while speed was measured; `contention`: the part of this
    process's cores that they took.
    """

    date: str
    machine: str
    threads: int
    dtype: str
    steps: int
    guidance_scale: float
    seed: int
    other_cores: float = 0.0
    contention: float = 0.0
    speed: list[SpeedFigures]
    quality: list[QualityFigures]

    def speed_of(self, name: str) -> SpeedFigures:
        return next(row for row in self.speed if row.name == name)

    def quality_of(self, name: str, split: str) -> QualityFigures | None:
        return next((row for row in self.quality if (row.name, row.split) == (name, split)), None)

    @property
    def busy_line(self) -> str | None:
        """A sentence where other processes needed the cores too."""
        return busy_line(self.other_cores, self.contention)

    @model_validator(mode="before")
    @classmethod
    def _of_010(cls, content: Any) -> Any:
        """Files of 0.1.0 have medians and quartiles, and no intervals of the ratios."""
        if isinstance(content, dict) and isinstance(content.get("speed"), list):
            content = {**content, "speed": [_upgraded(row, content["speed"][0]) for row in content["speed"]]}
        return content

    def save(self, path: str | Path) -> None:
        write_text(Path(path), json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        try:
            return cls.model_validate_json(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            told = first_fault(error) if isinstance(error, ValidationError) else one_line(error)
            raise AsdmError(f"{path}: not an evaluation ({told}); `asdm evaluate` writes one") from None


def _upgraded(row: Any, first: Any) -> Any:
    """A row of speed figures whose latencies are told as today's."""
    if not (isinstance(row, dict) and isinstance(row.get("unet"), dict) and "median_ms" in row["unet"]):
        return row
    row = dict(row)
    for part in ("unet", "pipeline"):
        names = ("median_ms", "lower_quartile_ms", "upper_quartile_ms", "rounds")
        own, base = (Latency(*(each[part][name] for name in names)) for each in (row, first))
        ratio = Ratio(1.0, 1.0, 1.0) if row["name"] == first["name"] else Ratio.of(base, own)
        row |= {f"{part}_speedup_interval": ratio.interval}
    return row | {
        part: dict(zip(("ms", "low_ms", "high_ms", "rounds"), row[part].values(), strict=True))
        for part in ("unet", "pipeline")
    }


class EvaluationSet(Record):
    """Prompts of one split, and the real images behind them where there are any."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    split: str
    prompts: list[str]
    examples: list[Example]


@checks.arguments(
    pipelines=checks.named(checks.PIPELINE),
    data=checks.path,
    prompts=checks.PROMPTS,
    samples=checks.whole(0, 10**6),
    steps=checks.STEPS,
    guidance_scale=checks.GUIDANCE,
    seed=checks.SEED,
    rounds=checks.ROUNDS,
    quality=checks.flag,
    images_folder=checks.path,
    progress=checks.function,
)
def evaluate(
    pipelines: dict[str, DiffusionPipeline],
    *,
    data: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    samples: int = 128,
    steps: int = 25,
    guidance_scale: float | None = None,
    seed: int = 0,
    rounds: int | None = None,
    quality: bool = True,
    clip: CLIPModel | None = None,
    images_folder: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure speed and quality of several pipelines in one run; the first is the teacher.

    Args:
        data: where prompts and real images come from, as for `open_data`. Its held-out rows are a
            split of their own.
        prompts: used where there is no `data`; without real images only the distance to the teacher's
            images is told.
        samples: at most so many prompts of each split.
        steps: of all but few-step pipelines, which sample as they were made to; so does `guidance_scale`.
        rounds: the least number of timed rounds of the UNet call, 10 by default. Three images follow, by each pipeline
            in turns. On a busy machine more of both follow, until the speed-ups' intervals are narrow.
        quality: False to measure speed alone.
        clip: a CLIPModel for retrieval figures; its tokenizer is the first pipeline's.
        images_folder: where to keep every image as `SPLIT/NAME/0000.png`.

    Raises:
        AsdmError: the data cannot be used, or the judge is not installed.
    """
    first = next(iter(pipelines.values()))
    for pipeline in pipelines.values():
        if not is_few_step(pipeline):
            require_steps(pipeline, steps)
    guidance = default_guidance(first) if guidance_scale is None else guidance_scale
    sets = evaluation_sets(data, prompts, samples, seed) if quality else []
    judged = _judge(pipelines, sets, data, steps, guidance, seed, clip, images_folder, progress) if sets else []
    speed = measure_speed(pipelines, steps=steps, guidance_scale=guidance, rounds=rounds)
    return Evaluation(
        date=date.today().isoformat(),
        machine=f"{platform.machine()}, {first.device}, torch {torch.__version__}",
        threads=torch.get_num_threads(),
        dtype=str(first.unet.dtype).removeprefix("torch."),
        steps=steps,
        guidance_scale=guidance,
        seed=seed,
        other_cores=speed.other_cores,
        contention=speed.contention,
        speed=speed.figures,
        quality=judged,
    )


@dataclass(frozen=True)
class Speed:
    """Each pipeline's figures, and the machine's load while they were measured."""

    figures: list[SpeedFigures]
    other_cores: float
    contention: float


def measure_speed(
    pipelines: dict[str, DiffusionPipeline], *, steps: int, guidance_scale: float, rounds: int | None
) -> Speed:
    """Latency of the UNet call and of a whole image, each in interleaved rounds; parameters; MACs."""
    meter = LoadMeter()
    first, *_ = pipelines
    calls = {name: unet_call(pipeline.unet) for name, pipeline in pipelines.items()}
    unet_times = measure_interleaved(calls, rounds=rounds or UNET_ROUNDS, device=pipelines[first].device)
    slowest = max(unet_times[name].ms for name in pipelines)
    extrapolated = slowest * steps > _LONGEST_TIMED_PIPELINE_MS and steps > 2
    jobs, sampling = {}, {}
    for name, pipeline in pipelines.items():
        how = sampling[name] = _sampling(pipeline, steps, guidance_scale)
        timed = how | {"steps": 2} if extrapolated and not is_few_step(pipeline) else how
        draw = partial(generate, pipeline, ["a photograph"], **timed)
        jobs[name] = ImageJob(pipeline, draw, _unet_calls(pipeline, how["steps"]))
    guided = [name for name in pipelines if sampling[name]["guidance_scale"] > 1]  # as the timed UNet calls are
    ratios = {(first, name): unet_times.speedup(first, name) for name in guided if first in guided}
    images = time_images(jobs, rounds=min(IMAGES, rounds or IMAGES), unet_ratios=ratios)
    meter.mark()
    rows = []
    for name, pipeline in pipelines.items():
        unet = pipeline.unet
        with counting_macs(unet) as count:
            unet_call(unet, batch_size=1)()
        unet_ratio, image_ratio = unet_times.speedup(first, name), images.speedup(first, name)
        rows.append(
            SpeedFigures(
                name=name,
                unet_parameters=sum(p.numel() for p in unet.parameters()),
                unet_megabytes=sum(p.numel() * p.element_size() for p in unet.parameters()) / 1e6,
                gmacs=count.below() / 1e9,
                gmacs_without_attention=count.below(with_attention=False) / 1e9,
                unet=unet_times[name],
                unet_speedup=unet_ratio.value,
                unet_speedup_interval=unet_ratio.interval,
                pipeline=images.latency(name),
                pipeline_speedup=image_ratio.value,
                pipeline_speedup_interval=image_ratio.interval,
                pipeline_parts_ms=images.by_part(name),
                pipeline_extrapolated=extrapolated and not is_few_step(pipeline),
                steps=sampling[name]["steps"],
            )
        )
    return Speed(rows, meter.other_cores(), meter.contention())


def _unet_calls(pipeline: DiffusionPipeline, steps: int) -> int:
    """Second-order schedulers make two in a step."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def _sampling(pipeline: DiffusionPipeline, steps: int, guidance_scale: float) -> dict[str, Any]:
    """How `generate` is called: few-step pipelines sample as they were made to."""
    if is_few_step(pipeline):
        return {"steps": default_steps(pipeline), "guidance_scale": default_guidance(pipeline)}
    return {"steps": steps, "guidance_scale": guidance_scale}


def evaluation_sets(
    data: str | Path | None, prompts: Sequence[str] | None, samples: int, seed: int
) -> list[EvaluationSet]:
    """The fixed prompts of a run: seen and held-out ones of the data, or the prompts given."""
    if data is None:
        chosen = list(prompts or DEFAULT_PROMPTS)[:samples]
        return [EvaluationSet(split="prompts", prompts=chosen, examples=[])]
    sets = []
    for split, name in (("train", "seen"), ("held_out", "held_out")):
        examples = open_data(data, split).examples  # type: ignore[arg-type]
        random.Random(seed).shuffle(examples)
        if examples and examples[0].file is None:  # captions alone
            captions = [example.caption for example in examples[:samples]]
            sets.append(EvaluationSet(split=name, prompts=captions, examples=[]))
            continue
        examples = list(islice(filter(can_be_decoded, examples), samples))
        if examples:
            captions = [example.caption for example in examples]
            sets.append(EvaluationSet(split=name, prompts=captions, examples=examples))
    return sets


def _judge(
    pipelines: dict[str, DiffusionPipeline],
    sets: list[EvaluationSet],
    data: str | Path | None,
    steps: int,
    guidance: float,
    seed: int,
    clip: CLIPModel | None,
    images_folder: Path | None,
    progress: Progress | None,
) -> list[QualityFigures]:
    first = next(iter(pipelines.values()))
    judge = Judge(first.device)
    pool = None if data is None else RealImages.of(data, sets, judge, first, clip)
    rows = []
    folders = folder_names(list(pipelines))
    for evaluation_set in sets:
        teacher_features: Tensor | None = None
        for name, pipeline in pipelines.items():

            def drawn(done: int, total: int, name: str = name, split: str = evaluation_set.split) -> None:
                if progress is not None:
                    progress(f"{name}, {split}", done, total)

            images = generate(
                without_safety_checker(pipeline),
                evaluation_set.prompts,
                **_sampling(pipeline, steps, guidance),
                seed=seed,
                progress=drawn,
            )
            if images_folder is not None:
                save_images(images, Path(images_folder) / evaluation_set.split / folders[name])
            features = judge.features(images)
            teacher_features = features if teacher_features is None else teacher_features
            rows.append(
                QualityFigures(
                    name=name,
                    split=evaluation_set.split,
                    images=len(images),
                    teacher_distance=feature_distance(features, teacher_features),
                    **(pool.figures(images, features, evaluation_set.examples) if pool is not None else {}),
                )
            )
    return rows


class RealImages:
    """Real images, seen and held out: what generated ones are compared with."""

    @classmethod
    def of(
        cls,
        data: str | Path,
        sets: Sequence[EvaluationSet],
        judge: Judge,
        pipeline: DiffusionPipeline,
        clip: CLIPModel | None,
    ) -> RealImages | None:
        """Those of the sets; before them all others at hand where those are looked at, by label or by caption. None of
        captions alone."""
        compared = [example for each in sets for example in each.examples]
        if not compared:
            return None
        others = open_data(data, "all").examples
        if clip is None and not _are_labelled(others):
            others = []
        among = set(compared)
        return cls(judge, pipeline, [*(example for example in others if example not in among), *compared], clip)

    def __init__(self, judge: Judge, pipeline: DiffusionPipeline, examples: list[Example], clip: CLIPModel | None):
        self.examples: list[Example] = []
        features = []
        for start in range(0, len(examples), _READ_TOGETHER):
            some, pixels = load_pixels(examples[start : start + _READ_TOGETHER], image_size(pipeline), {})
            if some:
                self.examples += some
                features.append(judge.features(torch.stack(pixels)))
        self.features = torch.cat(features)
        self.clip = clip
        if clip is not None:
            self.text_embeds = text_embeds(clip, pipeline, [example.caption for example in self.examples])

    def figures(self, images: Tensor, features: Tensor, examples: list[Example]) -> dict[str, Any]:
        row_of = {example: row for row, example in enumerate(self.examples)}
        rows = [row_of[example] for example in examples]
        figures: dict[str, Any] = {}
        if len(images) > 1:
            figures["kid"], figures["kid_deviation"] = kid(features, self.features[rows])
        if _are_labelled(self.examples):
            labels = [(str(example.concept), str(example.style)) for example in self.examples]
            found = recognition(features, [labels[row] for row in rows], self.features, labels)
            figures |= asdict(found)
        if self.clip is not None:
            figures["retrieval_at_1"] = retrieval_at_1(image_embeds(self.clip, images), self.text_embeds, rows)
        return figures


def _are_labelled(examples: Sequence[Example]) -> bool:
    return all(example.concept and example.style for example in examples)


@torch.no_grad()
def image_embeds(clip: CLIPModel, images: Tensor) -> Tensor:
    """Embeddings (images, channels) of `images` (images, 3, h, w) in [-1, 1] by the image tower, at its size."""
    size = clip.config.vision_config.image_size
    if images.shape[2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in clip_statistics(clip))
    pixels = (images / 2 + 0.5 - mean) / deviation
    pooled = clip.vision_model(pixel_values=pixels.to(clip.dtype)).pooler_output
    return clip.visual_projection(pooled)


@torch.no_grad()
def text_embeds(clip: CLIPModel, pipeline: DiffusionPipeline, captions: Sequence[str]) -> Tensor:
    """Embeddings (captions, channels) by the text tower."""
    tokens = pipeline.tokenizer(
        list(captions),
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return clip.text_projection(clip.text_model(input_ids=tokens.input_ids).pooler_output)


def distinct_names(places: Sequence[str], *, shortest: bool = False) -> list[str]:
    """A name for each model by where it lies, none twice: itself, or with `shortest` the end of its path that no other
    has; and a number behind what is named again."""
    names: list[str] = []
    for place in places:
        plain = _own_end(place, places) if shortest else place
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain} ({number})"
        names.append(name)
    return names


def _own_end(place: str, places: Sequence[str]) -> str:
    parts = Path(place).parts
    others = {Path(other).parts for other in places} - {parts}
    for length in range(1, len(parts) + 1):
        if all(other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return place


def folder_names(names: Sequence[str]) -> dict[str, str]:
    """For each model's name the name of a folder, none twice."""
    return dict(zip(names, distinct_names([folder_name(name) for name in names]), strict=True))


def folder_name(name: str) -> str:
    """A model's name as the name of a folder: a path would lead elsewhere."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".") or "model"


def save_images(images: Tensor, folder: Path) -> None:
    """Write images (images, 3, h, w) in [-1, 1] as 0000.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(to_images(images)):
        image.save(folder / f"{index:04d}.png")
