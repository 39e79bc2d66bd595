"""The results of an evaluation, as records that are saved as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from asdm.files import write_text
from asdm.measure.latency import Latency, Ratio
from asdm.measure.load import busy_line
from asdm.old_names import OLD_LATENCY_FIELDS, renamed
from asdm.records import Record, read_record


class SpeedMetrics(Record):
    """The cost of one pipeline. Latencies are those of an idle machine. Each speed-up is over the first pipeline. A
    graph of another runtime does not say how many parameters it has and what it computes: these are None."""

    name: str
    unet_parameters: int | None
    unet_megabytes: float = Field(description="of its weights")
    gmacs: float | None = Field(description="of a denoiser call, per sample")
    gmacs_without_attention: float | None = Field(description="the same without attention products")
    unet: Latency = Field(description="of a denoiser call at batch 2: one image with guidance")
    unet_speedup: float
    unet_speedup_interval: tuple[float, float] = Field(description="holds the true speed-up")
    pipeline: Latency = Field(description="of one image")
    pipeline_speedup: float
    pipeline_speedup_interval: tuple[float, float] = Field(description="holds the true speed-up")
    pipeline_parts_ms: dict[str, float] = Field(default={}, description="an image's milliseconds by part")
    image_to_image: Latency | None = Field(default=None, description="of one image that starts from an image")
    image_to_image_speedup: float | None = None
    image_to_image_speedup_interval: tuple[float, float] | None = Field(
        default=None, description="holds the true speed-up"
    )
    pipeline_extrapolated: bool = Field(description="two steps were timed, as an image takes too long")
    steps: int = Field(description="of one image")

    @property
    def million_parameters(self) -> float | None:
        """The denoiser's parameters in millions."""
        return None if self.unet_parameters is None else self.unet_parameters / 1e6

    @property
    def unet_ratio(self) -> Ratio:
        """How many times faster a denoiser call is than the teacher's."""
        return Ratio(self.unet_speedup, *self.unet_speedup_interval)

    @property
    def pipeline_ratio(self) -> Ratio:
        """How many times faster an image is than the teacher's."""
        return Ratio(self.pipeline_speedup, *self.pipeline_speedup_interval)

    @property
    def image_to_image_ratio(self) -> Ratio | None:
        """How many times faster an image from an image is than the teacher's; None where it was not timed."""
        if self.image_to_image_speedup is None or self.image_to_image_speedup_interval is None:
            return None
        return Ratio(self.image_to_image_speedup, *self.image_to_image_speedup_interval)


class QualityMetrics(Record):
    """The quality of one pipeline's images on one split. A metric is None where the data does not allow it."""

    name: str
    split: str
    images: int
    teacher_distance: float = Field(
        description="1 - cosine of the judge's features to the first pipeline's image of the same seed"
    )
    kid: float | None = None
    kid_deviation: float | None = None
    exact_pair: float | None = Field(
        default=None, description="how often the nearest real image shows both the concept and the style"
    )
    concept_top1: float | None = None
    concept_top5: float | None = None
    style: float | None = None
    retrieval_at_1: float | None = None


class ImageToImageMetrics(Record):
    """The quality of one pipeline's image-to-image results on one split. A metric is None where the data does not
    allow it."""

    name: str
    split: str
    images: int
    exact_pair: float | None = Field(
        default=None, description="how often the nearest of all real images is the target itself"
    )
    style: float | None = Field(default=None, description="how often the nearest real image has the target's style")
    target_distance: float | None = Field(default=None, description="1 - cosine of the judge's features to the target")
    teacher_distance: float | None = Field(
        default=None, description="1 - cosine to the first pipeline's result from the same image and seed"
    )
    seed_part: float | None = Field(
        default=None,
        description="teacher_distance as a part of the distance between the first pipeline's results of two seeds",
    )


class ImageToImage(Record):
    """Image-to-image of several pipelines, from the same images with the same seeds, strength and steps.

    Where the data names variants of designs, each result has a target: another variant of what it starts from.
    `references` say what the numbers mean: the metrics of the sources as they are, and of the targets after the VAE; or
    the distance between the first pipeline's results of two seeds.
    """

    strength: float = Field(description="the part of the steps that are taken, from an image with as much noise")
    note: str | None = Field(default=None, description="why there are no results")
    rows: list[ImageToImageMetrics] = []
    references: list[ImageToImageMetrics] = []

    @property
    def has_targets(self) -> bool:
        """Whether the results have a right answer."""
        return any(row.target_distance is not None for row in self.rows)

    def of(self, name: str, split: str) -> ImageToImageMetrics | None:
        """Return a pipeline's metrics on a split; None where it was not measured."""
        return next((row for row in self.rows if (row.name, row.split) == (name, split)), None)


class Evaluation(Record):
    """Speed and quality of several pipelines, measured in one run."""

    date: str
    machine: str
    threads: int
    dtype: str
    steps: int = Field(description="of all but few-step pipelines")
    guidance_scale: float = Field(description="of all but few-step pipelines")
    seed: int
    denoiser: str = Field(default="UNet", description="what reports call the denoiser")
    other_cores: float = Field(default=0.0, description="how many cores other processes used during the timing")
    contention: float = Field(default=0.0, description="the part of this process's cores that they took")
    speed: list[SpeedMetrics] = Field(description="one for each pipeline, the teacher first")
    quality: list[QualityMetrics] = Field(description="one for each pipeline and split")
    image_to_image: ImageToImage | None = Field(default=None, description="None where it was not requested")

    def speed_of(self, name: str) -> SpeedMetrics:
        """Return a pipeline's speed."""
        return next(row for row in self.speed if row.name == name)

    def quality_of(self, name: str, split: str) -> QualityMetrics | None:
        """Return a pipeline's quality on a split; None where it was not measured."""
        return next((row for row in self.quality if (row.name, row.split) == (name, split)), None)

    @property
    def busy_line(self) -> str | None:
        """A sentence if other processes needed the cores, too."""
        return busy_line(self.other_cores, self.contention)

    @model_validator(mode="before")
    @classmethod
    def _from_0_1_0(cls, content: Any) -> Any:
        """Files of 0.1.0 have medians and quartiles, and no intervals of the ratios."""
        if isinstance(content, dict) and isinstance(content.get("speed"), list):
            content = {**content, "speed": [_with_intervals(row, content["speed"][0]) for row in content["speed"]]}
        return content

    def save(self, path: str | Path) -> None:
        """Write the results as JSON."""
        write_text(Path(path), json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read the results.

        Raises:
            AsdmError: no such file, or not an evaluation.
        """
        return read_record(cls, path, "an evaluation", "`asdm evaluate` writes one")


def _with_intervals(row: Any, first: Any) -> Any:
    """Return a row of 0.1.0's speed results with today's latencies and with intervals; any other row as it is."""
    if not (isinstance(row, dict) and isinstance(row.get("unet"), dict) and "median_ms" in row["unet"]):
        return row
    row = dict(row)
    for part in ("unet", "pipeline"):
        own, base = (Latency(**renamed(each[part], OLD_LATENCY_FIELDS)) for each in (row, first))
        ratio = Ratio(1.0, 1.0, 1.0) if row["name"] == first["name"] else Ratio.of(base, own)
        row |= {f"{part}_speedup_interval": ratio.interval, part: vars(own)}
    return row
