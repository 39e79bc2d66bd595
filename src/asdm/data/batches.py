"""The order in which training sees its examples."""

from __future__ import annotations

import torch
from torch import Tensor


class ShuffledBatches:
    """Batches of indices by step: epochs of a shuffled set; with `first_in_order` the first epoch is not shuffled."""

    def __init__(self, count: int, batch_size: int, seed: int, *, first_in_order: bool = False):
        self.count, self.batch_size, self.seed, self.first_in_order = count, batch_size, seed, first_in_order
        self._orders: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.count
        orders = {int(epoch): self._order(int(epoch)) for epoch in epochs.unique()}
        return torch.stack([orders[int(e)][p % self.count] for e, p in zip(epochs, positions, strict=True)])

    def _order(self, epoch: int) -> Tensor:
        if self.first_in_order and epoch == 0:
            return torch.arange(self.count)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
            kept = {epoch - 1: self._orders[epoch - 1]} if epoch - 1 in self._orders else {}
            self._orders = kept | {epoch: torch.randperm(self.count, generator=generator)}
        return self._orders[epoch]
