"""Names that files saved by earlier versions use, and what they are called now.

Plans, recipes and student folders saved before a rename still load: each reader passes what it read through `renamed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLD_EDIT_KINDS = {"shorten": "drop_layers"}
OLD_PLAN_FIELDS = {"figures": "metrics"}
OLD_UNIT_FIELDS = {"has_shortcut": "projection_folds"}  # of a redundancy profile's units
OLD_COMPRESSION_SETTINGS = {"repair": "refine"}  # in the marker of a folder that `compress` wrote
OLD_CACHE_SCHEDULE_FIELDS = {"computed": "full_steps", "whole_ms": "full_ms", "inheriting_ms": "cached_ms"}
OLD_EXPORT_SETTINGS = {"inherit": "cache"}
OLD_OUTER_GRAPH_INPUT = "inherited"  # an exported graph's input for cached features
# Evaluations of 0.1.0: latencies by their median and quartiles.
OLD_LATENCY_FIELDS = {"median_ms": "ms", "lower_quartile_ms": "low_ms", "upper_quartile_ms": "high_ms"}
# Results of `asdm benchmark`: fields of a row, and its groups.
OLD_BENCHMARK_FIELDS = {"seconds_quartiles": "seconds_interval"}
OLD_BENCHMARK_GROUPS = {"peer": "baseline"}
# Results of `asdm evaluate --protocol demo`: fields of a row, and metrics.
OLD_JUDGED_FIELDS = {"fid": "frechet_distance"}
OLD_JUDGED_NETWORKS = {"FID": "FD"}
OLD_STAGE_FIELDS = {
    "features_by": "feature_weighting",
    "timesteps": "timestep_sampling",
    "assembled": "student_blocks",
    "caption_splice": "caption_mixing",
    "timesteps_above": "min_timestep_fraction",
}
OLD_STAGE_VALUES = {"feature_weighting": {"area": "spatial"}, "timestep_sampling": {"angle": "uniform_angle"}}


def renamed(
    content: Mapping[str, Any], names: Mapping[str, str], values: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """`content` with its keys' present names, in the same order; with the present names of the `values` of some keys,
    by the keys' present names."""
    found = {names.get(key, key): value for key, value in content.items()}
    for key, table in (values or {}).items():
        if isinstance(found.get(key), str):
            found[key] = table.get(found[key], found[key])
    return found


def renamed_stage(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a distillation stage, as recipes, run records and `asdm.json` hold it, with the present names."""
    return renamed(content, OLD_STAGE_FIELDS, OLD_STAGE_VALUES)


def benchmark_name(name: str) -> str:
    """Return the present name of a benchmark's method: feature caching was called inheritance."""
    return name.replace("inheritance, layer, ", "caching, ").replace("inheritance, ", "caching, ")
