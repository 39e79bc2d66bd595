"""The best way to run a pipeline on the machine at hand: each measure is timed, and kept only where it helps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm import checks
from asdm.caching.session import require_uncached
from asdm.edits.regional_attention import GriAttnProcessor
from asdm.errors import AsdmError, one_line
from asdm.families import denoiser_call, denoiser_of, family_of, require_torch
from asdm.measure.latency import Latency, Ratio, measure_interleaved
from asdm.measure.machine import computes_in_bfloat16
from asdm.runtime.decoding import optimize_decoder
from asdm.runtime.measures import Measure, is_worth_it, relative_error
from asdm.runtime.openvino import OpenVinoVae

CHANNELS_LAST = "channels last"
Change = Callable[[Any], Any]
"""Changes a denoiser in place."""


@dataclass
class Optimization:
    """All measures in order, and the latency of the denoiser before and after those that were kept. `of_decoder` are
    the measures of the VAE's decoder, if they were requested."""

    measures: list[Measure] = field(default_factory=list)
    of_decoder: list[Measure] = field(default_factory=list)
    before: Latency | None = None
    after: Latency | None = None
    ratio: Ratio = field(default_factory=lambda: Ratio(1.0, 1.0, 1.0))

    @property
    def speedup(self) -> float:
        return self.ratio.value

    def __str__(self) -> str:
        lines = []
        for measure in [*self.measures, *self.of_decoder]:
            gain = measure.reason if measure.speedup is None else str(measure.speedup)
            what = "prediction" if measure in self.measures else "image"
            moved = "" if measure.error is None else f", {what} moved by {measure.error:.1e}"
            lines.append(f"{measure.name}: {gain}{moved}; {'kept' if measure.kept else 'not kept'}")
        return "\n".join([*lines, f"in all {self.ratio}" + (" of the denoiser" if self.of_decoder else "")])


@checks.arguments(
    pipeline=checks.PIPELINE,
    max_error=checks.number(0),
    compile=checks.flag,
    decoder=checks.path,
    rounds=checks.ROUNDS,
    progress=checks.function,
)
@torch.no_grad()
def optimize(
    pipeline: DiffusionPipeline,
    *,
    max_error: float = 1e-3,
    compile: bool = False,
    decoder: str | Path | None = None,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Optimization:
    """Try channels-last memory, half precision, fused projections, thread counts and, with `compile`, `torch.compile`.

    A measure is kept if it makes a denoiser call at least 3% faster and moves its prediction by no more than
    `max_error`. The pipeline is changed in place; what other pipelines share with it is not. Load a LoRA before, or
    once projections are not fused any longer (`pipeline.unet.unfuse_qkv_projections()`).

    Args:
        max_error: relative squared error of the prediction on random inputs against the pipeline as it came.
        compile: also compile the repeated blocks, which takes minutes at the first call.
        decoder: also the VAE's decoder: a tiny one that takes its place, as for `with_decoder`; or "auto", the fastest
            way to run the VAE's own among channels-last memory, tiles, and OpenVINO with float and with 8 bits, that
            moves the images by no more than `max_error`.
        rounds: the least number of timed rounds of each measure.
        progress: called with the name of each measure before it is tried.

    Returns:
        Every measure with its gain and error, and the speed-up of the denoiser; as text a line for each.

    Raises:
        AsdmError: the denoiser is offloaded, exported graphs stand in for it, or its features are cached; an IP-Adapter
            is loaded, or the tiny decoder does not fit.
    """
    original = denoiser_of(pipeline)
    require_torch(original)
    require_uncached(original, "optimize")
    original.eval()
    if getattr(original, "_hf_hook", None) is not None:
        raise AsdmError("the denoiser is offloaded; optimize the pipeline first, then enable offloading")
    result, threads = Optimization(), torch.get_num_threads()
    vae = None
    if decoder is not None:
        settings: dict[str, Any] = {"max_error": max_error, "rounds": rounds, "progress": progress}
        vae, result.of_decoder = optimize_decoder(pipeline, decoder=decoder, **settings)
    reference, current = _prediction(original), original
    for name, change in _changes(pipeline.device, original.dtype, compile):
        if _is_half(name) and current.dtype != original.dtype:
            continue  # one of them is enough
        if progress is not None:
            progress(name)
        measure, candidate = _try(name, change, current, reference, max_error, pipeline.device, rounds)
        result.measures.append(measure)
        if measure.kept:
            current = candidate
    result.measures += _threads(current, pipeline.device, rounds)
    chosen = torch.get_num_threads()
    calls = {
        "before": _in_threads(threads, denoiser_call(original)),
        "after": _in_threads(chosen, denoiser_call(current)),
    }
    times = measure_interleaved(calls, rounds=rounds, device=pipeline.device)
    result.before, result.after = times["before"], times["after"]
    result.ratio = times.speedup("before", "after")
    if current is not original:
        channels_last = any(measure.kept and measure.name == CHANNELS_LAST for measure in result.measures)
        _install(pipeline, current, channels_last)
    if vae is not None:
        _install_vae(pipeline, vae)
    return result


def _changes(device: torch.device, dtype: torch.dtype, compile: bool) -> Iterator[tuple[str, Change]]:
    """Yield the measures to try, in order, by name."""
    yield CHANNELS_LAST, lambda model: model.to(memory_format=torch.channels_last)
    if dtype == torch.float32:
        if device.type in ("cuda", "mps"):
            yield "float16", lambda model: model.to(torch.float16)
        if device.type != "cpu" or computes_in_bfloat16():
            yield "bfloat16", lambda model: model.to(torch.bfloat16)
    yield "fused projections", _fuse
    if compile:
        yield "compiled blocks", lambda model: model.compile_repeated_blocks()


def _is_half(name: str) -> bool:
    return name in ("bfloat16", "float16")


def _try(
    name: str,
    change: Change,
    current: Any,
    reference: Tensor,
    max_error: float,
    device: torch.device,
    rounds: int,
) -> tuple[Measure, Any]:
    """Try a measure on a copy of the denoiser; also that copy."""
    try:
        candidate = copy.deepcopy(current)
        change(candidate)
        error = relative_error(_prediction(candidate), reference)
        calls = {"now": denoiser_call(current), "changed": denoiser_call(candidate)}
        times = measure_interleaved(calls, rounds=rounds, device=device)
    except (RuntimeError, AsdmError, ValueError, NotImplementedError) as problem:
        return Measure(name, None, None, False, one_line(problem, 100)), current
    gain = times.speedup("now", "changed")
    return Measure(name, gain, error, is_worth_it(gain) and error <= max_error), candidate


def _install(pipeline: DiffusionPipeline, denoiser: Any, channels_last: bool) -> None:
    """Put the denoiser into the pipeline. Other parts are replaced by copies in its dtype and memory format where these
    have changed."""
    component = family_of(denoiser).component
    is_cast = denoiser.dtype != denoiser_of(pipeline).dtype
    modules = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != component]
    changed = modules if is_cast else ["vae"] if channels_last else []
    copies = {name: copy.deepcopy(getattr(pipeline, name)) for name in changed}
    pipeline.register_modules(**{component: denoiser}, **copies)
    if is_cast:
        kept = [each for part in copies.values() for each in _kept_in_float32(part, denoiser.dtype)]
        values = [parameter.data for parameter in kept]
        pipeline.to(dtype=denoiser.dtype)
        for parameter, value in zip(kept, values, strict=True):
            parameter.data = value
    if channels_last:
        pipeline.vae.to(memory_format=torch.channels_last)


def _kept_in_float32(part: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Return the parameters that transformers keeps in float32 where it loads a part in this dtype, such as T5's."""
    names = set(getattr(part, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    return [parameter for name, parameter in part.named_parameters() if names.intersection(name.split("."))]


def _install_vae(pipeline: DiffusionPipeline, vae: Any) -> None:
    """Put a VAE into the pipeline, in the denoiser's dtype; a graph computes in its own."""
    pipeline.register_modules(vae=vae if isinstance(vae, OpenVinoVae) else vae.to(denoiser_of(pipeline).dtype))


def _fuse(model: Any) -> None:
    if any(isinstance(processor, GriAttnProcessor) for processor in model.attn_processors.values()):
        raise AsdmError("not with global-regional attention")
    if getattr(model, "peft_config", None):
        raise AsdmError("not with a LoRA, which fused projections would leave out")
    model.fuse_qkv_projections()


def _threads(denoiser: Any, device: torch.device, rounds: int) -> list[Measure]:
    """Try half as many threads on the CPU, where hyper-threads share a core's arithmetic units."""
    now = torch.get_num_threads()
    if device.type != "cpu" or now < 4:
        return []
    call, chosen = denoiser_call(denoiser), now
    try:
        times = measure_interleaved({"now": _in_threads(now, call), "half": _in_threads(now // 2, call)}, rounds=rounds)
        gain = times.speedup("now", "half")
        chosen = now // 2 if is_worth_it(gain) else now
    finally:
        torch.set_num_threads(chosen)
    return [Measure(f"{now // 2} threads", gain, 0.0, chosen != now)]


def _in_threads(count: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.set_num_threads(count)
        return call()

    return run


def _prediction(denoiser: Any) -> Tensor:
    return denoiser_call(denoiser, seed=1)().float()
