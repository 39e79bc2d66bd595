"""The embedded default: a small Stable Diffusion pipeline, its captioned images and how both were made."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def pipeline_folder() -> Path:
    """The embedded pipeline, in stock diffusers format."""
    return _ASSETS / "pipeline"


def images_folder() -> Path:
    """The embedded captioned images: an ordinary data folder (`metadata.jsonl`)."""
    return _ASSETS / "emoji"
