"""Readers of plans, profiles, schedules, recipes and other records."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from asdm import (
    CacheSchedule,
    Evaluation,
    PruningPlan,
    RedundancyMap,
)
from asdm.benchmark.results import Benchmark
from asdm.distillation.recipes import as_yaml, joint_stages, read_stages
from asdm.families import family_of
from asdm.files import MARKER, require_ours
from asdm.pipelines.claims import claim_of, settled
from asdm.pipelines.noise_schedules import scheduler_for
from asdm.student.surgery import model_without_weights
from fuzzing import inputs
from fuzzing.readers.base import HERE, of_file, pipeline, plan, profile, reader, unet, written


@reader(10, lambda: inputs.json_files(json.loads(plan().to_json())))
def plans(folder: Path, content: bytes) -> None:
    found = PruningPlan.load(written(folder, "plan.json", content))
    model_without_weights(unet(), found.edits)
    found.require_for(unet())


@reader(6, lambda: inputs.json_files(profile()))
def redundancy_maps(folder: Path, content: bytes) -> None:
    found = RedundancyMap.load(written(folder, "profile.json", content))
    assert found.family is not None


@reader(4, lambda: inputs.json_files(of_file(HERE / "evaluation_0_1.json")))
def evaluations(folder: Path, content: bytes) -> None:
    Evaluation.load(written(folder, "evaluation.json", content))


def _schedule() -> dict[str, Any]:
    fields = {
        "fingerprint": family_of(unet()).fingerprint(unet()),
        "steps": 10,
        "full_steps": [0, 3, 6],
        "depth": 1,
        "order": 1,
        "full_ms": 2.0,
        "cached_ms": 1.0,
    }
    return fields | {"speedup": 1.5, "speedup_interval": [1.4, 1.6]}


@reader(6, lambda: inputs.json_files(_schedule()))
def cache_schedules(folder: Path, content: bytes) -> None:
    found = CacheSchedule.load(written(folder, "schedule.json", content))
    assert 0 in found.full_steps_of(20)
    found.require_fit(unet())


@reader(
    8,
    lambda: inputs.yaml_files([stage.model_dump(mode="json", exclude_none=True) for stage in joint_stages(unet(), 20)]),
)
def recipes(folder: Path, content: bytes) -> None:
    stages = read_stages(written(folder, "recipe.yaml", content))
    as_yaml(stages)


_TRAINING = {
    "model": {
        "target": "ldm.X",
        "params": {"linear_start": 0.1, "linear_end": 0.2, "timesteps": 1000, "parameterization": "v"},
    }
}


@reader(4, lambda: st.one_of(inputs.yaml_files(_TRAINING), inputs.yaml_files(dict(pipeline().scheduler.config))))
def scheduler_configs(folder: Path, content: bytes) -> None:
    for name in ("config.yaml", "config.json"):
        claim = claim_of(written(folder, name, content))
        scheduler_for(pipeline().scheduler, settled([claim], None, name))


@cache
def benchmark_files() -> tuple[Any, Any]:
    rows, runs = (of_file(HERE.parent / "docs" / "results" / f"{name}.json") for name in ("benchmark", "benchmark_run"))
    place = rows[0]["place"]
    return [row for row in rows if row["place"] == place][:3], {place: runs[place]}


@reader(2, lambda: st.tuples(*map(inputs.json_files, benchmark_files())))
def benchmark_results(folder: Path, contents: tuple[bytes, bytes]) -> None:
    written(folder, "b_run.json", contents[1])
    Benchmark.load(written(folder, "b.json", contents[0]))


@reader(3, lambda: inputs.json_files({"kind": "compression", "settings": {"model": "demo"}}))
def markers_of_folders(folder: Path, content: bytes) -> None:
    written(folder, MARKER, content)
    require_ours(folder, "pipeline")
