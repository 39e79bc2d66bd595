"""What each part of a student's architecture is worth. Each command prints a table and writes its results.

    python benchmarks/student.py compensation     # embedded pipeline: error after pruning, by kind of map
    python benchmarks/student.py folding          # what projections cost, and what is left of it once they are folded
    python benchmarks/student.py taylor           # the estimate beside the ablation: how near, and at what cost
    python benchmarks/student.py gri              # embedded pipeline: GRI's and ToMe's error, untrained
    python benchmarks/student.py gri-speed        # SD 1.5's shape: GRI and ToMe beside full attention
    python benchmarks/student.py cond-conv        # SD 1.5's shape: the overhead of expert kernels
    python benchmarks/student.py presets          # SD 1.5's shape: a plan of each preset
    python benchmarks/student.py images asdm-demo # what students draw of held-out prompts, below the original's images

ToMe comes from its own package: pip install -e '.[benchmark]'.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import typer
from ablation_recipes import SETTLED
from common import RESULTS, finish, held_out_set, run, without_second_layers
from diffusers import UNet2DConditionModel
from scipy.stats import spearmanr

import asdm
from asdm import checks
from asdm.benchmark.techniques import outer_self_attentions
from asdm.compensation.fitting import prediction_error, predictions
from asdm.compensation.folding import fold_projections
from asdm.data.calibration import calibration_calls
from asdm.edits.projections import Projection
from asdm.errors import needs_extra
from asdm.evaluation.plots import image_sheet
from asdm.families import denoiser_call, family_of
from asdm.images import to_images
from asdm.measure.latency import Latency, Ratio, measure_interleaved
from asdm.measure.macs import counting_macs
from asdm.measure.memory import peak_megabytes
from asdm.measure.modules import timing_modules
from asdm.pipelines.random_models import UNETS, random_unet
from asdm.planning.budget import require_budget
from asdm.planning.presets import PRESETS
from asdm.sensitivity.analysis import structure_map
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
KINDS = ("none", "bias", "diagonal", "linear")
REPAIRS = (0, 2)  # rounds


@app.command()
def compensation(target: float = 1.5) -> None:
    """The prediction's error, untrained, with each kind of map at one speed-up: between the plans on both sides of it,
    each kind's by its own sensitivities; as planned, and repaired."""
    pipeline = asdm.load_pipeline("demo")
    rows, calls = [], {"original": denoiser_call(pipeline.unet)}
    for kind in KINDS:
        redundancy = asdm.analyze(pipeline, data="demo", compensate=kind)
        for kept in (0.75, 0.65):
            made = asdm.make_plan(redundancy, macs=kept, compensate=kind, unet=pipeline.unet)
            for repair in REPAIRS:
                plan = asdm.refine_plan(pipeline, redundancy, made, data="demo", rounds=repair)
                row = {"compensate": kind, "repair": repair, "macs_kept": kept, "edits": len(plan.edits)}
                rows.append(row | {"error": plan.metrics.measured_sensitivity})
                student = build_student(pipeline.unet, plan)
                fold_projections(student)
                calls[str(len(rows))] = denoiser_call(student)
    times = measure_interleaved(calls, rounds=30)
    for number, row in enumerate(rows, start=1):
        row["speedup"] = times.speedup("original", str(number)).value
    for kind, repair in itertools.product(KINDS, REPAIRS):
        on_both_sides = sorted(
            (row["speedup"], row["error"]) for row in rows if (row["compensate"], row["repair"]) == (kind, repair)
        )
        error = float(np.interp(target, *zip(*on_both_sides, strict=True)))
        between = {"compensate": kind, "repair": repair, "macs_kept": "between", "edits": ""}
        rows.append(between | {"error": error, "speedup": target})
    finish("compensation", rows)


@app.command()
def folding(target: float = 1.5, rounds: int = 10, only: str = "embedded,sd15") -> None:
    """Latency (batch 1), MACs and projections of a plan's student, untrained: without projections, with them, and with
    them folded. The plan is the ablation's. It removes the same units of SD 1.5's shape."""
    for shape in only.split(","):
        checks.one_of("embedded", *UNETS)("only", shape)
    plan = PruningPlan.load(SETTLED / f"plan-{target:g}.json")
    rows: list[dict[str, Any]] = []
    for shape in only.split(","):
        unet = asdm.load_pipeline("demo").unet if shape == "embedded" else random_unet(UNETS[shape]).eval()
        models = {}
        for name, kind in (("removed", "none"), ("projections", "linear"), ("folded", "linear")):
            edits = [asdm.Remove(unit=edit.unit, compensate=kind) for edit in plan.edits]
            models[name] = build_student(unet, PruningPlan.for_unet(unet, edits))
        del unet
        fold_projections(models["folded"])
        for row in timed(models, rounds):
            student = models[row["model"]]
            with counting_macs(student) as count:
                denoiser_call(student, batch_size=1)()
            left = sum(isinstance(module, Projection) for module in student.modules())
            rows.append({"shape": shape, **row, "projections": left, "gmacs": count.below() / 1e9})
    finish("folding", rows, target=target)


@app.command()
def taylor() -> None:
    """Spearman correlation of the Taylor estimate with the ablation on the embedded pipeline; and what a time step
    costs, there and at SD 1.5's size (random weights), where the ablation's cost is the least that it needs."""
    pipeline = asdm.load_pipeline("demo")
    maps = {kind: asdm.analyze(pipeline, data="demo", sensitivity=kind) for kind in ("ablation", "taylor")}
    values = {kind: [unit.sensitivity for unit in found.units] for kind, found in maps.items()}
    rows = [
        {
            "model": "embedded",
            "estimator": kind,
            "unet_forwards": found.unet_forwards / len(found.timesteps),
            "spearman_with_ablation": float(spearmanr(values["ablation"], values[kind]).statistic),
        }
        for kind, found in maps.items()
    ]
    pipeline = asdm.load_pipeline("random:sd15")
    found = asdm.analyze(pipeline, sensitivity="taylor", compensate="none", timesteps=1, latency_rounds=2)
    for kind, forwards in (("ablation", found.necessary_forwards), ("taylor", found.unet_forwards)):
        rows.append({"model": "SD 1.5", "estimator": kind, "unet_forwards": forwards})
    finish("taylor", rows)


@app.command()
def gri() -> None:
    """The prediction's error with GRI in the outer self-attentions, and with ToMe there, both untrained."""
    tomesd = tome()
    pipeline = asdm.load_pipeline("demo")
    unet = pipeline.unet
    calls = calibration_calls(pipeline, "demo", None, timesteps=8, samples=16, seed=1)
    wanted = predictions(unet, calls)
    units = outer_self_attentions(unet)
    rows = []
    for regions in (2, 4, 8):
        for pool in (0, 2, 4):
            for weighted in (False, True) if pool else (False,):
                student = with_gri(unet, units, regions, pool, weighted)
                rows.append(
                    {
                        "attention": "GRI",
                        "settings": f"regions {regions}, pool {pool}" + (", weighted" if weighted else ""),
                        "keys_of_a_query": keys_of_a_query(student, units[0]),
                        "error": prediction_error(student, calls, wanted),
                    }
                )
    for ratio in (0.3, 0.5, 0.7):
        patched = tomesd.apply_patch(copy.deepcopy(unet), ratio=ratio, max_downsample=1)
        tokens = round(unet.config.sample_size**2 * (1 - ratio))
        error = prediction_error(patched, calls, wanted)
        rows.append({"attention": "ToMe", "settings": f"ratio {ratio}", "keys_of_a_query": tokens, "error": error})
    finish("gri", rows)


@app.command("gri-speed")
def gri_speed(size: int = 64, rounds: int = 6) -> None:
    """Latency of SD 1.5's UNet (random weights, batch 1) with the outer self-attentions replaced; and without them and
    their projections, which is the limit."""
    tomesd = tome()
    unet = random_unet({**UNETS["sd15"], "sample_size": size}).eval()
    units = outer_self_attentions(unet)
    models = {"full attention": unet}
    for count in (4, 8):  # each model takes 3.4 GB
        models[f"GRI, regions {count}, pool {count}, weighted"] = with_gri(unet, units, count, count, weighted=True)
    models["ToMe, ratio 0.5"] = tomesd.apply_patch(copy.deepcopy(unet), ratio=0.5)
    removed = [asdm.Remove(unit=unit) for unit in units]
    models["none at all"] = build_student(unet, PruningPlan.for_unet(unet, removed))
    finish(f"gri_speed_{8 * size}px", timed(models, rounds))


@app.command("cond-conv")
def cond_conv(rounds: int = 6) -> None:
    """Latency of SD 1.5's UNet (random weights) pruned to BK-SDM-Base, without expert kernels and with them; whole,
    and by stage."""
    unet = random_unet(UNETS["sd15"]).eval()
    plan = without_second_layers(unet)
    models = {"pruned": build_student(unet, plan)}
    for router in ("time", "input", "prompt"):
        models[f"router {router}"] = build_student(unet, asdm.add_cond_conv(plan, unet, router=router))
    with ExitStack() as entered:
        seconds = {name: entered.enter_context(timing_modules(m, family_of(m).blocks(m))) for name, m in models.items()}
        rows = [{"stage": "all"} | row for row in timed(models, rounds)]
    for stage in family_of(unet).blocks(unet):
        latencies = {name: Latency.of(seconds[name][stage]) for name in models}
        for name, latency in latencies.items():
            faster = str(Ratio.of(latencies["pruned"], latency))
            rows.append({"stage": stage, "model": name, "ms": latency.ms, "speedup": faster})
    finish("cond_conv_speed", rows)


@app.command()
def presets(rounds: int = 4, only: str = ",".join(PRESETS)) -> None:
    """Latency of SD 1.5's UNet (random weights, batch 1) with each preset's plan."""
    for preset in only.split(","):
        require_budget(None, None, None, preset)
    unet = random_unet(UNETS["sd15"]).eval()
    redundancy = structure_map(unet)
    rows = []
    for preset in only.split(","):
        plan = asdm.make_plan(redundancy, preset=preset, unet=unet)
        student = build_student(unet, plan)
        fold_projections(student)
        row = timed({"original": unet, preset: student}, rounds)[1]
        size = sum(p.numel() for p in student.parameters()) / 1e6
        rows.append({"preset": preset, "parameters_m": size, **{k: v for k, v in row.items() if k != "model"}})
        del student
    finish("presets", rows)


def with_gri(
    unet: UNet2DConditionModel, units: list[str], regions: int, pool: int, weighted: bool = False
) -> UNet2DConditionModel:
    edits = [asdm.GriAttention(unit=unit, regions=regions, pool=pool, weighted=weighted) for unit in units]
    return build_student(unet, PruningPlan.for_unet(unet, edits))


def tome() -> Any:
    """Return the package of ToMe; the other commands do without."""
    with needs_extra("benchmark", "ToMe"):
        import tomesd
    return tomesd


def keys_of_a_query(student: UNet2DConditionModel, unit: str) -> int:
    """In an outermost attention, whose map is as large as the latents."""
    side = student.config.sample_size
    return student.get_submodule(unit).processor.keys_per_query(side, side)


def timed(models: dict[str, UNet2DConditionModel], rounds: int) -> list[dict[str, Any]]:
    calls = {name: denoiser_call(model, batch_size=1) for name, model in models.items()}
    times = measure_interleaved(calls, rounds=rounds, warmup=1)
    first = next(iter(times))
    return [
        {
            "model": name,
            "ms": time.ms,
            "interval_ms": f"{time.low_ms:.0f}-{time.high_ms:.0f}",
            "speedup": str(times.speedup(first, name)),
            "activations_mb": peak_megabytes(calls[name]),
        }
        for name, time in times.items()
    ]


@app.command()
def images(students: list[Path], count: int = 24) -> None:
    """Draw held-out prompts of one right answer with the original and with students of it, from the same noise."""
    original = asdm.load_pipeline("demo")
    held_out = held_out_set(count)
    pipelines = [original, *map(asdm.load_pipeline, students)]
    rows = [to_images(asdm.generate(pipeline, held_out.prompts)) for pipeline in pipelines]
    image_sheet(held_out.prompts, rows, side=96).save(RESULTS.parent / "students.png")


if __name__ == "__main__":
    run(app)
