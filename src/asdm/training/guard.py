"""The divergence guard: a run whose loss or gradient is not finite, or whose loss explodes, stops in time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from asdm.errors import AsdmError
from asdm.training.checkpoints import checkpoints, delete_newest, keep_newest
from asdm.training.sharding import full_tensor

NEGLIGIBLE = 0.1  # such a loss does not explode, wherever it began: a student may equal its teacher at first
PATIENCE = 3  # steps


class DivergenceGuard:
    """Stops a run whose loss or gradient is not finite, or whose loss explodes: `PATIENCE` steps in a row at more than
    a hundred times its lowest mean so far and ten times its first value.

    The scaler of float16 skips a step whose gradient is not finite, and halves the loss scale. That is tolerated until
    the scale is 1, but not in the last `PATIENCE` steps.

    A checkpoint is `unverified` until the next loss is sound; a run that stops earlier falls back to the one before.
    """

    def __init__(self, folder: Path, steps: int, unverified: bool = False):
        self.folder, self.steps, self.unverified = folder, steps, unverified
        self.steps_beyond = self.steps_skipped = 0  # in a row
        self.first = self.mean = self.lowest = math.inf

    @property
    def allows_saving(self) -> bool:
        """Whether the weights are fit for a checkpoint: the loss is not about to explode, and they still learn."""
        return not self.steps_beyond and self.steps_skipped < PATIENCE

    def check_losses(self, losses: dict[str, float], step: int) -> None:
        """Judge a step's losses.

        Raises:
            AsdmError: one is not finite, or the loss explodes.
        """
        broken = [name for name, value in losses.items() if not math.isfinite(value)]
        if broken:
            components = [name for name in broken if name != "loss"] or broken
            self._stop(f"{', '.join(components)} is not finite", step)
        loss = losses["loss"]
        if math.isinf(self.first):
            self.first = self.mean = self.lowest = loss
        if loss > max(100 * self.lowest, 10 * self.first, NEGLIGIBLE):
            self.steps_beyond += 1
            if self.steps_beyond == PATIENCE or step + 1 == self.steps:
                what = f"{_largest_term(losses)} explodes (the loss is {loss:.3g} and was {self.lowest:.3g})"
                self._stop(what, step)
        else:
            self._accept(loss)

    def check_gradient(self, norm: Any, step: int, loss_scale: float | None = None) -> None:
        """Judge the gradient by its norm: a finite loss may have one that is not.

        Args:
            loss_scale: that of a scaler, which skips such a step.

        Raises:
            AsdmError: it is not finite, and skipping steps does not help.
        """
        if not isinstance(norm, Tensor) or full_tensor(norm).isfinite():
            self.steps_skipped = 0
            return
        if loss_scale is None:
            self._stop("the gradient is not finite", step)
        self.steps_skipped += 1
        learns_nothing = step + 1 == self.steps and self.steps_skipped >= min(PATIENCE, self.steps)
        if loss_scale <= 1 or learns_nothing:
            what = f"the gradient in float16 is not finite ({self.steps_skipped} steps skipped in a row)"
            self._stop(what, step, "train with mixed_precision bf16 or no, or lower the learning rate,")

    def _accept(self, loss: float) -> None:
        self.steps_beyond = 0
        self.mean += 0.1 * (loss - self.mean)
        self.lowest = min(self.lowest, self.mean)
        if self.unverified:
            keep_newest(self.folder)
            self.unverified = False

    def _stop(self, what: str, step: int, remedy: str = "lower the learning rate") -> NoReturn:
        if self.unverified:
            delete_newest(self.folder)
        if step == 0:  # nothing was learnt that could have diverged
            raise AsdmError(
                f"{what} at step 1: the weights or the data hold values that are no numbers, or the precision "
                "overflows; check them, or train with mixed_precision no"
            )
        has_checkpoint = bool(checkpoints(self.folder))
        left = (
            f"the last good checkpoint in {self.folder} is kept" if has_checkpoint else "no checkpoint was written yet"
        )
        raise AsdmError(f"{what} at step {step + 1}; {left}: {remedy} and run again")


def _largest_term(losses: dict[str, float]) -> str:
    """Return the name of the term that weighs most."""
    terms = {name: value for name, value in losses.items() if name.startswith("weighted/")}
    terms = terms or {name: value for name, value in losses.items() if name != "loss"}
    return max(terms, key=lambda name: terms[name], default="loss").removeprefix("weighted/")
