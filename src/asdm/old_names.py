"""Names that files saved by earlier versions use, and what they are called now.

Plans, recipes and student folders saved before a rename still load: each reader passes what it read through `renamed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLD_EDIT_KINDS = {"shorten": "drop_layers"}
CACHE_SCHEDULE = {"computed": "full_steps", "whole_ms": "full_ms", "inheriting_ms": "cached_ms"}
EXPORTED_FOLDER = {"inherit": "cache"}
OUTER_GRAPH_INPUT = "inherited"  # an exported graph's input for cached features
# Evaluations of 0.1.0: latencies by their median and quartiles.
LATENCY = {"median_ms": "ms", "lower_quartile_ms": "low_ms", "upper_quartile_ms": "high_ms"}
# Results of `asdm benchmark`: fields of a row, and its groups.
BENCHMARK_ROW = {"seconds_quartiles": "seconds_interval"}
BENCHMARK_GROUPS = {"peer": "baseline"}

OLD_COMPRESSION_SETTINGS = {"repair": "refine"}  # in the marker of a folder that `compress` wrote


def renamed(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`content` with its keys' present names, in the same order."""
    return {names.get(key, key): value for key, value in content.items()}


def benchmark_name(name: str) -> str:
    """The present name of a benchmark's method: feature caching was called inheritance."""
    return name.replace("inheritance, layer, ", "caching, ").replace("inheritance, ", "caching, ")
