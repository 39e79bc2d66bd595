"""The embedded pipeline of `asdm`: a small Stable Diffusion pipeline and its captioned images.

`tools/demo` builds them. `asdm` knows them by their registered name, `demo`.
"""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def pipeline_folder() -> Path:
    """Return the embedded pipeline, in stock diffusers format."""
    return _ASSETS / "pipeline"


def images_folder() -> Path:
    """Return the embedded captioned images: an ordinary data folder (`metadata.jsonl`)."""
    return _ASSETS / "emoji"
