"""The benchmark: ways to make one pipeline faster, ours and our peers', in one run: speed, and what it costs.

Peers come from their own packages, unmodified; one that fails is a row with its error.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from asdm.evaluation.comparison import EvaluationSet, RealImages, evaluation_sets, folder_name, save_images
from asdm.evaluation.latency import synchronise
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.files import write_text
from asdm.generation import default_guidance, generate
from asdm.incubation.data import open_data
from asdm.inference.feature_inheritance import Granularity, Spacing, inherit_features
from asdm.pipelines import with_unet

Progress = Callable[[str, int, int], None]
Prepared = Callable[[DiffusionPipeline], AbstractContextManager[DiffusionPipeline]]


@dataclass(frozen=True)
class Contestant:
    """A way to make a pipeline faster: `prepared` yields the pipeline to be called, and undoes what it did."""

    name: str
    group: str
    prepared: Prepared = nullcontext
    steps: int = 25


class ContestRow(BaseModel):
    """One contestant's figures. `seconds` of one image with guidance: the median of the rounds and the quartiles;
    `speedup` of medians over the first contestant's. Qualities as in `QualityFigures`, by split."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    place: str
    name: str
    group: str
    steps: int
    speedup: float | None = None
    seconds: float | None = None
    seconds_quartiles: tuple[float, float] | None = None
    images: int = 0
    teacher_distance: dict[str, float] = {}
    kid: dict[str, float] = {}
    concept_top1: dict[str, float] = {}
    concept_top5: dict[str, float] = {}
    style: dict[str, float] = {}
    error: str | None = None


class Contest(BaseModel):
    """All rows of a run, with where and when it was."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    date: str
    machine: str
    threads: int
    dtype: str
    rounds: int
    seed: int
    rows: list[ContestRow]

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")


# -- contestants -----------------------------------------------------------------------------------------


def inheriting(every: int, granularity: Granularity = "layer", order: int = 0) -> Contestant:
    name = f"inheritance, {granularity}, every {every}" + (f", order {order}" if order else "")
    return Contestant(name, "ours", _inheriting({"every": every, "granularity": granularity, "order": order}))


def inheriting_to(speedup: float, spacing: Spacing) -> Contestant:
    return Contestant(
        f"inheritance, layer, {spacing}, {speedup:g}x", "ours", _inheriting({"speedup": speedup, "spacing": spacing})
    )


def within_a_budget(budget: float) -> Contestant:
    return Contestant(f"inheritance, layer, budget {budget:g}", "ours", _inheriting({"budget": budget}))


def _inheriting(settings: dict[str, Any]) -> Prepared:
    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with inherit_features(pipeline, **settings):
            yield pipeline

    return prepared


def student(name: str, unet: UNet2DConditionModel, every: int | None = None) -> Contestant:
    """A student in the pipeline, with feature inheritance if asked for."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        smaller = with_unet(pipeline, unet)
        with nullcontext() if every is None else inherit_features(smaller, every=every):
            yield smaller

    return Contestant(name + (f" + inheritance, every {every}" if every else ""), "ours", prepared)


def fewer_steps(steps: int) -> Contestant:
    return Contestant(f"{steps} steps", "fewer steps", steps=steps)


def tome(ratio: float) -> Contestant:
    """Token merging (arXiv 2303.17604), package tomesd."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        import tomesd

        patched = with_unet(pipeline, copy.deepcopy(pipeline.unet))
        tomesd.apply_patch(patched, ratio=ratio, max_downsample=1)
        yield patched

    return Contestant(f"ToMe, ratio {ratio:g}", "peer", prepared)


def deep_cache(interval: int) -> Contestant:
    """DeepCache (arXiv 2312.00858), package DeepCache."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        from DeepCache import DeepCacheSDHelper

        patched = with_unet(pipeline, copy.deepcopy(pipeline.unet))
        helper = DeepCacheSDHelper(pipe=patched)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            yield patched
        finally:
            helper.disable()

    return Contestant(f"DeepCache, interval {interval}", "peer", prepared)


def attention_broadcast(skip: int) -> Contestant:
    """Pyramid attention broadcast (arXiv 2408.12588), of diffusers."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        patched = with_unet(pipeline, copy.deepcopy(pipeline.unet))
        timestep = {"now": 0}
        handle = patched.unet.register_forward_pre_hook(
            lambda _module, args, kwargs: timestep.update(now=int(kwargs.get("timestep", args[1] if args[1:] else 0))),
            with_kwargs=True,
        )
        apply_pyramid_attention_broadcast(
            patched.unet,
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip,
                cross_attention_block_skip_range=skip,
                spatial_attention_timestep_skip_range=(0, 1000),
                cross_attention_timestep_skip_range=(0, 1000),
                spatial_attention_block_identifiers=("down_blocks", "up_blocks", "mid_block"),
                cross_attention_block_identifiers=("down_blocks", "up_blocks", "mid_block"),
                current_timestep_callback=lambda: timestep["now"],
            ),
        )
        try:
            yield patched
        finally:
            handle.remove()

    return Contestant(f"PAB, skip {skip}", "peer", prepared)


def contestants(steps: int = 25) -> list[Contestant]:
    """What needs no training, at so many sampling steps; the unmodified pipeline first."""
    entries = [
        Contestant("original", "original"),
        *(fewer_steps(round(part * steps)) for part in (0.8, 0.64, 0.48, 0.4, 0.32)),
        *(tome(ratio) for ratio in (0.25, 0.5, 0.75)),
        *(deep_cache(interval) for interval in (2, 3, 5)),
        *(attention_broadcast(skip) for skip in (2, 4)),
        *(inheriting(every) for every in (2, 3, 5)),
        *(inheriting(every, order=1) for every in (2, 3, 5)),
        *(inheriting(every, "block") for every in (2, 3, 5)),
        *(inheriting(every, "unit", order) for every in (2, 3, 5) for order in (0, 1)),
        *(inheriting_to(2.0, spacing) for spacing in ("early", "late")),
        *(within_a_budget(budget) for budget in (0.1, 0.3)),
    ]
    return [entry if entry.group == "fewer steps" else replace(entry, steps=steps) for entry in entries]


# -- the run ---------------------------------------------------------------------------------------------


@torch.no_grad()
def run_contest(
    pipeline: DiffusionPipeline,
    entries: Sequence[Contestant],
    *,
    place: str,
    data: str | Path | None,
    samples: int = 64,
    rounds: int = 5,
    seed: int = 0,
    images_folder: Path | None = None,
    progress: Progress | None = None,
) -> Contest:
    """Time all contestants in turns, then draw the same prompts with the same seeds with each.

    Args:
        data: prompts and real images, as for `evaluate`; None for speed alone.
        samples: images of each split.
    """
    faults: dict[str, str] = {}
    times = _timed(pipeline, entries, rounds, faults, progress)
    figures = _judged(pipeline, entries, data, samples, seed, faults, images_folder, progress) if data else {}
    base = statistics.median(times[entries[0].name])
    rows = []
    for entry in entries:
        seconds = times.get(entry.name)
        speed: dict[str, Any] = {}
        if seconds and entry.name not in faults:
            middle = statistics.median(seconds)
            quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [middle] * 3
            speed = {
                "speedup": base / middle,
                "seconds": middle,
                "seconds_quartiles": (quartiles[0], quartiles[2]),
            }
        rows.append(
            ContestRow(
                place=place,
                name=entry.name,
                group=entry.group,
                steps=entry.steps,
                error=faults.get(entry.name),
                **speed,
                **figures.get(entry.name, {}),
            )
        )
    return Contest(
        date=date.today().isoformat(),
        machine=f"{platform.machine()}, {pipeline.device}, torch {torch.__version__}",
        threads=torch.get_num_threads(),
        dtype=str(pipeline.unet.dtype).removeprefix("torch."),
        rounds=rounds,
        seed=seed,
        rows=rows,
    )


def _timed(
    pipeline: DiffusionPipeline,
    entries: Sequence[Contestant],
    rounds: int,
    faults: dict[str, str],
    progress: Progress | None,
) -> dict[str, list[float]]:
    """Seconds of one image by each, in turns; the first round is the warm-up."""
    seconds: dict[str, list[float]] = {}
    done = 0
    for turn in range(rounds + 1):
        for entry in entries:
            done += 1
            if progress is not None:
                progress("time", done, (rounds + 1) * len(entries))
            if entry.name in faults:
                continue
            try:
                with entry.prepared(pipeline) as ready:
                    start = time.perf_counter()
                    generate(ready, ["a photograph"], steps=entry.steps, guidance_scale=default_guidance(pipeline))
                    synchronise(pipeline.device)
                    spent = time.perf_counter() - start
            except Exception as error:
                faults[entry.name] = _one_line(error)
                continue
            if turn > 0:
                seconds.setdefault(entry.name, []).append(spent)
    return seconds


def _judged(
    pipeline: DiffusionPipeline,
    entries: Sequence[Contestant],
    data: str | Path,
    samples: int,
    seed: int,
    faults: dict[str, str],
    images_folder: Path | None,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    judge = Judge()
    real = RealImages(judge, pipeline, open_data(data, "all").examples, None)
    sets = evaluation_sets(data, None, samples, seed)
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
                    save_images(images, images_folder / each.split / folder_name(entry.name))
                features = judge.features(images)
                first = originals.setdefault(each.split, features)
                found["images"] += len(images)
                told = real.figures(images, features, each.examples)
                told["teacher_distance"] = feature_distance(features, first)
                for key in ("teacher_distance", "kid", "concept_top1", "concept_top5", "style"):
                    if key in told:
                        found.setdefault(key, {})[each.split] = told[key]
        except Exception as error:
            faults[entry.name] = _one_line(error)
            continue
        figures[entry.name] = found
    return figures


def _drawn(pipeline: DiffusionPipeline, entry: Contestant, each: EvaluationSet, seed: int) -> Tensor:
    with entry.prepared(pipeline) as ready:
        return generate(
            ready, each.prompts, steps=entry.steps, guidance_scale=default_guidance(pipeline), seed=seed
        )  # fmt: skip


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# -- the picture -----------------------------------------------------------------------------------------


def pareto_front(rows: Sequence[ContestRow], split: str) -> list[ContestRow]:
    """The rows that no other beats in both speed and nearness to the original's images, slowest first."""
    known = [row for row in rows if row.speedup is not None and split in row.teacher_distance]
    front: list[ContestRow] = []
    for row in sorted(known, key=lambda row: -(row.speedup or 0)):
        if not front or row.teacher_distance[split] < front[-1].teacher_distance[split]:
            front.append(row)
    return front[::-1]


def contest_plot(contest: Contest, split: str = "held_out") -> Figure:
    """Distance to the original's images against speed, with the Pareto front."""
    figure, axes = plt.subplots(figsize=(10, 6.5))
    colours = {"original": "black", "fewer steps": "tab:gray", "peer": "tab:orange", "ours": "tab:blue"}
    rows = [row for row in contest.rows if row.speedup is not None and split in row.teacher_distance]
    for group, colour in colours.items():
        of_group = [row for row in rows if row.group == group]
        axes.scatter(
            [row.speedup for row in of_group],
            [row.teacher_distance[split] for row in of_group],
            color=colour,
            label=group,
            zorder=3,
        )
    for row in rows:
        where = (row.speedup or 0, row.teacher_distance[split])
        axes.annotate(row.name, where, textcoords="offset points", xytext=(4, 3), fontsize=6)
    front = pareto_front(rows, split)
    axes.plot([row.speedup for row in front], [row.teacher_distance[split] for row in front], color="tab:green", lw=1)
    axes.set_xlabel("times faster, whole pipeline (median)")
    axes.set_ylabel("distance to the original's images (1 - cosine), lower is better")
    axes.set_title(f"{split.replace('_', '-')} prompts, {contest.machine}, {contest.dtype}, {contest.threads} threads")
    axes.legend()
    figure.tight_layout()
    return figure
