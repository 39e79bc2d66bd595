"""Multiply-accumulate counts of a UNet by module, with and without the attention products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


@dataclass
class MacCount:
    """MACs of one call by module path: convolutions and linear layers, and attention products apart."""

    plain: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    attention: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def below(self, name: str = "", *, with_attention: bool = True) -> int:
        """MACs of the module at `name` and all below it; of the whole model by default."""
        counts = [self.plain, self.attention] if with_attention else [self.plain]
        prefix = f"{name}."
        return sum(
            macs
            for count in counts
            for path, macs in count.items()
            if not name or path == name or path.startswith(prefix)
        )


@contextmanager
def counting_macs(model: nn.Module) -> Iterator[MacCount]:
    """Count what `model` computes in the block, per sample of its batch.

    The two attention products of n queries and m keys of width c are 2 n m c MACs (scores and mix). A module that
    computes otherwise than its class says has a method `count_macs(output)`; an attention processor that meets other
    keys has `keys_of_call(kwargs)`.
    """
    count = MacCount()
    handles = []

    def map_hook(name: str, weight: Tensor) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            count.plain[name] += output.numel() // output.shape[0] * (weight.numel() // weight.shape[0])

        return hook

    def attention_hook(name: str) -> Any:
        def hook(module: Attention, args: Any, kwargs: Any, _output: Any) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            context = kwargs.get("encoder_hidden_states")
            context = hidden_states if context is None else context
            queries, keys = _tokens(hidden_states), _tokens(context)
            keys_of_call = getattr(module.processor, "keys_of_call", None)
            if keys_of_call is not None:
                keys = keys_of_call(kwargs)
            count.attention[name] += 2 * queries * keys * module.inner_dim

        return hook

    def counted_hook(name: str) -> Any:
        def hook(module: Any, _inputs: Any, output: Tensor) -> None:
            count.plain[name] += module.count_macs(output)

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "count_macs"):
            handles.append(module.register_forward_hook(counted_hook(name)))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(map_hook(name, module.weight)))
        elif isinstance(module, Attention):
            handles.append(module.register_forward_hook(attention_hook(name), with_kwargs=True))
    try:
        with torch.no_grad():
            yield count
    finally:
        for handle in handles:
            handle.remove()


def _tokens(hidden_states: Tensor) -> int:
    return hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2] * hidden_states.shape[3]
