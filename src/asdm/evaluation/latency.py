"""Calls of a UNet to be timed, and what its modules take in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm.conditioning import guidance_embedding
from asdm.measure.latency import Latency, Patience, Stopwatch, Timing, synchronise
from asdm.units import require_known_inputs


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


@torch.no_grad()
def module_latencies(
    unet: UNet2DConditionModel, names: Sequence[str], *, rounds: int = 5, patience: float | None = None
) -> tuple[dict[str, Latency], Timing]:
    """What each named module takes in a call at batch 2; and the timing of the whole calls.

    Args:
        rounds: the least number of calls. More follow until the modules' times agree (`PRECISION`). 0: none.
        patience: seconds after which no more follow, as for `measure_interleaved`.
    """
    call, watch = unet_call(unet), Stopwatch(unet.device)
    if rounds == 0:
        return dict.fromkeys(names, _NEVER), watch.timing()
    call()
    more = Patience(rounds, patience)
    with timing_modules(unet, names, unet.device) as seconds:

        def latencies() -> dict[str, Latency]:
            return {name: Latency.of(values) if values else _NEVER for name, values in seconds.items()}

        while more.another_round(lambda: disagreement(latencies().values())):
            watch.time("UNet", call)
        return latencies(), watch.timing()


_NEVER = Latency(0.0, 0.0, 0.0, 0)  # of a module that no call reaches


def disagreement(latencies: Iterable[Latency]) -> float:
    """How far the intervals reach to each side, all times together, relative to these."""
    known = list(latencies)
    return sum(each.high_ms - each.low_ms for each in known) / 2 / max(sum(each.ms for each in known), 1e-9)


@contextmanager
def timing_modules(
    model: nn.Module, names: Sequence[str], device: torch.device | str = "cpu"
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
