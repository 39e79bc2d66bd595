"""One training loop for every task and any number of processes.

The batch and the noise of a step depend on the seed and the step alone. So a resumed run sees exactly what the
uninterrupted one would have seen, and several processes, each with its slice of the same batch, do what one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import Tensor

from asdm.measure.machine import fast_products
from asdm.training.checkpoints import TrainingState, checkpoints, keep_newest
from asdm.training.guard import DivergenceGuard
from asdm.training.launch import make_accelerator
from asdm.training.log import TrainingLog
from asdm.training.optimizers import OptimizerName, make_optimizer, require_shardable
from asdm.training.sharding import full_tensor, is_sharding_requested, keep_in_host_memory, sharded_twin
from asdm.training.task import Batch, BatchSlice, TrainingTask

Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train.

    `learning_rate` is the peak, reached after `warmup_steps`; weights whose names start with a key of
    `learning_rate_factors` learn at that multiple of it. After the warm-up the schedule `constant` stays at the peak,
    `cosine` falls to zero over all other steps, and `constant_then_linear` falls over the last `falling_steps` alone:
    until then a longer or shorter training is the same training.
    """

    steps: int
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "constant_then_linear"] = "cosine"
    falling_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    checkpoint_every: int = 200
    accumulation: int = 1
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "constant_then_linear":
            return self.learning_rate * min(1.0, (self.steps - step) / max(1, self.falling_steps))
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def generator_at(self, step: int) -> torch.Generator:
        """Return the source of a step's noise."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


@fast_products()
def train(
    task: TrainingTask,
    batch_at: Callable[[int], Batch],
    settings: LoopSettings,
    folder: Path,
    *,
    accelerator: Accelerator | None = None,
    alone: bool = False,
    progress: Progress | None = None,
    stop_after_seconds: float | None = None,
) -> bool:
    """Train `task` for `settings.steps` steps, resuming from the newest checkpoint in `folder`.

    Where the launch requests FSDP, the processes share what is trained (`asdm.training.sharding`).

    Args:
        batch_at: the batch of a step, for all processes together; must depend on the step alone.
        folder: gets `log.jsonl` (one line a step) and `checkpoint-*`; all processes must see it.
        alone: train a whole batch in this process, whatever the others of the launch do.
        progress: called after each step with `step`, `steps`, `learning_rate`, `seconds`, every loss.
        stop_after_seconds: save and return early after that long, by rank 0's clock.

    Returns:
        Whether all steps are done. The task then holds the EMA weights, if `ema_decay` is set.

    Raises:
        AsdmError: a loss or a gradient is not finite, or the loss explodes (`DivergenceGuard`), and the last
            checkpoint before that is kept; or the optimiser is not available, or not with FSDP.
    """
    accelerator = accelerator or make_accelerator("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(task, settings, folder, accelerator, alone)
    run.resume()
    try:
        run.continue_to_end(batch_at, progress, stop_after_seconds)
    except KeyboardInterrupt:
        run.save_if_between_steps()
        raise
    finally:
        run.close()
    return run.finish()


class _Run:
    """A task in training: its model as the launch runs it, the optimiser, the average, and the step it is at."""

    def __init__(
        self, task: TrainingTask, settings: LoopSettings, folder: Path, accelerator: Accelerator, alone: bool
    ) -> None:
        self.task, self.settings, self.folder, self.accelerator = task, settings, folder, accelerator
        self.processes = 1 if alone else accelerator.num_processes
        index = 0 if alone else accelerator.process_index
        self.writes = alone or accelerator.is_main_process
        self.is_sharded = self.processes > 1 and is_sharding_requested()
        self.slices = [
            BatchSlice(index * settings.accumulation + i, self.processes * settings.accumulation)
            for i in range(settings.accumulation)
        ]
        self._prepare_model()
        self.optimizer: Any = accelerator.prepare_optimizer(
            make_optimizer(
                self.weights,
                settings.optimizer,
                settings.learning_rate,
                settings.betas,
                settings.weight_decay,
                settings.learning_rate_factors,
            )
        )
        # Torch has no copy of many sharded tensors at once.
        average = {"decay": settings.ema_decay, "foreach": not self.is_sharded}
        self.ema = EMAModel(self.weights.values(), **average) if settings.ema_decay else None
        self.state = TrainingState(self.weights, self.optimizer, self.ema, accelerator.scaler)
        self.step, self.is_between_steps = 0, True
        self.log: TrainingLog | None = None

    def _prepare_model(self) -> None:
        """Wrap the task as the launch requests it: sharded, or by Accelerate."""
        task, accelerator = self.task, self.accelerator
        self.model: Any
        self.autocast: Callable[[], Any]
        if self.is_sharded:
            require_shardable(self.settings.optimizer)
            self.model, self.autocast = sharded_twin(task, accelerator.device), accelerator.autocast
            self.weights = self.model.trained()
            keep_in_host_memory(task.trained().values())
        else:
            self.model = accelerator.prepare_model(task, evaluation_mode=self.processes == 1)
            self.autocast = nullcontext
            self.weights = task.trained()

    def resume(self) -> None:
        """Load the newest checkpoint, and open the log behind its step."""
        self.step = self.state.load_newest(self.folder)
        if self.writes:
            self.log = TrainingLog(self.folder / "log.jsonl", from_step=self.step)
        was_killed_before_verdict = self.writes and len(checkpoints(self.folder)) > 1
        self.guard = DivergenceGuard(self.folder, self.settings.steps, unverified=was_killed_before_verdict)

    def continue_to_end(
        self, batch_at: Callable[[int], Batch], progress: Progress | None, stop_after_seconds: float | None
    ) -> None:
        """Take the steps that are left, or those that fit into the time."""
        settings, started = self.settings, time.monotonic()
        self.model.train()
        while self.step < settings.steps:
            before = time.monotonic()
            losses = self._take_step(batch_at(self.step))
            row = losses | {"step": self.step, "learning_rate": settings.learning_rate_at(self.step - 1)}
            if self.log is not None:
                self.log.write(row)
            out_of_time = stop_after_seconds is not None and self._agree(
                time.monotonic() - started > stop_after_seconds
            )
            if self.step % settings.checkpoint_every == 0 or self.step == settings.steps or out_of_time:
                self._save_checkpoint()
            if progress is not None and self.writes:
                progress(row | {"steps": settings.steps, "seconds": time.monotonic() - before})
            if out_of_time:
                break

    def _agree(self, own: bool) -> bool:
        """Return rank 0's answer in all processes that train together."""
        return bool(broadcast_object_list([own])[0]) if self.processes > 1 else own

    def _take_step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser; returns the losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step) * group["factor"]
        rounds = [self._backward(batch, part) for part in self.slices]
        losses = _mean(rounds, self.accelerator if self.processes > 1 else None)
        self.guard.check_losses(losses, self.step)
        norm = self.accelerator.clip_grad_norm_(self.weights.values(), self.settings.max_grad_norm)
        scaler = self.accelerator.scaler
        self.guard.check_gradient(norm, self.step, None if scaler is None else scaler.get_scale())
        self.is_between_steps = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.weights.values())
        self.step, self.is_between_steps = self.step + 1, True
        return losses

    def _backward(self, batch: Batch, part: BatchSlice) -> dict[str, Tensor]:
        """Return the losses of one round, and their gradients; processes exchange these in the last round."""
        generator = self.settings.generator_at(self.step)
        is_unshared = self.processes > 1 and not self.is_sharded and part is not self.slices[-1]
        with self.accelerator.no_sync(self.model) if is_unshared else nullcontext(), self.autocast():
            losses = self.model(batch, generator) if part.count == 1 else self.model(batch, generator, part)
            self.accelerator.backward(losses["loss"] / len(self.slices))
        return losses

    def _save_checkpoint(self) -> None:
        if (self.writes or self.is_sharded) and self.guard.allows_saving:
            self.state.save(self.folder, self.step, self.writes)
            self.guard.unverified = self.writes

    def save_if_between_steps(self) -> None:
        """Save where an interrupt left whole weights; else the last checkpoint is the one to resume from."""
        if self.is_between_steps and self.writes and not self.is_sharded and self.guard.allows_saving:
            self.state.save(self.folder, self.step)

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def finish(self) -> bool:
        """Give the task its weights, averaged where all steps are done; returns whether they are."""
        is_done = self.step >= self.settings.steps
        if is_done and self.writes:
            keep_newest(self.folder)
        if is_done and self.ema is not None:
            self.ema.copy_to(self.weights.values())
        if self.is_sharded:
            for name, parameter in self.task.trained().items():
                parameter.data = full_tensor(self.weights[name].detach())
        self.task.eval()
        return is_done


def _mean(rounds: list[dict[str, Tensor]], accelerator: Accelerator | None) -> dict[str, float]:
    """Each loss's mean over the rounds and, with `accelerator`, over the processes."""
    means = torch.stack(
        [torch.stack([losses[name].detach().float() for losses in rounds]).mean() for name in rounds[0]]
    )
    if accelerator is not None:
        means = accelerator.reduce(means, "mean")
    return dict(zip(rounds[0], means.tolist(), strict=True))
