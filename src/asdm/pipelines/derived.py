"""Pipelines that share all parts of another one but one."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from asdm import checks
from asdm.diffusion.kinds import extra_arguments
from asdm.families import Denoiser, component_of, denoiser_of


@checks.arguments(pipeline=checks.PIPELINE, unet=checks.a(nn.Module))
def with_unet(pipeline: DiffusionPipeline, unet: Denoiser) -> DiffusionPipeline:
    """Make a second pipeline that shares everything with `pipeline` but the UNet."""
    return _with_parts(pipeline, **{component_of(pipeline): unet})


def with_scheduler(pipeline: DiffusionPipeline, scheduler: Any) -> DiffusionPipeline:
    """Make a second pipeline that shares everything with `pipeline` but the scheduler."""
    return _with_parts(pipeline, scheduler=scheduler)


def with_vae(pipeline: DiffusionPipeline, vae: Any) -> DiffusionPipeline:
    """Make a second pipeline that shares everything with `pipeline` but the VAE."""
    return _with_parts(pipeline, vae=vae)


def _with_parts(pipeline: DiffusionPipeline, **others: Any) -> DiffusionPipeline:
    parts = {**pipeline.components, **others}
    other = type(pipeline)(**parts, **extra_arguments(pipeline))
    other.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
    other.set_progress_bar_config(disable=True)
    return other


def without_safety_checker(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline, or where it has a safety checker, a second one without it.

    A safety checker replaces images by black ones, which must not be judged as generated images.
    """
    if getattr(pipeline, "safety_checker", None) is None:
        return pipeline
    other = with_unet(pipeline, denoiser_of(pipeline))
    other.register_modules(safety_checker=None)
    other.register_to_config(requires_safety_checker=False)
    return other
