"""The best way to run a pipeline on the machine at hand: each measure is measured, and kept only where it helps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from asdm import checks
from asdm.caching.session import require_whole
from asdm.edits.regional_attention import GriAttnProcessor
from asdm.errors import AsdmError, one_line
from asdm.families.unet_calls import random_inputs, unet_call
from asdm.measure.latency import Latency, Ratio, measure_interleaved

WORTH_IT = 1.03  # what gains less than noise is not kept


@dataclass(frozen=True)
class Measure:
    """One thing tried: how many times faster it made the UNet, with the interval of that, and how far it moved its
    prediction (relative squared error); `kept` or not, with the reason where it could not be tried."""

    name: str
    speedup: Ratio | None
    error: float | None
    kept: bool
    reason: str = ""


@dataclass
class Optimization:
    """What was tried, in order, and what all that was kept gains together."""

    measures: list[Measure] = field(default_factory=list)
    before: Latency | None = None
    after: Latency | None = None
    ratio: Ratio = field(default_factory=lambda: Ratio(1.0, 1.0, 1.0))

    @property
    def speedup(self) -> float:
        return self.ratio.value

    def __str__(self) -> str:
        lines = []
        for measure in self.measures:
            gain = measure.reason if measure.speedup is None else str(measure.speedup)
            moved = "" if measure.error is None else f", prediction moved by {measure.error:.1e}"
            lines.append(f"{measure.name}: {gain}{moved}; {'kept' if measure.kept else 'not kept'}")
        return "\n".join([*lines, f"in all {self.ratio}"])


@checks.arguments(
    pipeline=checks.PIPELINE,
    max_error=checks.number(0),
    compile=checks.flag,
    rounds=checks.ROUNDS,
    progress=checks.function,
)
@torch.no_grad()
def optimize(
    pipeline: DiffusionPipeline,
    *,
    max_error: float = 1e-3,
    compile: bool = False,
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Optimization:
    """Try, one after another, channels-last memory, half precision, fused projections, thread counts and, if asked,
    `torch.compile`; keep what makes a UNet call at least 3% faster and moves its prediction by no more than
    `max_error`. Changes the pipeline in place.

    What other pipelines share with it is left as it is. A LoRA is loaded before, or once projections are not fused any
    longer (`pipeline.unet.unfuse_qkv_projections()`).

    Args:
        max_error: relative squared error of the prediction on random inputs against the pipeline as it came.
        compile: also compile the repeated blocks, which takes minutes at the first call.

    Raises:
        AsdmError: `max_error` is negative, the UNet is offloaded or inherits features, or an IP-Adapter is loaded.
    """
    if max_error < 0:
        raise AsdmError(f"max_error={max_error:g}: must not be negative")
    require_whole(pipeline.unet, "optimize")
    unet: UNet2DConditionModel = pipeline.unet.eval()
    if getattr(unet, "_hf_hook", None) is not None:
        raise AsdmError("the UNet is offloaded; optimize the pipeline first, then enable offloading")
    result, threads = Optimization(), torch.get_num_threads()
    reference = _prediction(unet)
    trials: list[tuple[str, Callable[[UNet2DConditionModel], Any]]] = [
        ("channels last", lambda model: model.to(memory_format=torch.channels_last)),
        *((str(dtype).removeprefix("torch."), _to(dtype)) for dtype in _half_precisions(pipeline.device, unet.dtype)),
        ("fused projections", _fuse),
    ]
    if compile:
        trials.append(("compiled blocks", lambda model: model.compile_repeated_blocks()))
    current = unet
    for name, change in trials:
        if name in ("bfloat16", "float16") and current.dtype != unet.dtype:
            continue  # one of them is enough
        if progress is not None:
            progress(name)
        try:
            candidate = copy.deepcopy(current)
            change(candidate)
            error = _error(_prediction(candidate), reference)
            times = measure_interleaved(
                {"now": unet_call(current), "changed": unet_call(candidate)}, rounds=rounds, device=pipeline.device
            )
        except (RuntimeError, AsdmError, ValueError, NotImplementedError) as problem:
            result.measures.append(Measure(name, None, None, False, one_line(problem, 100)))
            continue
        gain = times.speedup("now", "changed")
        kept = _is_worth_it(gain) and error <= max_error
        result.measures.append(Measure(name, gain, error, kept))
        if kept:
            current = candidate
    result.measures += _threads(current, pipeline.device, rounds)
    chosen = torch.get_num_threads()
    calls = {"before": _in_threads(threads, unet_call(unet)), "after": _in_threads(chosen, unet_call(current))}
    times = measure_interleaved(calls, rounds=rounds, device=pipeline.device)
    result.before, result.after = times["before"], times["after"]
    result.ratio = times.speedup("before", "after")
    if current is not unet:
        others = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "unet"]
        pipeline.register_modules(unet=current, **{name: copy.deepcopy(getattr(pipeline, name)) for name in others})
        pipeline.to(dtype=current.dtype)
        if any(measure.kept and measure.name == "channels last" for measure in result.measures):
            pipeline.vae.to(memory_format=torch.channels_last)
    return result


def _half_precisions(device: torch.device, dtype: torch.dtype) -> list[torch.dtype]:
    if dtype != torch.float32:
        return []
    return [torch.float16, torch.bfloat16] if device.type in ("cuda", "mps") else [torch.bfloat16]


def _to(dtype: torch.dtype) -> Callable[[UNet2DConditionModel], Any]:
    return lambda model: model.to(dtype)


def _fuse(model: UNet2DConditionModel) -> None:
    if any(isinstance(processor, GriAttnProcessor) for processor in model.attn_processors.values()):
        raise AsdmError("not with global-regional attention")
    if getattr(model, "peft_config", None):
        raise AsdmError("not with a LoRA, whose share would be left out")
    model.fuse_qkv_projections()


def _threads(unet: UNet2DConditionModel, device: torch.device, rounds: int) -> list[Measure]:
    """On the CPU: half as many threads, where hyper-threads share a core's arithmetic units."""
    now = torch.get_num_threads()
    if device.type != "cpu" or now < 4:
        return []
    call, chosen = unet_call(unet), now
    try:
        times = measure_interleaved({"now": _in_threads(now, call), "half": _in_threads(now // 2, call)}, rounds=rounds)
        gain = times.speedup("now", "half")
        chosen = now // 2 if _is_worth_it(gain) else now
    finally:
        torch.set_num_threads(chosen)
    return [Measure(f"{now // 2} threads", gain, 0.0, chosen != now)]


def _is_worth_it(gain: Ratio) -> bool:
    """Whether it is faster by more than noise could have made it."""
    return gain.value >= WORTH_IT and gain.is_measurable


def _in_threads(count: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.set_num_threads(count)
        return call()

    return run


def _prediction(unet: UNet2DConditionModel) -> torch.Tensor:
    generator_inputs = random_inputs(unet, 2, seed=1)
    return unet(**generator_inputs, return_dict=False)[0].float()


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())
