"""Multiply-accumulate counts of a model by module, with and without the attention products.

Torch's flop counter counts the operations that are executed, so this file knows no architecture and no edit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

aten: Any = torch.ops.aten


@dataclass
class MacCount:
    """MACs of one call by module path: products with weights, and attention products apart."""

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


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _lerp_flops(*_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape)


# What torch's counter leaves out: attention on devices other than CUDA, and the mixture of two convolution kernels.
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_attention_math_for_mps: _attention_flops,
    aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
    aten.lerp: _lerp_flops,
}
_BATCHED_PRODUCTS = (aten.bmm, aten.baddbmm)


@contextmanager
def counting_macs(model: nn.Module) -> Iterator[MacCount]:
    """Count what the calls of `model` in the block compute, per sample of their batch.

    Convolutions, linear layers and matrix products count; products by element do not. The two attention products of n
    queries and m keys of width c are 2 n m c MACs (scores and mix). What a call computes once for all samples is
    divided among them.
    """
    count = MacCount()
    modules = dict(model.named_modules())
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    innermost: Any = _InnermostModule(modules)
    counter.mod_tracker = innermost

    def before(*_: Any) -> None:
        counter.flop_counts.clear()

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        batch_size = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)).shape[0]
        for path, flops_of in counter.flop_counts.items():
            for operation, flops in flops_of.items():
                counts = count.attention if _is_attention(operation, modules[path]) else count.plain
                counts[path] += flops // 2 // batch_size

    with torch.no_grad(), counter:
        handles = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
        try:
            yield count
        finally:
            for handle in handles:
                handle.remove()


class _InnermostModule:
    """Tells `FlopCounterMode` the path of the module that computes.

    Torch's own tracker names all modules around it, too, and fails where a module returns a view of its parameter.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.running = [""]
        self.handles: list[RemovableHandle] = []

    @property
    def parents(self) -> list[str]:
        """The paths that an operation counts for."""
        return self.running[-1:]

    def __enter__(self) -> None:
        for path, module in self.modules.items():
            before = module.register_forward_pre_hook(partial(self._enter, path))
            after = module.register_forward_hook(self._leave, always_call=True)
            self.handles += [before, after]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, path: str, *_: Any) -> None:
        self.running.append(path)

    def _leave(self, *_: Any) -> None:
        self.running.pop()


def _is_attention(operation: Any, module: nn.Module) -> bool:
    """Return whether an operation multiplies two activations. A layer's batched product is one with its weights, of
    an input that is no matrix in memory."""
    is_batched = operation in _BATCHED_PRODUCTS and not isinstance(module, nn.Linear | nn.Conv2d)
    return is_batched or "scaled_dot_product" in str(operation)
