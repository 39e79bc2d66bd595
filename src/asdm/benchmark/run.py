"""The benchmark: ways to make one pipeline faster, ours and our peers', in one run: speed, and what it costs.

Who takes part is in `methods.py`. One that fails is a row with its error.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pydantic import AliasChoices, Field
from torch import Tensor

from asdm.benchmark.methods import Method, Way, forget_graphs, unforeseen
from asdm.diffusion.generation import default_guidance, generate, nothing_to_keep
from asdm.diffusion.guidance import CfgCutoff
from asdm.errors import AsdmError, one_line
from asdm.evaluation.image_folders import folder_names, save_images
from asdm.evaluation.image_timing import ImageJob, ImageTiming, add_calls, decoder_key, time_image, watching_calls
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.families.unet_calls import unet_call
from asdm.files import write_text
from asdm.measure.latency import Patience, Ratio, Stopwatch, seconds_of, synchronise
from asdm.measure.machine import device_name
from asdm.measure.macs import counting_macs
from asdm.measure.memory import peak_megabytes
from asdm.records import Record

Progress = Callable[[str, int, int], None]
TURN_PRECISION = 0.05  # of the ratios to the first contestant, at which no more turns follow
LONGEST_TIMED_IMAGE = 10.0  # seconds; where an image takes longer, its parts are timed
QUALITIES = ("teacher_distance", "kid", "concept_top1", "concept_top5", "style")
PACKAGES = ("torch", "diffusers", "openvino", "nncf", "tomesd", "DeepCache", "tgate")


class BenchmarkRow(Record):
    """One contestant's figures at one place.

    `seconds` of one image with guidance, on a machine that does nothing else, and `speedup` over the place's first
    contestant, each with the interval that holds the true value. An image's seconds are put together from its parts:
    the text encoder, each kind of UNet call and the scheduler's step as often as they come, and the VAE's decoder;
    where `extrapolated`, fewer steps are drawn than an image has. `parts`: seconds of each, once. `dtype`: in what the
    UNet computes; `gmacs` of a whole call per sample, with attention products;
    `gflops`: what a whole call achieves, `limit_share` of the machine's best in that dtype. Megabytes: of the
    UNet's weights, and of the most that torch's tensors take beside all weights while latents are sampled. Qualities
    as in `QualityFigures`, by split.
    """

    place: str
    name: str
    group: str
    steps: int
    extrapolated: bool = False
    speedup: float | None = None
    seconds: float | None = None
    speedup_interval: tuple[float, float] | None = None
    # of files that were written by 0.1.0 the quartiles
    seconds_interval: tuple[float, float] | None = Field(
        default=None, validation_alias=AliasChoices("seconds_interval", "seconds_quartiles")
    )
    parts: dict[str, float] = {}
    dtype: str | None = None
    gmacs: float | None = None
    gflops: float | None = None
    limit_share: float | None = None
    unet_megabytes: float | None = None
    peak_megabytes: float | None = None
    images: int = 0
    teacher_distance: dict[str, float] = {}
    kid: dict[str, float] = {}
    concept_top1: dict[str, float] = {}
    concept_top5: dict[str, float] = {}
    style: dict[str, float] = {}
    error: str | None = None

    @property
    def ratio(self) -> Ratio | None:
        """How many times faster an image is than the first contestant's; None where either failed."""
        if self.speedup is None:
            return None
        return Ratio(self.speedup, *(self.speedup_interval or (self.speedup, self.speedup)))


class BenchmarkRun(Record):
    """Where and when the rows of a place were measured; `limits` as `machine_limits` tells them, in GFLOP/s;
    `other_cores`, how many cores other processes kept busy meanwhile."""

    date: str
    machine: str
    versions: dict[str, str]
    threads: int
    rounds: int
    seed: int
    limits: dict[str, dict[str, float]]
    other_cores: float | None = None

    @classmethod
    def now(
        cls,
        *,
        device: torch.device | str,
        rounds: int,
        seed: int,
        limits: dict[str, dict[str, float]],
        other_cores: float | None = None,
    ) -> BenchmarkRun:
        return cls(
            date=date.today().isoformat(),
            machine=f"{platform.machine()}, {device_name(device)}",
            versions={name: found for name in PACKAGES if (found := _version(name))},
            threads=torch.get_num_threads(),
            rounds=rounds,
            seed=seed,
            limits=limits,
            other_cores=other_cores,
        )


class Benchmark(Record):
    """The rows of all places, and each place's run.

    Saved as two files: NAME.json is the list of rows, NAME_run.json the runs by place.
    """

    runs: dict[str, BenchmarkRun] = {}
    rows: list[BenchmarkRow] = []

    def with_place(self, place: str, run: BenchmarkRun, rows: Sequence[BenchmarkRow]) -> Benchmark:
        """With this run instead of an earlier one at the same place."""
        others = [row for row in self.rows if row.place != place]
        return Benchmark(runs=self.runs | {place: run}, rows=[*others, *rows])

    def save(self, path: str | Path) -> None:
        path = Path(path)
        rows = [row.model_dump(exclude_defaults=True) for row in self.rows]
        write_text(path, json.dumps(rows, indent=1) + "\n")
        runs = {place: run.model_dump() for place, run in self.runs.items()}
        write_text(_run_of(path), json.dumps(runs, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Benchmark:
        """What `save` wrote.

        Raises:
            AsdmError: something else, or one of the two files is missing.
        """
        path = Path(path)
        try:
            rows, runs = (json.loads(file.read_text("utf-8")) for file in (path, _run_of(path)))
            return cls(rows=rows, runs=runs)
        except (OSError, ValueError) as error:
            raise AsdmError(f"{path}: not the results of a benchmark ({_fault(error)}); name another folder") from None


def _run_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_run.json")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -- the run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    """What a contestant needs whatever the machine's pace; `samples` in a UNet call: two with guidance."""

    dtype: str
    gmacs: float | None
    unet_megabytes: float
    peak_megabytes: float
    samples: int


@torch.no_grad()
def benchmark_rows(
    pipeline: DiffusionPipeline,
    entries: Sequence[Method],
    *,
    place: str,
    data: str | Path | None,
    samples: int = 64,
    rounds: int = 5,
    seed: int = 0,
    limits: dict[str, dict[str, float]] | None = None,
    longest: float = LONGEST_TIMED_IMAGE,
    images_folder: Path | None = None,
    progress: Progress | None = None,
) -> list[BenchmarkRow]:
    """Time all methods in turns, then draw the same prompts with the same seeds with each.

    Args:
        data: prompts and real images, as for `evaluate`; None for speed alone.
        samples: images of each split.
        longest: seconds that a timed image may take; where it would take longer, its parts are timed, and those whose
            steps are of unforeseen kinds take no part.
    """
    call = unet_call(pipeline.unet)
    call()  # a GPU's first one takes seconds
    extrapolated = seconds_of(call, pipeline.device) * entries[0].steps > longest
    if extrapolated:
        entries = [entry for entry in entries if entry.kinds is not unforeseen]
    faults: dict[str, str] = {}
    times, costs = _timed(pipeline, entries, rounds, extrapolated, faults, progress)
    figures = _judged(pipeline, entries, data, samples, seed, faults, images_folder, progress) if data else {}
    rows = []
    for entry in entries:
        found: dict[str, Any] = {"error": faults.get(entry.name)}
        if entry.name not in faults:
            speed = _speed(times, entries[0].name, entry.name)
            found |= speed | _effort(costs[entry.way], speed["parts"], limits or {})
            found |= {"extrapolated": extrapolated, **figures.get(entry.name, {})}
        rows.append(BenchmarkRow(place=place, name=entry.name, group=entry.group, steps=entry.steps, **found))
    return rows


def _speed(times: ImageTiming, base: str, name: str) -> dict[str, Any]:
    image = times.latency(name)
    ratio = times.speedup(base, name) if base in times.parts else None
    return {
        "speedup": None if ratio is None else ratio.value,
        "speedup_interval": None if ratio is None else ratio.interval,
        "seconds": image.ms / 1000,
        "seconds_interval": (image.low_ms / 1000, image.high_ms / 1000),
        "parts": {part: milliseconds / 1000 for part, milliseconds in times.each_part(name).items()},
    }


def _effort(cost: _Cost, parts: dict[str, float], limits: dict[str, dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = vars(cost).copy()
    samples = found.pop("samples")
    if cost.gmacs is not None:
        found["gflops"] = 2 * samples * cost.gmacs / parts["UNet, whole"]  # two operations a MAC
        if cost.dtype in limits:
            found["limit_share"] = found["gflops"] / max(limits[cost.dtype].values())
    return found


def _timed(
    pipeline: DiffusionPipeline,
    entries: Sequence[Method],
    rounds: int,
    extrapolated: bool,
    faults: dict[str, str],
    progress: Progress | None,
) -> tuple[ImageTiming, dict[Way, _Cost]]:
    """One image by each, in turns; the first turn is the warm-up, and looks at what each needs.

    Each is prepared anew in its turn and then let go, as their UNets do not fit into memory together. Those that differ
    in the number of steps alone need the same, and where parts are timed have the same parts. On a busy machine as many
    turns follow as were asked for, until the intervals are narrow.
    """
    watch = Stopwatch(pipeline.device)
    parts: dict[str, dict[str, tuple[str, int]]] = {}
    costs: dict[Way, _Cost] = {}
    shared = {id(module) for module in pipeline.components.values()}
    done = 0

    def each(what: Callable[[Method], Any]) -> None:
        nonlocal done
        forget_graphs()  # of the last turn's end
        for entry in entries:
            done += 1
            if progress is not None:
                progress("time", done, max(rounds + 1, math.ceil(done / len(entries))) * len(entries))
            if entry.name not in faults:
                try:
                    what(entry)
                except Exception as error:
                    faults[entry.name] = _fault(error)
                    parts.pop(entry.name, None)
                gc.collect()  # patched UNets refer to themselves

    def warm_up(entry: Method) -> None:
        if entry.way not in costs:
            with entry.prepared(pipeline) as ready:
                costs[entry.way] = _cost(ready, entry, decoded)

    def time_whole(entry: Method) -> None:
        with entry.prepared(pipeline) as ready:
            parts[entry.name] = time_image(watch, entry.name, _job(ready, entry), shared)

    def time_parts(entry: Method) -> None:
        if entry.way not in looked_at:
            with entry.prepared(pipeline) as ready:
                looked_at[entry.way] = _time_parts(watch, ready, entry, shared, decoded)
        parts[entry.name] = _of_image(looked_at[entry.way], entry)

    decoded: set[str | int] = set()
    looked_at: dict[Way, dict[str, tuple[str, int]]] = {}
    each(warm_up)
    more = Patience(rounds, 1.0, precision=TURN_PRECISION)
    while more.another_round(lambda: ImageTiming(watch.timing(), parts, 0).precision() if parts else 0.0):
        decoded.clear()
        looked_at.clear()
        each(time_parts if extrapolated else time_whole)
    return ImageTiming(watch.timing(), parts, rounds), costs


def _job(ready: DiffusionPipeline, entry: Method) -> ImageJob:
    return ImageJob(
        ready,
        partial(generate, ready, ["a photograph"], steps=entry.steps, cfg_cutoff=entry.cfg_cutoff),
        calls=entry.steps,
        kinds=lambda step: f"UNet, {entry.kinds(step)}",
        data_dependent=entry.kinds is unforeseen,
    )


def _time_parts(
    watch: Stopwatch, ready: DiffusionPipeline, entry: Method, shared: Collection[int], decoded: set[str | int]
) -> dict[str, tuple[str, int]]:
    """Time the steps until each kind of UNet call has come twice behind the first, and the decoder once in a turn.

    `decoded` has the keys of the decoders that this turn has timed.
    """
    start = time.perf_counter()
    latents, calls, _ = _first_steps(ready, entry, times=2)
    watch.meter.mark()
    watch.add(f"{entry.name}: text encoder", start, calls[0][0])
    decoder = decoder_key(entry.name, ready, shared)
    if decoder not in decoded:
        decoded.add(decoder)
        watch.time(decoder, partial(_decode, ready, latents))
    found = add_calls(watch, entry.name, _job(ready, entry), calls)
    return {"text encoder": (f"{entry.name}: text encoder", 1), **found, "VAE decoder": (decoder, 1)}


def _of_image(parts: dict[str, tuple[str, int]], entry: Method) -> dict[str, tuple[str, int]]:
    """The parts of a contestant that differs in the number of steps alone from the one whose parts were timed."""
    counts = Counter(f"UNet, {entry.kinds(step)}" for step in range(entry.steps)) | {"scheduler": entry.steps}
    return {part: (key, counts.get(part, 1)) for part, (key, _) in parts.items() if counts.get(part, 1)}


def _decode(ready: DiffusionPipeline, latents: Tensor) -> Any:
    return ready.vae.decode(latents / ready.vae.config.scaling_factor, return_dict=False)


def _first_steps(
    ready: DiffusionPipeline, entry: Method, times: int
) -> tuple[Tensor, list[tuple[float, float]], list[float]]:
    """Latents after as many steps as show every kind of UNet call so many times (if it comes so often), behind the
    first step; when each call started and ended, and each step."""
    steps_of: dict[str, list[int]] = defaultdict(list)
    for step in range(1, entry.steps):
        steps_of[entry.kinds(step)].append(step)
    last = max((steps[:times][-1] for steps in steps_of.values()), default=0)
    ends: list[float] = []
    guidance = None if entry.cfg_cutoff == 1 else CfgCutoff(ready, entry.cfg_cutoff)

    def step_done(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        synchronise(ready.device)
        ends.append(time.perf_counter())
        pipe._interrupt = step >= last  # diffusers' own way to end a sampling early
        return {} if guidance is None else guidance(pipe, step, timestep, tensors)

    with watching_calls(ready.unet, ready.device) as calls:
        latents = ready(
            ["a photograph"],
            num_inference_steps=entry.steps,
            guidance_scale=default_guidance(ready),
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=step_done,
            callback_on_step_end_tensor_inputs=["latents"] if guidance is None else guidance.tensor_inputs,
            **nothing_to_keep(ready),
        ).images
    return latents, calls, ends


def _cost(ready: DiffusionPipeline, entry: Method, decoded: set[str | int]) -> _Cost:
    unet, macs = ready.unet, [0]
    latents: list[Tensor] = []
    with counting_macs(unet) as count:
        handle = unet.register_forward_hook(lambda *_: macs.append(count.below()))
        try:
            peak = peak_megabytes(lambda: latents.append(_first_steps(ready, entry, times=1)[0]))
        finally:
            handle.remove()
    if id(ready.vae) not in decoded:
        decoded.add(id(ready.vae))
        _decode(ready, latents[0])  # compiles what is compiled when it is first called
    weights = sum(tensor.numel() * tensor.element_size() for tensor in unet.parameters()) / 1e6
    return _Cost(
        dtype=getattr(unet, "precision", str(unet.dtype).removeprefix("torch.")),
        gmacs=macs[1] / 1e9 or getattr(unet, "gmacs", None),
        unet_megabytes=getattr(unet, "megabytes", weights),
        peak_megabytes=peak,
        samples=1 if default_guidance(ready) == 1 else 2,
    )


def _judged(
    pipeline: DiffusionPipeline,
    entries: Sequence[Method],
    data: str | Path,
    samples: int,
    seed: int,
    faults: dict[str, str],
    images_folder: Path | None,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    judge = Judge(pipeline.device)
    sets = evaluation_sets(data, None, samples, seed)
    real = RealImages.of(data, sets, judge, pipeline, None)
    folders = folder_names([entry.name for entry in entries])
    originals: dict[str, Tensor] = {}
    figures: dict[str, dict[str, Any]] = {}
    for done, entry in enumerate(entries, start=1):
        if progress is not None:
            progress("draw", done, len(entries))
        if entry.name in faults:
            continue
        found: dict[str, Any] = {"images": 0}
        try:
            for each in sets:
                images = _drawn(pipeline, entry, each, seed)
                if images_folder is not None:
                    save_images(images, images_folder / each.split / folders[entry.name])
                features = judge.features(images)
                if entry is entries[0]:
                    originals[each.split] = features
                found["images"] += len(images)
                told = {} if real is None else real.metrics(images, features, each.examples)
                if each.split in originals:
                    told["teacher_distance"] = feature_distance(features, originals[each.split])
                for key in QUALITIES:
                    if key in told:
                        found.setdefault(key, {})[each.split] = told[key]
        except Exception as error:
            faults[entry.name] = _fault(error)
            continue
        figures[entry.name] = found
    return figures


def _drawn(pipeline: DiffusionPipeline, entry: Method, each: EvaluationSet, seed: int) -> Tensor:
    with entry.prepared(pipeline) as ready:
        return generate(ready, each.prompts, steps=entry.steps, cfg_cutoff=entry.cfg_cutoff, seed=seed)


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
