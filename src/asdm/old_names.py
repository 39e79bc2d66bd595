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


def renamed(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`content` with its keys' present names, in the same order."""
    return {names.get(key, key): value for key, value in content.items()}
