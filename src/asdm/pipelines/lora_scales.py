"""The scales that diffusers saves in the metadata of a LoRA's file, as its tensors hold none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asdm.errors import AsdmError, one_line
from asdm.reading import parse_json

ADAPTER_CONFIG = "lora_adapter_metadata"  # ranks and scales by the layers' names
_ENDLESS = 1e9  # no alpha is as large
_OF_LORA = re.compile(r"\.lora[_.].+")


def adapter_config(metadata: Mapping[str, str], lora: Path) -> dict[str, Any]:
    """Return diffusers' config of the adapters, whose fields begin with the component's name; empty where there is
    none.

    Raises:
        AsdmError: it is damaged.
    """
    try:
        found = parse_json(metadata.get(ADAPTER_CONFIG, "{}"))
    except ValueError as error:
        raise _damaged(lora, one_line(error)) from None
    if not isinstance(found, dict):
        raise _damaged(lora, "no object")
    return found


def alpha_of(config: Mapping[str, Any], key: str, rank: int, lora: Path) -> float | None:
    """Return the rank times the scale that a config gives the layer of a tensor; None where it says nothing of the
    component.

    Raises:
        AsdmError: it is damaged, or tells layers by more than their names.
    """
    component, _, inside = key.partition(".")
    start = f"{component}."
    of_component = {name.removeprefix(start): value for name, value in config.items() if name.startswith(start)}
    if not of_component:
        return None
    layer = _OF_LORA.sub("", inside)
    patterns = of_component.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(re.search(r"[^\w.]", name.removeprefix("^")) for name in patterns):
        raise AsdmError(f"{lora}: its alpha_pattern has no plain names of layers; save the LoRA with those")
    ends = ((name.removeprefix("^"), alpha) for name, alpha in patterns.items())
    alpha = next((each for end, each in ends if f".{layer}".endswith(f".{end}")), of_component.get("lora_alpha"))
    if not (isinstance(alpha, int | float) and abs(alpha) < _ENDLESS):
        raise _damaged(lora, "lora_alpha")
    return float(alpha) * (math.sqrt(rank) if of_component.get("use_rslora") else 1)


def _damaged(lora: Path, what: str) -> AsdmError:
    return AsdmError(f"{lora}: its metadata {ADAPTER_CONFIG} is damaged ({what}); download it again")
