"""Baselines: methods of other authors, from their own packages, unmodified.

Those that patch a denoiser patch a copy of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import (
    DiffusionPipeline,
    PyramidAttentionBroadcastConfig,
    StableDiffusionPipeline,
    apply_pyramid_attention_broadcast,
)

from asdm.benchmark.method import Method, at_every
from asdm.diffusion.kinds import is_sdxl
from asdm.errors import AsdmError, needs_extra
from asdm.families import component_of, denoiser_of, family_of
from asdm.pipelines.derived import with_unet

GROUP = "baseline"
_ALL_TIMESTEPS = (0, 1000)


def with_copied_denoiser(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a second pipeline with a copy of the denoiser, which can be patched."""
    return with_unet(pipeline, copy.deepcopy(denoiser_of(pipeline)))


def tome(steps: int, ratio: float) -> Method:
    """Token merging (arXiv 2303.17604), package tomesd."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with needs_extra("benchmark", "ToMe"):
            import tomesd
        patched = with_copied_denoiser(pipeline)
        tomesd.apply_patch(patched, ratio=ratio, max_downsample=1)
        yield patched

    return Method(f"ToMe, ratio {ratio:g}", GROUP, prepared, steps)


def deep_cache(steps: int, interval: int) -> Method:
    """DeepCache (arXiv 2312.00858), package DeepCache."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with needs_extra("benchmark", "DeepCache"):
            from DeepCache import DeepCacheSDHelper
        patched = with_copied_denoiser(pipeline)
        helper = DeepCacheSDHelper(pipe=patched)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            yield patched
        finally:
            helper.disable()

    return Method(f"DeepCache, interval {interval}", GROUP, prepared, steps, at_every(interval))


def attention_broadcast(steps: int, skip: int) -> Method:
    """Pyramid attention broadcast (arXiv 2408.12588), of diffusers."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        patched = with_copied_denoiser(pipeline)
        denoiser = denoiser_of(patched)
        timestep = {"now": 0}
        handle = denoiser.register_forward_pre_hook(
            lambda _module, args, kwargs: timestep.update(now=int(kwargs.get("timestep", args[1] if args[1:] else 0))),
            with_kwargs=True,
        )
        blocks = tuple({block.partition(".")[0]: None for block in family_of(denoiser).blocks(denoiser)})
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip,
            cross_attention_block_skip_range=skip,
            spatial_attention_timestep_skip_range=_ALL_TIMESTEPS,
            cross_attention_timestep_skip_range=_ALL_TIMESTEPS,
            spatial_attention_block_identifiers=blocks,
            cross_attention_block_identifiers=blocks,
            current_timestep_callback=lambda: timestep["now"],
        )
        apply_pyramid_attention_broadcast(denoiser, config)
        try:
            yield patched
        finally:
            handle.remove()

    return Method(f"PAB, skip {skip}", GROUP, prepared, steps, at_every(skip))


class _GatedPipeline(StableDiffusionPipeline):
    """Calls the method that T-GATE's loader adds to a pipeline."""

    gate_step: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tgate(*args, gate_step=self.gate_step, **kwargs)


def t_gate(steps: int, gate_step: int) -> Method:
    """T-GATE (arXiv 2404.02747), package tgate, with defaults for its other settings."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with needs_extra("benchmark", "T-GATE"):
            from tgate import TgateSDLoader
        if is_sdxl(pipeline):
            raise AsdmError("T-GATE: the benchmark has it for SD 1.x and 2.x only")
        parts = {**pipeline.components, component_of(pipeline): copy.deepcopy(denoiser_of(pipeline))}
        patched = _GatedPipeline(**parts, requires_safety_checker=False)
        patched.set_progress_bar_config(disable=True)
        patched.gate_step = gate_step
        yield TgateSDLoader(patched)

    def kinds(step: int) -> str:
        """As tgate_scheduler of that package decides, with sp_interval 5, fi_interval 1 and warm_up 2."""
        if step >= gate_step:
            return "gated"
        return "reusing" if 2 < step < gate_step - 1 and step % 5 else "whole"

    # Its package replaces the loop of text-to-image alone.
    return Method(f"T-GATE, gate {gate_step}", GROUP, prepared, steps, kinds, image_to_image=False)
