"""Honest latency: interleaved rounds in one process, medians with their spread, warm-up apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm.conditioning import guidance_embedding
from asdm.units import require_known_inputs


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: the median of the rounds, and the quartiles."""

    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        ms = sorted(1000 * s for s in seconds)
        quartiles = statistics.quantiles(ms, n=4) if len(ms) > 1 else [ms[0]] * 3
        return cls(statistics.median(ms), quartiles[0], quartiles[2], len(ms))


@torch.no_grad()
def measure_interleaved(
    calls: dict[str, Callable[[], Any]],
    *,
    rounds: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, Latency]:
    """Time several calls in turns, so that a slow minute of the machine falls on all of them."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return {name: Latency.of(values) for name, values in seconds.items()}


def seconds_of(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """How long one call takes, until the device is done with it."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def speedup(baseline: Latency, other: Latency) -> float:
    """How many times faster `other` is, by the medians."""
    return baseline.median_ms / other.median_ms


def synchronise(device: torch.device | str) -> None:
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def unet_call(unet: UNet2DConditionModel, batch_size: int = 2, seed: int = 0) -> Callable[[], Tensor]:
    """One UNet call on random inputs at its native size; batch 2 is one image with guidance."""
    arguments = random_inputs(unet, batch_size, seed)
    sample = arguments.pop("sample")  # as pipelines give it, by its place: what others patch into a UNet may rely on it
    return lambda: unet(sample, **arguments, return_dict=False)[0]


def random_inputs(unet: UNet2DConditionModel, batch_size: int, seed: int = 0) -> dict[str, Any]:
    """Random arguments of a UNet call at its native size, 77 tokens (16 for the embedded default's width).

    Raises:
        AsdmError: it has inputs that no prompt brings, as an IP-Adapter's image.
    """
    config = unet.config
    require_known_inputs(unet)
    generator = torch.Generator().manual_seed(seed)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.cross_attention_dim
    channels = channels if isinstance(channels, int) else channels[0]
    tokens = 77 if channels >= 768 else 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    arguments: dict[str, Any] = {
        "sample": normal(batch_size, config.in_channels, height, width),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": normal(batch_size, tokens, config.get("encoder_hid_dim") or channels),
    }
    if config.addition_embed_type == "text_time":
        time_width = 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {
            "text_embeds": normal(batch_size, config.projection_class_embeddings_input_dim - time_width),
            "time_ids": torch.full((batch_size, 6), 1024.0, device=unet.device, dtype=unet.dtype),
        }
    timestep_cond = guidance_embedding(unet, torch.full((batch_size,), 7.5))
    return arguments if timestep_cond is None else {**arguments, "timestep_cond": timestep_cond}


@contextmanager
def timing_modules(
    model: nn.Module, names: list[str], device: torch.device | str = "cpu"
) -> Iterator[dict[str, list[float]]]:
    """Seconds that each named module takes in each call of `model` within the block."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started: dict[str, float] = {}
    handles = []
    for name in names:

        def before(_module: nn.Module, _args: Any, name: str = name) -> None:
            synchronise(device)
            started[name] = time.perf_counter()

        def after(_module: nn.Module, _args: Any, _output: Any, name: str = name) -> None:
            synchronise(device)
            seconds[name].append(time.perf_counter() - started[name])

        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
