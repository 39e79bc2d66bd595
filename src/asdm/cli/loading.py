"""Loading models as the command line's options name them."""

from __future__ import annotations

from typing import Any


def load_with_decoder(
    model: str, decoder: str | None, device: str | None = None, dtype: str = "float32", **claims: Any
) -> Any:
    """Load a pipeline with a tiny decoder in the place of its VAE, if one is named.

    Raises:
        AsdmError: the name cannot be a decoder's, before the pipeline is loaded; or the decoder does not fit.
    """
    import asdm

    require_decoder_named(decoder)
    pipeline = load_model(model, device, dtype, **claims)
    return pipeline if decoder is None else asdm.with_decoder(pipeline, decoder)


def require_decoder_named(decoder: str | None) -> None:
    """Raise an AsdmError for a name that cannot be a tiny decoder's; None passes."""
    if decoder is not None:
        from asdm.pipelines import decoders

        decoders.require_decoder_named(decoder)


def load_model(model: str, device: str | None = None, dtype: str = "float32", **claims: Any) -> Any:
    """Load a pipeline; `claims` are `prediction_type` and `config`, which override what the checkpoint says."""
    import torch

    import asdm
    from asdm.devices import fastest_device

    return asdm.load_pipeline(model, dtype=getattr(torch, dtype), device=device or fastest_device(), **claims)
