"""Loading models as the command line's options name them."""

from __future__ import annotations

from typing import Any


def load_model(model: str, device: str | None = None, dtype: str = "float32", **claims: Any) -> Any:
    """Load a pipeline; `claims` are `prediction_type` and `config`, which override what the checkpoint says."""
    import torch

    import asdm
    from asdm.devices import fastest_device

    return asdm.load_pipeline(model, dtype=getattr(torch, dtype), device=device or fastest_device(), **claims)
