"""The benchmark's results: a row for each method and model, as records that are saved as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from asdm.errors import AsdmError, one_line
from asdm.files import write_text
from asdm.measure.latency import Ratio
from asdm.measure.machine import device_name
from asdm.old_names import OLD_BENCHMARK_FIELDS, OLD_BENCHMARK_GROUPS, benchmark_name, renamed
from asdm.reading import read_json
from asdm.records import Record

PROGRAMS = ("stable-diffusion-cpp-python", "openvino-genai")
PACKAGES = ("torch", "diffusers", "openvino", "nncf", "tomesd", "DeepCache", "tgate", *PROGRAMS)


class BenchmarkRow(Record):
    """One method's results with one model, which is called its place. Quality is by split, as in `QualityMetrics`."""

    place: str
    name: str
    group: str
    steps: int
    extrapolated: bool = Field(default=False, description="fewer steps were timed than an image has")
    speedup: float | None = Field(default=None, description="over the place's first method")
    seconds: float | None = Field(
        default=None, description="of one image with guidance on an idle machine, the sum of its parts"
    )
    speedup_interval: tuple[float, float] | None = Field(default=None, description="holds the true speed-up")
    seconds_interval: tuple[float, float] | None = Field(
        default=None, description="holds the true seconds; the quartiles in files of 0.1.0"
    )
    parts: dict[str, float] = Field(
        default={},
        description="seconds of each part, once: text encoder, each kind of UNet call, scheduler's step, VAE decoder",
    )
    dtype: str | None = Field(default=None, description="in which the denoiser computes")
    gmacs: float | None = Field(default=None, description="of a whole call per sample, with attention products")
    gflops: float | None = Field(default=None, description="achieved in a whole call, in GFLOP/s")
    limit_share: float | None = Field(default=None, description="of the machine's limit in that dtype")
    unet_megabytes: float | None = Field(default=None, description="of the denoiser's weights")
    peak_megabytes: float | None = Field(
        default=None, description="the most that torch's tensors take beside all weights in a sampling"
    )
    images: int = 0
    teacher_distance: dict[str, float] = {}
    kid: dict[str, float] = {}
    exact_pair: dict[str, float] = {}
    concept_top1: dict[str, float] = {}
    concept_top5: dict[str, float] = {}
    style: dict[str, float] = {}
    image_to_image: dict[str, dict[str, float]] = Field(
        default={}, description="by metric and split, as in `ImageToImageMetrics`; empty where there is none"
    )
    image_to_image_error: str | None = Field(default=None, description="why the method has no image-to-image")
    error: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_earlier(cls, content: Any) -> Any:
        """Give a row of an earlier version today's names."""
        if not isinstance(content, dict):
            return content
        content = renamed(content, OLD_BENCHMARK_FIELDS)
        if isinstance(content.get("group"), str):
            content["group"] = OLD_BENCHMARK_GROUPS.get(content["group"], content["group"])
        if isinstance(content.get("name"), str):
            content["name"] = benchmark_name(content["name"])
        return content

    @property
    def ratio(self) -> Ratio | None:
        """How many times faster an image is than the first method's; None where either failed."""
        if self.speedup is None:
            return None
        return Ratio(self.speedup, *(self.speedup_interval or (self.speedup, self.speedup)))


class BenchmarkRun(Record):
    """Where and when a model's rows were measured."""

    date: str
    machine: str
    versions: dict[str, str]
    threads: int
    rounds: int
    seed: int
    limits: dict[str, dict[str, float]] = Field(description="of the machine in GFLOP/s, as `machine_limits` measures")
    other_cores: float | None = Field(default=None, description="how many cores other processes used meanwhile")
    strength: float | None = Field(default=None, description="of image-to-image; None where there is none")

    @classmethod
    def now(
        cls,
        *,
        device: torch.device | str,
        rounds: int,
        seed: int,
        limits: dict[str, dict[str, float]],
        other_cores: float | None = None,
        strength: float | None = None,
    ) -> BenchmarkRun:
        """Describe a run on this machine today."""
        return cls(
            date=date.today().isoformat(),
            machine=f"{platform.machine()}, {device_name(device)}",
            versions={name: found for name in PACKAGES if (found := _version(name))},
            threads=torch.get_num_threads(),
            rounds=rounds,
            seed=seed,
            limits=limits,
            other_cores=other_cores,
            strength=strength,
        )


class Benchmark(Record):
    """The rows of all places, and each place's run.

    They are saved as two files: NAME.json is the list of rows, NAME_run.json has the runs by place.
    """

    runs: dict[str, BenchmarkRun] = {}
    rows: list[BenchmarkRow] = []

    def with_place(self, place: str, run: BenchmarkRun, rows: Sequence[BenchmarkRow]) -> Benchmark:
        """Return the results with this run in the place of an earlier one."""
        others = [row for row in self.rows if row.place != place]
        return Benchmark(runs=self.runs | {place: run}, rows=[*others, *rows])

    def save(self, path: str | Path) -> None:
        """Write the rows and the runs as two files of JSON."""
        path = Path(path)
        rows = [row.model_dump(exclude_defaults=True) for row in self.rows]
        write_text(path, json.dumps(rows, indent=1) + "\n")
        runs = {place: run.model_dump() for place, run in self.runs.items()}
        write_text(_run_of(path), json.dumps(runs, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Benchmark:
        """Read what `save` wrote.

        Raises:
            AsdmError: something else, or one of the two files is missing.
        """
        path = Path(path)
        try:
            rows, runs = (read_json(file) for file in (path, _run_of(path)))
            return cls(rows=rows, runs=runs)
        except (OSError, ValueError) as error:
            raise AsdmError(f"{path}: not the results of a benchmark ({fault(error)}); name another folder") from None


def _run_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_run.json")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fault(error: Exception) -> str:
    """Describe an error in one line."""
    return f"{type(error).__name__}: {one_line(error)}"
