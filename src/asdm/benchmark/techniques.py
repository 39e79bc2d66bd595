"""Our techniques, and others without a package of their own: schedulers, students, runtimes and feature caching.

Methods are combinations of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from asdm.benchmark.method import Maker, Prepared, fresh, memoized
from asdm.caching.calibration import Observations, observe_sampling
from asdm.caching.features import cache_features
from asdm.compensation.folding import fold_projections
from asdm.diffusion.conditioning import latent_shape
from asdm.diffusion.generation import generate, is_few_step
from asdm.distillation.consistency import lcm_scheduler
from asdm.distillation.stages import Consistency
from asdm.edits import GriAttention
from asdm.edits.regional_attention import gri_kinds
from asdm.errors import AsdmError
from asdm.families import Denoiser, denoiser_of, family_of, macs_of_call
from asdm.pipelines.decoders import with_decoder
from asdm.pipelines.derived import with_unet, with_vae
from asdm.planning.budget import make_plan
from asdm.planning.presets import require_preset
from asdm.runtime.export import export
from asdm.runtime.openvino import with_openvino_graphs
from asdm.runtime.optimize import optimize
from asdm.runtime.switching import switch_unets
from asdm.runtime.writers import Int8
from asdm.sensitivity.analysis import analyze
from asdm.sensitivity.profile import RedundancyMap
from asdm.student.build import build_student
from asdm.student.plan import PruningPlan

Observing = Callable[[DiffusionPipeline], Observations]

# -- schedulers, and pipelines with another denoiser ------------------------------------------------------


def with_dpm_solver(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Give the pipeline DPM-Solver++ (arXiv 2211.01095), with which all methods sample.

    A better scheduler must not be credited to a method, and few steps need a good one.

    Raises:
        AsdmError: the pipeline is a consistency model, which samples by its own scheduler.
    """
    if is_few_step(pipeline):
        raise AsdmError(
            f"{pipeline.config.get('_name_or_path')}: a few-step model, which other steps and schedulers do not fit; "
            "name its teacher as the model, and this one by --student"
        )
    if not isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
        pipeline.register_modules(scheduler=DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config))
    return pipeline


def with_denoiser(denoiser: Denoiser) -> Maker:
    """Give a pipeline this denoiser."""
    return lambda pipeline: with_unet(pipeline, denoiser)


def with_few_step(student: DiffusionPipeline) -> Maker:
    """Give a pipeline a few-step student's denoiser and its scheduler, whose time steps it was trained at."""

    def sampling_as_it(pipeline: DiffusionPipeline) -> DiffusionPipeline:
        other = with_unet(pipeline, denoiser_of(student))
        other.register_modules(scheduler=student.scheduler)
        return other

    return sampling_as_it


def pruned(plan: PruningPlan) -> Maker:
    """Give a pipeline a plan's student, its projections folded."""

    def with_student(pipeline: DiffusionPipeline) -> DiffusionPipeline:
        student = build_student(denoiser_of(pipeline), plan)
        fold_projections(student)
        return with_unet(pipeline, student)

    return with_student


def preset_students(pipeline: DiffusionPipeline) -> dict[str, Maker]:
    """Return the students of all presets, by name. Their weights are inherited and not trained: for speed alone."""

    @cache
    def redundancy() -> RedundancyMap:
        return analyze(pipeline, sensitivity="taylor", compensate="none", timesteps=1, samples=1, latency_rounds=2)

    def student(preset: str) -> Maker:
        return lambda given: pruned(make_plan(redundancy(), preset=preset, unet=denoiser_of(given)))(given)

    denoiser = denoiser_of(pipeline)
    family, found = family_of(denoiser), {}
    for preset in family.presets:
        with suppress(AsdmError):  # a preset for another shape
            require_preset(denoiser, preset)
            found[preset] = student(preset)
    return found


def with_gri(pipeline: DiffusionPipeline, faster: bool = False) -> DiffusionPipeline:
    """Replace the self-attentions of the highest resolution by regional attention, untrained.

    Args:
        faster: take the faster of the two kinds that `analyze` tries, not the more exact one.
    """
    units = outer_self_attentions(denoiser_of(pipeline))
    if not units:
        raise AsdmError("no self-attention in the first and the last block")
    _, height, width = latent_shape(pipeline)
    regions, pool = gri_kinds(height * width)[faster]
    edits = [GriAttention(unit=unit, regions=regions, pool=pool, weighted=True) for unit in units]
    return pruned(PruningPlan.for_unet(denoiser_of(pipeline), edits))(pipeline)


def outer_self_attentions(denoiser: Denoiser) -> list[str]:
    """Return the self-attentions of the first and the last block, where a UNet has the most tokens."""
    family = family_of(denoiser)
    blocks = family.blocks(denoiser)
    outer = {blocks[0], blocks[-1]}
    return [unit.name for unit in family.units(denoiser) if unit.kind == "self_attention" and unit.block in outer]


def switching(student: Maker, below: float) -> Prepared:
    """Use the student at high noise, and the original below this part of the schedule."""

    def switched(pipeline: DiffusionPipeline) -> DiffusionPipeline:
        return switch_unets(pipeline, [denoiser_of(student(pipeline)), denoiser_of(pipeline)], below=[below])

    return fresh(switched)


def by_lcm(pipeline: DiffusionPipeline) -> AbstractContextManager[DiffusionPipeline]:
    """Sample with LCM's scheduler (arXiv 2310.04378), a consistency model's own, hence without guidance."""
    other = with_unet(pipeline, denoiser_of(pipeline))
    if not is_few_step(pipeline):
        other.register_modules(scheduler=lcm_scheduler(pipeline.scheduler.config, Consistency().solver_steps))
    generate(other, ["a photograph"], steps=1)  # compiles a graph for one sample instead of two
    return nullcontext(other)


# -- runtimes ---------------------------------------------------------------------------------------------


def optimized(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a second pipeline in the fastest runtime that `asdm.optimize` finds; compiled on GPUs."""
    other = with_unet(pipeline, denoiser_of(pipeline))
    optimize(other, rounds=2, compile=pipeline.device.type == "cuda")
    return other


_loaded: dict[str, DiffusionPipeline] = {}  # pipelines with OpenVINO graphs in memory, by folder: one at most


def release_graphs() -> None:
    """Free the graphs in memory; they are loaded again when they are used."""
    _loaded.clear()


def in_openvino(
    maker: Maker | None = None,
    *,
    int8: Int8 | None = None,
    data: str | Path | None = None,
    cache: int | None = None,
) -> Prepared:
    """Run the denoiser and the VAE's decoder as graphs that `asdm.export` writes, within the same pipeline.

    The graphs are exported once. Those used last stay in memory, compiled and warmed up.

    Args:
        maker: makes the pipeline to export; the given one by default.
        data: calibrates the ranges of `int8`.
        cache: the depth of feature caching, for which the denoiser is exported as two graphs.
    """
    parts = (*(("unet",) if cache is None else ("unet_inner", "unet_outer")), "vae_decoder")

    @memoized
    def exported(pipeline: DiffusionPipeline) -> tuple[tempfile.TemporaryDirectory[str], float, Any]:
        made = pipeline if maker is None else maker(pipeline)
        release_graphs()
        folder = tempfile.TemporaryDirectory(prefix="asdm-openvino-")
        graphs, ranges = Path(folder.name) / "graphs", None if int8 is None else data
        export(made, graphs, "openvino", int8=int8, data=ranges, cache=cache, parts=parts)
        return folder, macs_of_call(denoiser_of(made)).below() / 1e9, made.scheduler

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        folder, gmacs, scheduler = exported(pipeline)
        if folder.name not in _loaded:
            release_graphs()
            ready = with_openvino_graphs(pipeline, Path(folder.name) / "graphs")
            ready.register_modules(scheduler=scheduler)
            denoiser_of(ready).gmacs = gmacs
            generate(ready, ["a photograph"], steps=2)
            _loaded[folder.name] = ready
        yield _loaded[folder.name]

    return prepared


def decoding_by(decoder: str | Path) -> Prepared:
    """Decode by a tiny decoder, whatever denoises. It is loaded once for each precision."""
    loaded: dict[Any, Any] = {}

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        kind = pipeline.vae.dtype, pipeline.vae.device
        if kind not in loaded:
            loaded[kind] = with_decoder(pipeline, decoder).vae
        yield with_vae(pipeline, loaded[kind])

    return prepared


# -- feature caching --------------------------------------------------------------------------------------


def caching(**settings: Any) -> Prepared:
    """Cache features with these settings of `cache_features`."""

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        with cache_features(pipeline, **settings):
            yield pipeline

    return prepared


def observing(steps: int, data: str | Path | None, maker: Maker | None = None, depth: int | None = None) -> Observing:
    """Record one sampling, from which schedules of any speed-up follow.

    Args:
        maker: makes the pipeline to record; the given one by default.
    """
    return memoized(
        lambda pipeline: observe_sampling(
            pipeline if maker is None else maker(pipeline), steps=steps, data=data, depth=depth
        )
    )


def calibrated(speedup: float, observed: Observing, graphs: Prepared | None = None) -> Prepared:
    """Cache features by a calibrated schedule, in the pipeline's `graphs` where they are given."""
    schedule = memoized(lambda pipeline: observed(pipeline).schedule(speedup))

    @contextmanager
    def prepared(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        found = schedule(pipeline)
        with (graphs or nullcontext)(pipeline) as ready, cache_features(ready, schedule=found):
            yield ready

    return prepared
