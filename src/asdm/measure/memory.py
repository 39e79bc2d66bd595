"""The peak memory of a call beside the weights, counted by the tensors that live at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


@torch.no_grad()
def peak_megabytes(call: Callable[[], Any]) -> float:
    """Return the megabytes that tensors made within `call` take at most at once, without a kernel's scratch memory."""
    with _LivingTensors() as living:
        call()
    return living.peak / 1e6


class _LivingTensors(TorchDispatchMode):
    """Counts the bytes of tensors from their creation until their storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view shares the storage of an argument, which is counted already or was there before.
        given: set[int] = set()
        tree_map_only(Tensor, lambda tensor: given.add(tensor.untyped_storage()._cdata), (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda tensor: self._made(tensor, given), result)
        return result

    def _made(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in given or place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size
