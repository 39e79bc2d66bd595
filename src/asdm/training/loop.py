"""One training loop for every task and any number of processes: Accelerate, EMA, checkpoints, exact resume.

What is trained and how the loss is made is the task's business; which tasks run in which order is
`stages.py`'s. The batch and the noise of a step depend on the seed and the step alone, so a resumed
run sees exactly what the uninterrupted one would have seen, and several processes, each with its part of
the same batch and noise, do what one does. `kill -9` at any moment leaves the newest checkpoint whole; the one before
it goes when the next step's loss has shown that the newest is sound.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asdm.devices import LONGEST_WAIT
from asdm.errors import AsdmError
from asdm.files import replacing_folder, write_text
from asdm.measure.machine import fast_products, fastest_precision
from asdm.training.optimizers import OptimizerName, make_optimizer
from asdm.training.sharding import keep_in_host_memory, shard_like, sharded_twin, sharding_is_asked_for, whole

Batch = Any
Progress = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class BatchSlice:
    """The `index`-th of `count` equal parts of a step's batch, for one process and one round of accumulation."""

    index: int = 0
    count: int = 1

    def of(self, size: int) -> slice:
        """Where this part lies in a batch of `size`.

        Raises:
            AsdmError: it cannot be parted equally.
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

    `forward(batch, generator)` returns a dict of scalars: "loss", which is minimised, and every
    component of it for the log. Frozen parts have `requires_grad` off. A task that can be run by several
    processes, or in rounds, takes a `BatchSlice` of the batch as a third argument.
    """

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train. `learning_rate` is the peak, reached after `warmup_steps`; weights
    whose names start with a key of `learning_rate_factors` learn at that multiple of it."""

    steps: int
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "cosine"
    final_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    checkpoint_every: int = 200
    accumulation: int = 1
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine


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

    Where the launch asks for FSDP, the processes share what is trained (`asdm.training.sharding`).

    Args:
        batch_at: the batch of a step, for all processes together; must depend on the step alone.
        folder: gets `log.jsonl` (one line a step) and `checkpoint-*`; all processes must see it.
        alone: train a whole batch in this process, whatever the others of the launch do.
        progress: called after each step with `step`, `steps`, `learning_rate`, `seconds`, every loss.
        stop_after_seconds: save and return early after that long.

    Returns:
        Whether all steps are done. The task then holds the EMA weights, if `ema_decay` is set.

    Raises:
        AsdmError: a loss is not finite, or explodes (`_Watch`), and the last checkpoint before that is kept; or the
            optimiser cannot be had, or not with FSDP.
    """
    accelerator = accelerator or make_accelerator("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    processes = 1 if alone else accelerator.num_processes
    index, writes = (0, True) if alone else (accelerator.process_index, accelerator.is_main_process)
    model: Any
    if sharded := processes > 1 and sharding_is_asked_for():
        if settings.optimizer != "adamw":
            raise AsdmError(f"optimizer={settings.optimizer}: not under FSDP; use adamw, or launch without FSDP")
        model, autocast = sharded_twin(task, accelerator.device), accelerator.autocast
        weights = model.trained()
        keep_in_host_memory(task.trained().values())
    else:
        model, autocast = accelerator.prepare_model(task, evaluation_mode=processes == 1), nullcontext
        weights = task.trained()
    optimizer = make_optimizer(
        weights,
        settings.optimizer,
        settings.learning_rate,
        settings.betas,
        settings.weight_decay,
        settings.learning_rate_factors,
    )
    optimizer = accelerator.prepare_optimizer(optimizer)
    parts = [
        BatchSlice(index * settings.accumulation + i, processes * settings.accumulation)
        for i in range(settings.accumulation)
    ]
    # Torch has no copy of many sharded tensors at once.
    ema = EMAModel(weights.values(), decay=settings.ema_decay, foreach=not sharded) if settings.ema_decay else None
    state = _TrainingState(weights, optimizer, ema, accelerator.scaler)
    step = state.load_newest(folder)
    log = _Log(folder / "log.jsonl", from_step=step) if writes else None
    watch = _Watch(folder, settings.steps)
    watch.unjudged = writes and len(_checkpoints(folder)) > 1  # the run was killed before its next loss
    started = time.monotonic()

    model.train()
    between_steps = True
    try:
        while step < settings.steps:
            before = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate_at(step) * group["factor"]
            batch, rounds = batch_at(step), []
            for part in parts:
                generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
                unshared = processes > 1 and not sharded and part is not parts[-1]
                with accelerator.no_sync(model) if unshared else nullcontext(), autocast():
                    rounds.append(model(batch, generator) if part.count == 1 else model(batch, generator, part))
                    accelerator.backward(rounds[-1]["loss"] / len(parts))
            losses = _mean(rounds, accelerator if processes > 1 else None)
            watch(losses, step)
            norm = accelerator.clip_grad_norm_(weights.values(), settings.max_grad_norm)
            if accelerator.scaler is None:  # which passes over such steps itself
                watch.require_finite(norm, step)
            between_steps = False
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(weights.values())
            step, between_steps = step + 1, True
            row = losses | {"step": step, "learning_rate": settings.learning_rate_at(step - 1)}
            if log is not None:
                log.write(row)
            out_of_time = stop_after_seconds is not None and time.monotonic() - started > stop_after_seconds
            due = step % settings.checkpoint_every == 0 or step == settings.steps or out_of_time
            if (writes or sharded) and due and not watch.steps_beyond:
                state.save(folder, step, writes)
                watch.unjudged = writes
            if progress is not None and writes:
                progress(row | {"steps": settings.steps, "seconds": time.monotonic() - before})
            if out_of_time:
                break
    except KeyboardInterrupt:
        # Else the weights are between two steps, or in parts, and the last checkpoint is the one to go on from.
        if between_steps and writes and not sharded and not watch.steps_beyond:
            state.save(folder, step)
        raise
    finally:
        if log is not None:
            log.close()
    if step >= settings.steps and writes:
        _keep_newest(folder)
    if step >= settings.steps and ema is not None:
        ema.copy_to(weights.values())
    if sharded:
        for name, parameter in task.trained().items():
            parameter.data = whole(weights[name].detach())
    task.eval()
    return step >= settings.steps


def make_accelerator(
    device: torch.device | str, mixed_precision: str = "no", *, some_unused: bool = False
) -> Accelerator:
    """An Accelerator of its own precision ("auto": the fastest of the device, for all processes as the first finds
    it): Accelerate keeps one for the whole process until it is reset.

    Args:
        device: with an index, the one that is used.
        some_unused: parts of what is trained have no share in the loss.
    """
    device = torch.device(device)
    if mixed_precision == "auto":
        found = [fastest_precision(device) if make_accelerator(device).is_main_process else None]
        mixed_precision = broadcast_object_list(found)[0]
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate takes the current one
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            DistributedDataParallelKwargs(find_unused_parameters=some_unused),
        ],
    )


def checkpoint_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in _checkpoints(folder)), default=0)


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoint-*[0-9]"))


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:07d}"


def _keep_newest(folder: Path) -> None:
    newest = _checkpoint(folder, checkpoint_step(folder))
    for checkpoint in _checkpoints(folder):
        if checkpoint != newest:
            shutil.rmtree(checkpoint)


def load_ema_weights(folder: Path, weights: dict[str, nn.Parameter]) -> int:
    """Put the newest checkpoint's averaged weights into `weights`; returns its step.

    Raises:
        AsdmError: nothing was trained in `folder` yet.
    """
    step = checkpoint_step(folder)
    if step == 0:
        raise AsdmError(f"{folder}: no checkpoint; run that stage first")
    path = _checkpoint(folder, step)
    averaged = load_file(path / ("ema.safetensors" if (path / "ema.safetensors").is_file() else "weights.safetensors"))
    for name, parameter in weights.items():
        parameter.data.copy_(averaged[name].view(parameter.shape))  # a map's of version 0.1 has another
    return step


class _TrainingState:
    """What a checkpoint holds: weights, their average, the optimiser's moments, the scale of float16's losses, the
    step."""

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        optimizer: Any,
        ema: EMAModel | None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.weights, self.optimizer, self.ema, self.scaler = weights, optimizer, ema, scaler

    def save(self, folder: Path, step: int, writes: bool = True) -> None:
        """Write a checkpoint; where the weights are sharded, all processes call this, and one of them writes."""
        files = {"weights": self._gathered(self.weights, writes), "optimizer": self._gathered(self._moments(), writes)}
        if self.ema is not None:
            averaged = dict(zip(self.weights, self.ema.shadow_params, strict=True))
            files["ema"] = self._gathered(averaged, writes)
        target = _checkpoint(folder, step)
        if not writes or target.exists():
            return
        with replacing_folder(target) as partial:
            for name, tensors in files.items():
                save_file(tensors, partial / f"{name}.safetensors")
            if self.scaler is not None:
                (partial / "scaler.json").write_text(json.dumps(self.scaler.state_dict()), "utf-8")

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's state, by parameter's number and key; a copy of what parameters share."""
        moments, shared = {}, set()
        for number, state in self.optimizer.state_dict()["state"].items():
            for key, value in _flat(state):
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                moments[f"{number}.{key}"] = tensor.clone() if id(tensor) in shared else tensor
                shared.add(id(tensor))
        return moments

    @staticmethod
    def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors; of sharded ones, on the host and one after another, so that one at a time is whole beside."""
        gathered = {}
        for name, tensor in tensors.items():
            part = tensor.detach()
            complete = whole(part)
            if keep:
                gathered[name] = (complete if complete is part else complete.cpu()).contiguous()
        return gathered

    def load_newest(self, folder: Path) -> int:
        step = checkpoint_step(folder)
        if step == 0:
            return 0
        path = _checkpoint(folder, step)
        weights = load_file(path / "weights.safetensors")
        if weights.keys() != self.weights.keys():
            raise AsdmError(f"{path}: a checkpoint of another model; use another output folder")
        for name, parameter in self.weights.items():
            parameter.data.copy_(shard_like(parameter, weights[name]))
        state: dict[int, dict[str, Tensor | int]] = {}
        numbered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, value in load_file(path / "optimizer.safetensors").items():
            index, key = name.split(".", 1)
            parameter = numbered[int(index)]
            # bitsandbytes counts its steps in an int.
            counts = not value.ndim and not value.is_floating_point()
            state.setdefault(int(index), {})[key] = int(value) if counts else shard_like(parameter, value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.ema is not None:
            averaged = load_file(path / "ema.safetensors")
            self.ema.shadow_params = [
                shard_like(p, averaged[name]).to(p.device, copy=True) for name, p in self.weights.items()
            ]
            self.ema.optimization_step = step
        if self.scaler is not None and (path / "scaler.json").is_file():
            self.scaler.load_state_dict(json.loads((path / "scaler.json").read_text("utf-8")))
        return step


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values; bitsandbytes keeps some of them in a dict of their own."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value


class _Log:
    """`log.jsonl`, a line a step, and TensorBoard events where it is installed.

    Lines after the step that is resumed from are dropped.
    """

    def __init__(self, path: Path, from_step: int):
        kept = [row for row in read_log(path) if row["step"] <= from_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", encoding="utf-8")
        self.board = _tensorboard(path.parent / "tensorboard", from_step)

    def write(self, row: dict[str, float]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _tensorboard(folder: Path, from_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a `log.jsonl`; a last line that was cut short is passed over."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _mean(rounds: list[dict[str, Tensor]], accelerator: Accelerator | None) -> dict[str, float]:
    """Each loss's mean over the rounds and, with `accelerator`, over the processes."""
    means = torch.stack(
        [torch.stack([losses[name].detach().float() for losses in rounds]).mean() for name in rounds[0]]
    )
    if accelerator is not None:
        means = accelerator.reduce(means, "mean")
    return dict(zip(rounds[0], means.tolist(), strict=True))


NEGLIGIBLE = 0.1  # a loss that does not explode, from whatever it began at: a student may be its teacher at first


class _Watch:
    """Stops a run whose loss or gradient is not finite, or whose loss explodes: three steps in a row at more than a
    hundred times its lowest mean so far and ten times its first value.

    A checkpoint is `unjudged` until the next loss is as it should be; a run that is stopped before goes on from the one
    before it.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps, self.steps_beyond, self.unjudged = folder, steps, 0, False
        self.first = self.mean = self.lowest = math.inf

    def __call__(self, losses: dict[str, float], step: int) -> None:
        broken = [name for name, value in losses.items() if not math.isfinite(value)]
        if broken:
            components = [name for name in broken if name != "loss"] or broken
            self._stop(f"{', '.join(components)} is not finite", step)
        loss = losses["loss"]
        if math.isinf(self.first):
            self.first = self.mean = self.lowest = loss
        if loss > max(100 * self.lowest, 10 * self.first, NEGLIGIBLE):
            self.steps_beyond += 1
            if self.steps_beyond == 3 or step + 1 == self.steps:
                parts = {name: value for name, value in losses.items() if name.startswith("weighted/")} or {
                    name: value for name, value in losses.items() if name != "loss"
                }
                largest = max(parts, key=lambda name: parts[name], default="loss").removeprefix("weighted/")
                self._stop(f"{largest} explodes (the loss is {loss:.3g} and was {self.lowest:.3g})", step)
        else:
            self.steps_beyond = 0
            self.mean += 0.1 * (loss - self.mean)
            self.lowest = min(self.lowest, self.mean)
            if self.unjudged:
                _keep_newest(self.folder)
                self.unjudged = False

    def require_finite(self, norm: Any, step: int) -> None:
        """Of the gradient, whose loss may be finite all the same."""
        if isinstance(norm, Tensor) and not whole(norm).isfinite():
            self._stop("the gradient is not finite", step)

    def _stop(self, what: str, step: int) -> None:
        if self.unjudged:
            shutil.rmtree(_checkpoint(self.folder, checkpoint_step(self.folder)))
        raise AsdmError(
            f"{what} at step {step + 1}; the last good checkpoint in {self.folder} is kept: lower the learning rate "
            "and run again"
        )
