"""What each part of the method is worth: distillations of equal cost from one plan, with and without it.

    python benchmarks/ablation.py run                       # all that is not in docs/results/ablation.json yet
    python benchmarks/ablation.py run --only bk-sdm,full --seeds 0
    python benchmarks/ablation.py run --device cuda --jobs 12
    python benchmarks/ablation.py time                      # the UNets' speed-ups, when nothing else runs
    python benchmarks/ablation.py show                      # mean and spread over the seeds: tables, plot, images

The embedded pipeline; one plan of removals for each speed-up; each run trains for the time of so many steps of
BK-SDM's recipe, by the steps' cost as measured in turns, so that other load affects all recipes alike. At 1.5x
the components one by one, in short runs, and students of the faster plan that leave the last steps of an image to the
original; at 2x and 2.5x what is for harder plans: expert kernels by what their routers read, and semantic supervision
on captions without their images. A finished run is not run again, one that was stopped goes on; two processes can share
the work, each with its own --seeds or --only.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import torch
import typer
from common import RESULTS, console, machine
from diffusers import DiffusionPipeline, UNet2DConditionModel
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import asdm
from asdm.benchmark.techniques import outer_self_attentions
from asdm.data.batches import ShuffledBatches
from asdm.data.sources import open_data
from asdm.distillation.recipes import (
    CAPTION_MIXING,
    SEMANTIC_WEIGHT,
    SEMANTICS,
    WEIGHTS,
    default_hyperparameters,
    incubation_stages,
    with_captions,
)
from asdm.distillation.stages import LossWeights, Stage
from asdm.distillation.tasks import make_task
from asdm.distillation.training_set import TrainingSet, prepare
from asdm.edits import GriAttention, Remove
from asdm.evaluation.metrics import Judge, feature_distance
from asdm.evaluation.plots import image_sheet
from asdm.evaluation.real_images import RealImages
from asdm.evaluation.sampling import EvaluationSet, evaluation_sets
from asdm.families import denoiser_call
from asdm.files import write_text
from asdm.images import to_images
from asdm.measure.latency import measure_interleaved, seconds_of
from asdm.measure.machine import fast_training
from asdm.pipelines.clip import load_clip
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan
from asdm.training.launch import make_accelerator
from asdm.training.optimizers import make_optimizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROWS = RESULTS / "ablation.json"
SETTLED = RESULTS / "ablation"  # plans, and what a step costs, which are the same for all runs, whenever they are made
WORK = Path("runs/ablation")
# "normalised": losses relative to the teacher's mean square, features weighted by area, a low weight of the task, time
# steps uniform in angle.
METHOD = ("normalised", "incubation", "cond-conv", "gri", "sas")  # each is put to BK-SDM's recipe by itself, too
EXTRAS = ("compensation", "muon", "splice")
COMPONENTS = (*METHOD, *EXTRAS)
EARLY = "early"  # our students are not trained for the steps that the original draws
DEFAULT = ("normalised", *EXTRAS)  # what `compress` and `distill` do if nothing else is asked for
NAMED: dict[str, tuple[str, ...]] = {"bk-sdm": (), "joint": DEFAULT, "full": COMPONENTS}
EXPERTS = {
    "cond-conv": "time",
    "cond-conv by prompt": "prompt",
    "cond-conv by both": "prompt+time",
}  # what routers read
LOOKING = ("semantic", "caption_semantic")  # losses of every few steps
ON_CAPTIONS = "sas on captions"  # without their images; those of open pairs have none
HARD: dict[str, tuple[str, ...]] = {f"joint + {name}": (*DEFAULT, name) for name in EXPERTS}
RECORDED = "recorded"  # the teacher's answers are read from disk, as by the recipe small-gpu
FROM_DISK = f"joint + {RECORDED}"
LOW_SPEEDUP, FAST_SPEEDUP = 1.5, 2.0  # for the components one by one; of the students that switch
SHORT = " (short)"  # what a recipe is called in the runs of the components' length
SWITCHING = " + switching"  # and where the student is of the faster plan, and the original draws the last steps
SWITCHED = f"joint{SWITCHING}"
UNTRAINED = f"untrained{SWITCHING}"  # pruned and compensated, no more
STEPS, LAST_STEPS = 25, 8  # with a student of twice the speed they leave 1.5x
SWITCHED_BELOW = (LAST_STEPS + 0.5) / STEPS  # of the schedule
MARGIN = 1.02  # for what banks, GRI and linear maps cost: the plan is that much faster than the target
FIT = "fit of the compensation"
RECORDING = "recording of the teacher"
DRAWS = 8192  # that are recorded
LENGTHS = {1.5: 600, 2.0: 600, 2.5: 600}  # steps of BK-SDM's recipe; the others take as many as cost the same
SHORT_LENGTH = 200  # of the components one by one, and of the named recipes beside them
SHOWN = 16  # held-out prompts, of the first seed of the recipes in `DRAWN`
DRAWN = ("teacher", *NAMED, SWITCHED)
REPAIR_ROUNDS = 4
COST_ROUNDS = 5
BANKS = 0.005  # of the teacher's parameters
COLOURS = {"teacher": "black", "bk-sdm": "tab:red", "joint": "tab:green", "full": "tab:blue"}
METRICS = ("exact_pair", "style", "concept_top5", "target_distance", "kid", "teacher_distance")


def variants(target: float) -> dict[str, tuple[str, ...]]:
    """Return the components of each recipe at a speed-up; at the lowest those of short runs, too."""
    if target > FAST_SPEEDUP:
        return {"bk-sdm": (), "joint": DEFAULT, **HARD}
    found = dict(NAMED)
    if target == FAST_SPEEDUP:
        found |= {**HARD, f"joint + {ON_CAPTIONS}": (*DEFAULT, ON_CAPTIONS)}
    if target == LOW_SPEEDUP:
        found |= {FROM_DISK: (*DEFAULT, RECORDED)}
        found |= {f"{name}{SHORT}": components for name, components in NAMED.items()}
        found |= {UNTRAINED: ("compensation",)}
        found |= {SWITCHED: (*DEFAULT, EARLY)}
        found |= {f"bk-sdm + {name}": (name,) for name in METHOD}
        found |= {f"full - {name}": tuple(c for c in COMPONENTS if c != name) for name in METHOD}
    return found


@app.command()
def run(
    only: str = typer.Option("", help="Names of recipes, separated by commas; all by default."),
    seeds: str = typer.Option("0,1,2", help="Seeds, separated by commas."),
    targets: str = typer.Option("1.5,2.0,2.5", help="UNet speed-ups of the plans, separated by commas."),
    samples: int = typer.Option(100, help="Held-out images, of which there are 200, and a quarter as many seen ones."),
    device: str = typer.Option("cpu", help="Where to train and draw; what a step costs is measured on the CPU."),
    jobs: int = typer.Option(1, help="Runs at a time, each in its own process."),
) -> None:
    """Train and judge what is not in the results yet; each run is kept as soon as it is done."""
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    missing = (  # looked up one by one, as another process may be adding rows, too
        (name, seed, target)
        for seed in map(int, seeds.split(","))
        for target in map(float, targets.split(","))
        for name in ("teacher", *variants(target))
        if (not chosen or name in chosen) and not _is_known(name, seed, target)
    )
    bench = _Bench(device, samples)
    if jobs == 1:
        for run_of in missing:
            bench.run(*run_of)
    else:
        _run_side_by_side(bench, list(missing), jobs)


def _run_side_by_side(bench: _Bench, missing: list[tuple[str, int, float]], jobs: int) -> None:
    """The teacher's rows here, then all others in processes of their own; what these share is made before."""
    for run_of in missing:
        if run_of[0] == "teacher":
            bench.run(*run_of)
    others = [run_of for run_of in missing if run_of[0] != "teacher"]
    if not others:
        return
    for target in {target for _, _, target in others} | {FAST_SPEEDUP}:
        _costs(bench.examples, target)
    for seed in {seed for _, seed, _ in others}:
        bench.judged.see_teacher(seed)
    others.sort(key=lambda run_of: 0 if _is_short(run_of[0]) else LENGTHS[run_of[2]], reverse=True)  # the longest first
    threads = max(1, torch.get_num_threads() // jobs)
    given = (str(bench.pipeline.device), bench.judged.samples, threads)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, given) as pool:
        list(pool.map(_run_in_worker, *zip(*others, strict=True)))


class _Bench:
    """The teacher, what is trained on, and the judge."""

    def __init__(self, device: str, samples: int):
        self.pipeline = asdm.load_pipeline("demo", device=device)
        self.examples = prepare(self.pipeline, "demo", WORK / "prepared")
        self.judged = _Judged(self.pipeline, samples)

    @fast_training()
    def run(self, name: str, seed: int, target: float) -> None:
        """Add one row."""
        key = {"name": name, "seed": seed, "target": target}
        pipeline = self.pipeline
        strip = _strip(name, target) if seed == 0 and name in DRAWN else None
        about = machine(pipeline.device)
        if name == "teacher":
            _add(key | (_known_teacher(seed) or {"steps": 0} | self.judged(pipeline, seed, strip) | about) | key)
            return
        components = variants(target)[name]
        student = _student(pipeline.unet, _plan(pipeline, _planned(name, target)), components)
        steps = _steps(self.examples, student, name, components, target)
        folder = WORK / f"{target:g}-{seed}-{name.replace(' ', '')}"
        _train(pipeline, student, components, steps, seed, folder)
        _add(key | {"steps": steps} | self.judged(_drawing(pipeline, student, name), seed, strip) | about)
        shutil.rmtree(folder, ignore_errors=True)  # none where nothing was trained


def _begin(device: str, samples: int, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    _bench = _Bench(device, samples)


def _run_in_worker(name: str, seed: int, target: float) -> None:
    _bench.run(name, seed, target)


@app.command()
def time(rounds: int = 40) -> None:
    """The UNet's speed-up of each recipe, all students of a target in turns; when nothing else runs."""
    pipeline = asdm.load_pipeline("demo")
    rows = _known()
    for target in sorted({row["target"] for row in rows}):
        students = {
            name: _student(pipeline.unet, _plan(pipeline, _planned(name, target)), components)
            for name, components in variants(target).items()
            if not name.endswith(SHORT)
        }
        calls = {name: denoiser_call(unet) for name, unet in {"teacher": pipeline.unet, **students}.items()}
        times = measure_interleaved(calls, rounds=rounds)
        for row in rows:
            if row["target"] == target:
                faster = times.speedup("teacher", row["name"].removesuffix(SHORT)).value
                row["speedup"] = _of_all_steps(row["name"], faster)
    write_text(ROWS, json.dumps(rows, indent=1) + "\n")


@app.command()
def show() -> None:
    """Mean and deviation over the seeds, the teacher first: tables in Markdown, the plot, the sheet of images."""
    rows = _known()
    for target in sorted({row["target"] for row in rows}):
        by_name = _by_name(rows, target)
        long = {name: mine for name, mine in by_name.items() if not _is_short(name)}
        _print_table(f"plan of {target:g}x", long)
        _print_table(f"plan of {target:g}x, short runs", {n: mine for n, mine in by_name.items() if n not in long})
    _plot(rows).savefig(RESULTS.parent / "ablation.png", dpi=120)
    captions = _held_out(SHOWN).prompts
    strips = [_strip(name, target) for target in LENGTHS for name in DRAWN]
    images = [_cut(Image.open(path)) for path in dict.fromkeys(strips) if path.is_file()]
    image_sheet(captions, images, across=SHOWN).save(RESULTS.parent / "ablation_images.png")


def _print_table(title: str, by_name: dict[str, list[dict[str, Any]]]) -> None:
    if not by_name:
        return
    print(f"\n| {title} | seeds | UNet | steps | {' | '.join(m.replace('_', ' ') for m in METRICS)} |")
    print("|" + "---|" * (4 + len(METRICS)))
    for name, mine in by_name.items():
        found = [_mean_and_deviation(mine, f"{metric}_heldout") for metric in METRICS]
        spread = len(mine) > 1
        cells = [f"{mean:.3f} ± {deviation:.3f}" if spread else f"{mean:.3f}" for mean, deviation in found]
        speeds = [row["speedup"] for row in mine if "speedup" in row]  # which `time` adds
        speed = f"{statistics.mean(speeds):.2f}x" if speeds else ""
        print(f"| {name} | {len(mine)} | {speed} | {mine[0]['steps']} | {' | '.join(cells)} |")


def _add(row: dict[str, Any]) -> None:
    """To the results, to which another process may be adding, too."""
    with FileLock(WORK / "lock"):
        write_text(ROWS, json.dumps([*_known(), row], indent=1) + "\n")
    console.print(row, highlight=False)


def _known() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(ROWS.read_text("utf-8")) if ROWS.is_file() else []
    return rows


def _is_known(name: str, seed: int, target: float) -> bool:
    return any((row["name"], row["seed"], row["target"]) == (name, seed, target) for row in _known())


def _sets(held_out: int) -> list[EvaluationSet]:
    """Return so many held-out pairs of one right answer, and a quarter as many seen ones."""
    by_split = {each.split: each for each in evaluation_sets("demo", None, held_out, 0)}
    seen, few = by_split["seen"], held_out // 4
    shorter = seen.model_copy(update={"prompts": seen.prompts[:few], "examples": seen.examples[:few]})
    return [shorter, by_split["held_out"]]


def _held_out(count: int) -> EvaluationSet:
    return _sets(count)[1]


def _strip(name: str, target: float) -> Path:
    """Return the first images of a recipe's first seed, side by side."""
    return SETTLED / ("teacher.png" if name == "teacher" else f"{name.replace(' ', '')}-{target:g}.png")


def _cut(strip: Image.Image) -> list[Image.Image]:
    side = strip.height
    return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]


def _known_teacher(seed: int) -> dict[str, Any] | None:
    """Return a finished run of the teacher, which is the same for every target."""
    return next((row for row in _known() if row["name"] == "teacher" and row["seed"] == seed), None)


def _by_name(rows: list[dict[str, Any]], target: float) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a target by recipe, in the recipes' order."""
    names = ["teacher", *variants(target)]
    found = {name: [row for row in rows if row["target"] == target and row["name"] == name] for name in names}
    return {name: mine for name, mine in found.items() if mine}


def _mean_and_deviation(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    values = [row[key] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _plot(rows: list[dict[str, Any]]) -> Figure:
    """Each recipe's distance to the teacher and held-out exact pairs at the first target, with the seeds' deviation."""
    by_name = _by_name(rows, min(row["target"] for row in rows))
    panels = {"teacher_distance_heldout": "distance to the teacher's images", "exact_pair_heldout": "exact pair"}
    figure = Figure(figsize=(10, 0.3 * len(by_name) + 1.2), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for place, (name, mine) in enumerate(by_name.items()):
            if name == "teacher" and key == "teacher_distance_heldout":
                continue
            mean, deviation = _mean_and_deviation(mine, key)
            colour = COLOURS.get(_recipe(name), "tab:gray")
            axes.errorbar(mean, place, xerr=deviation, fmt="o", color=colour, capsize=3)
        axes.set_title(f"{title}, held out", fontsize=10)
        axes.set_yticks(range(len(by_name)), list(by_name))
        axes.grid(axis="x", color="gainsboro")
        axes.set_axisbelow(True)
    figure.axes[0].invert_yaxis()
    return figure


def _train(
    pipeline: DiffusionPipeline,
    student: UNet2DConditionModel,
    components: tuple[str, ...],
    steps: int,
    seed: int,
    folder: Path,
) -> None:
    if "compensation" in components:
        asdm.fit_compensation(pipeline, student, data="demo", seed=seed)
    if steps:
        stages = _stages(student, components, steps)
        data = _recorded(pipeline, stages)[0] if RECORDED in components else WORK / "prepared"
        asdm.distill(pipeline, student, data, folder, stages=stages, seed=seed)
    asdm.fold_compensation(student)


def _plan(pipeline: DiffusionPipeline, target: float) -> PruningPlan:
    """Removals of units alone, repaired: GRI is a component here, and not the planner's choice."""
    path = SETTLED / f"plan-{target:g}.json"
    if not path.is_file():
        known = WORK / "redundancy.json"
        if not known.is_file():
            asdm.analyze(pipeline, data="demo", compensate="linear").save(known)
        redundancy = RedundancyMap.load(known).model_copy(update={"others": []})
        made = asdm.make_plan(redundancy, speedup=MARGIN * target, unet=pipeline.unet)
        SETTLED.mkdir(parents=True, exist_ok=True)
        asdm.refine_plan(pipeline, redundancy, made, data="demo", rounds=REPAIR_ROUNDS).save(path)
    return PruningPlan.load(path)


def _student(unet: UNet2DConditionModel, plan: PruningPlan, components: tuple[str, ...]) -> UNet2DConditionModel:
    """Return the student of the plan's removals, and of what the components add to them."""
    kind = "linear" if "compensation" in components else "none"
    removals = [Remove(unit=edit.unit, compensate=kind) for edit in plan.edits if isinstance(edit, Remove)]
    edits: list[Any] = list(removals)
    if "gri" in components:
        gone = [edit.unit for edit in removals]
        outer = outer_self_attentions(unet)
        kept = [name for name in outer if not any(name == unit or name.startswith(f"{unit}.") for unit in gone)]
        edits += [GriAttention(unit=name, regions=2, pool=2, weighted=True) for name in kept]
    full = PruningPlan.for_unet(unet, edits)
    for router in (router for name, router in EXPERTS.items() if name in components):
        full = asdm.add_cond_conv(full, unet, params=BANKS, router=router)
    return build_student(unet, full)


def _stages(student: UNet2DConditionModel, components: tuple[str, ...], steps: int) -> list[Stage]:
    weights = WEIGHTS if "normalised" in components else LossWeights()
    changes: dict[str, Any] = {
        "relative": "normalised" in components,
        "feature_weighting": "spatial" if "normalised" in components else "block",
        "timestep_sampling": "uniform_angle" if "normalised" in components else "uniform",
        "min_timestep_fraction": SWITCHED_BELOW if EARLY in components else 0.0,
        "caption_mixing": CAPTION_MIXING if "splice" in components else 0.0,
        "optimizer": "muon" if "muon" in components else "adamw",
        "losses": weights.model_copy(update={"semantic": SEMANTIC_WEIGHT if "sas" in components else 0.0}),
        "semantics": SEMANTICS,
        "teacher": "recorded" if RECORDED in components else "live",
    }
    if "incubation" in components:
        stages = incubation_stages(student, steps)
    else:
        stages = [Stage(name="joint", **default_hyperparameters(student, steps))]
    stages = [stage.model_copy(update=changes) for stage in stages]
    return with_captions(stages, _captions()) if ON_CAPTIONS in components else stages


def _captions() -> Path:
    """Write and return a file of captions to supervise without images: all but those that the judge looks at."""
    path = WORK / "captions.txt"
    examples = [each for each in open_data("demo", "all").examples if not each.held_out or each.held_out_kind]
    write_text(path, "".join(f"{each.caption}\n" for each in examples))
    return path


def _is_short(name: str) -> bool:
    """Return whether a recipe's runs are of the length of the components one by one."""
    return name not in ("teacher", *NAMED, *HARD, FROM_DISK, f"joint + {ON_CAPTIONS}")


def _recipe(name: str) -> str:
    """Return a recipe's name without the length of the run, and what draws."""
    return name.removesuffix(SHORT).removesuffix(SWITCHING)


def _planned(name: str, target: float) -> float:
    """Return the speed-up of the student's plan, where the target is that of all steps."""
    return FAST_SPEEDUP if name.endswith(SWITCHING) else target


def _drawing(pipeline: DiffusionPipeline, student: UNet2DConditionModel, name: str) -> DiffusionPipeline:
    if not name.endswith(SWITCHING):
        return asdm.with_unet(pipeline, student)
    return asdm.switch_unets(pipeline, [student, pipeline.unet], below=[SWITCHED_BELOW])


def _of_all_steps(name: str, faster: float) -> float:
    """Return the speed-up of all UNet calls of an image, where the student's is `faster`."""
    originals = LAST_STEPS if name.endswith(SWITCHING) else 0
    return round(STEPS / ((STEPS - originals) / faster + originals), 3)


def _costs(examples: TrainingSet, target: float) -> dict[str, float]:
    """Seconds of each kind of step (`_kinds_of_step`) on the CPU, measured in turns with all others, and of what is
    done once before them."""
    path = SETTLED / f"seconds-a-step-{target:g}.json"
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    pipeline = asdm.load_pipeline("demo")
    calls: dict[str, Callable[[], Any]] = {}
    once: dict[str, float] = {}
    plan = _plan(pipeline, target)
    for name, components in variants(target).items():
        if not name.endswith((SHORT, SWITCHING)):
            student = _student(pipeline.unet, plan, components)
            stages, given = _stages(student, components, 1000), examples
            if RECORDED in components:
                folder, once[RECORDING] = _recorded(pipeline, stages)
                given = prepare(pipeline, folder, folder, recorded=True)
            for kind, (stage, _) in _kinds_of_step(name, stages).items():
                calls[kind] = _step_of(pipeline, student, given, stage)
    times = measure_interleaved(calls, rounds=COST_ROUNDS, warmup=1)
    student = _student(pipeline.unet, plan, COMPONENTS)
    once[FIT] = round(seconds_of(lambda: asdm.fit_compensation(pipeline, student, data="demo")), 1)
    found = {kind: round(times[kind].ms / 1000, 4) for kind in calls} | once
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def _recorded(pipeline: DiffusionPipeline, stages: list[Stage]) -> tuple[Path, float]:
    """Return a folder of prepared data with the teacher's predictions, and how many seconds it took to record them."""
    folder, timed = WORK / "recorded", WORK / "recorded.json"
    with FileLock(WORK / "recorded.lock"):
        if not timed.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            prepare(pipeline, "demo", folder)
            seconds = seconds_of(lambda: asdm.record_teacher(pipeline, folder, stages=stages, draws=DRAWS))
            write_text(timed, json.dumps(round(seconds, 1)))
    return folder, json.loads(timed.read_text("utf-8"))


def _kinds_of_step(name: str, stages: list[Stage]) -> dict[str, tuple[Stage, float]]:
    """Return the steps of a recipe that cost differently, by scope and whether the semantic loss is looked at: a
    stage of that kind, and the kind's share of the steps."""
    steps, looks = sum(stage.steps for stage in stages), 1 / SEMANTICS.every
    found: dict[str, tuple[Stage, float]] = {}
    for stage in stages:
        plain = stage.model_copy(update={"losses": stage.losses.model_copy(update=dict.fromkeys(LOOKING, 0.0))})
        looking = stage.scope == "joint" and any(getattr(stage.losses, loss) for loss in LOOKING)
        for suffix, each, part in (("", plain, 1 - looks * looking), (", semantic", stage, looks * looking)):
            if part:
                kind = f"{_recipe(name)}, {stage.scope}{suffix}"
                share = found[kind][1] if kind in found else 0.0
                found[kind] = (each, share + part * stage.steps / steps)
    return found


def _steps(
    examples: TrainingSet,
    student: UNet2DConditionModel,
    name: str,
    components: tuple[str, ...],
    target: float,
) -> int:
    """Return how many steps cost the same as those of BK-SDM's recipe at the target; the fit before them counts,
    too."""
    if name == UNTRAINED:
        return 0
    length = SHORT_LENGTH if _is_short(name) else LENGTHS[target]
    seconds = length * _costs(examples, target)["bk-sdm, joint"]
    costs = _costs(examples, _planned(name, target))
    seconds -= costs[FIT] if "compensation" in components else 0.0
    seconds -= costs[RECORDING] if RECORDED in components else 0.0
    kinds = _kinds_of_step(name, _stages(student, components, length))
    return round(seconds / sum(costs[kind] * share for kind, (_, share) in kinds.items()))


def _step_of(
    pipeline: DiffusionPipeline, student: UNet2DConditionModel, examples: TrainingSet, stage: Stage
) -> Callable[[], None]:
    """Return a training step of the stage: forward, backward, optimiser."""
    task = make_task(pipeline, student, examples, stage)
    wanted = set(task.trained())
    indices = ShuffledBatches(len(examples), stage.batch_size, 0)(0)
    accelerator = make_accelerator(pipeline.device, stage.mixed_precision)

    def step() -> None:
        for name, parameter in task.named_parameters():
            parameter.requires_grad_(name in wanted)
        optimizer = make_optimizer(task.trained(), stage.optimizer, 1e-9, (0.9, 0.99), 0.0, {})
        with torch.enable_grad(), accelerator.autocast():
            loss = task((indices, 0), torch.Generator().manual_seed(0))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Judged:
    """Figures of a pipeline's images on the fixed prompts, beside the teacher's of the same seeds."""

    def __init__(self, pipeline: DiffusionPipeline, samples: int):
        self.judge = Judge(pipeline.device)
        self.sets = _sets(samples)
        self.real = RealImages.of("demo", self.sets, self.judge, pipeline, load_clip(pipeline))
        self.pipeline, self.samples = pipeline, samples

    def __call__(self, pipeline: DiffusionPipeline, seed: int, strip: Path | None) -> dict[str, float]:
        figures: dict[str, float] = {"images": self.samples}
        for each in self.sets:
            images = asdm.generate(pipeline, each.prompts, steps=STEPS, seed=1000 * seed)
            if strip is not None and each.split == "held_out":
                to_images(torch.cat(list(images[:SHOWN]), dim=2)[None])[0].save(strip)
            features = self.judge.features(images)
            expected = self._teacher_features(each, seed, features if pipeline is self.pipeline else None)
            found = self.real.metrics(images, features, each.examples)
            found |= self.real.target_metrics(features, each.examples)
            found["teacher_distance"] = feature_distance(features, expected)
            split = each.split.replace("_", "")
            figures |= {f"{metric}_{split}": round(float(found[metric]), 4) for metric in METRICS}
        return figures

    def see_teacher(self, seed: int) -> None:
        """Draw the teacher's images now, of which all processes keep the features."""
        for each in self.sets:
            self._teacher_features(each, seed, None)

    def _teacher_features(self, each: Any, seed: int, known: Tensor | None) -> Tensor:
        path = WORK / f"teacher-{each.split}-{seed}-{self.samples}.pt"
        if not path.is_file():
            if known is None:
                known = self.judge.features(asdm.generate(self.pipeline, each.prompts, seed=1000 * seed))
            torch.save(known, path)
        return torch.load(path, weights_only=True)


if __name__ == "__main__":
    common.run(app)
