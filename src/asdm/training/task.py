"""What the training loop trains: a task that owns its networks and makes its loss, and the slices of its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asdm.errors import AsdmError

Batch = Any


@dataclass(frozen=True)
class BatchSlice:
    """The `index`-th of `count` equal parts of a step's batch, for one process and one round of accumulation."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> slice:
        """Return where this part lies in a batch of `size`.

        Raises:
            AsdmError: the batch has no `count` equal parts.
        """
        if size % self.count:
            raise AsdmError(
                f"batch_size={size}: not a multiple of {self.count}, the number of processes times the rounds of "
                f"gradient accumulation; choose {-(-size // self.count) * self.count}"
            )
        each = size // self.count
        return slice(self.index * each, (self.index + 1) * each)


class TrainingTask(nn.Module):
    """Something to train: owns what is trained and what is frozen, and makes the loss.

    `forward(batch, generator)` returns a dict of scalars: "loss", which is minimised, and every component of it for the
    log. Frozen parts have `requires_grad` off. A task that several processes can run, or one process in rounds, takes a
    `BatchSlice` of the batch as a third argument.
    """

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss and its components."""
        raise NotImplementedError
