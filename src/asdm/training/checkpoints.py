"""Checkpoints: the weights, their average, the optimiser's moments and the loss scale of a step, resumed bit for bit.

`kill -9` at any moment leaves the newest checkpoint whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asdm.errors import AsdmError
from asdm.files import replacing_folder
from asdm.training.sharding import full_tensor, shard_like


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in `folder`."""
    return list(folder.glob("checkpoint-*[0-9]"))


def checkpoint_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in `folder`, 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in checkpoints(folder)), default=0)


def keep_newest(folder: Path) -> None:
    """Delete all checkpoints but the newest."""
    newest = _checkpoint(folder, checkpoint_step(folder))
    for checkpoint in checkpoints(folder):
        if checkpoint != newest:
            shutil.rmtree(checkpoint)


def delete_newest(folder: Path) -> None:
    """Delete the newest checkpoint."""
    shutil.rmtree(_checkpoint(folder, checkpoint_step(folder)))


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
        parameter.data.copy_(averaged[name].view(parameter.shape))  # a projection's of version 0.1 has another shape
    return step


class TrainingState:
    """What a checkpoint holds: weights, their average, the optimiser's moments, the loss scale of float16, the step."""

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        optimizer: Any,
        ema: EMAModel | None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.weights, self.optimizer, self.ema, self.scaler = weights, optimizer, ema, scaler

    def save(self, folder: Path, step: int, writes: bool = True) -> None:
        """Write a checkpoint; with sharded weights all processes call this, and one of them `writes`."""
        files = {"weights": _gathered(self.weights, writes), "optimizer": _gathered(self._moments(), writes)}
        if self.ema is not None:
            averaged = dict(zip(self.weights, self.ema.shadow_params, strict=True))
            files["ema"] = _gathered(averaged, writes)
        target = _checkpoint(folder, step)
        if not writes or target.exists():
            return
        with replacing_folder(target) as partial:
            for name, tensors in files.items():
                save_file(tensors, partial / f"{name}.safetensors")
            if self.scaler is not None:
                (partial / "scaler.json").write_text(json.dumps(self.scaler.state_dict()), "utf-8")

    def load_newest(self, folder: Path) -> int:
        """Load the newest checkpoint; returns its step, 0 where there is none.

        Raises:
            AsdmError: it is of another model.
        """
        step = checkpoint_step(folder)
        if step == 0:
            return 0
        path = _checkpoint(folder, step)
        self._load_weights(path)
        self._load_moments(path)
        if self.ema is not None:
            averaged = load_file(path / "ema.safetensors")
            self.ema.shadow_params = [
                shard_like(p, averaged[name]).to(p.device, copy=True) for name, p in self.weights.items()
            ]
            self.ema.optimization_step = step
        if self.scaler is not None and (path / "scaler.json").is_file():
            self.scaler.load_state_dict(json.loads((path / "scaler.json").read_text("utf-8")))
        return step

    def _load_weights(self, path: Path) -> None:
        weights = load_file(path / "weights.safetensors")
        if weights.keys() != self.weights.keys():
            raise AsdmError(f"{path}: a checkpoint of another model; use another output folder")
        for name, parameter in self.weights.items():
            parameter.data.copy_(shard_like(parameter, weights[name]))

    def _load_moments(self, path: Path) -> None:
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

    def _moments(self) -> dict[str, Tensor]:
        """Return the optimiser's state, by parameter's number and key; a copy of what parameters share."""
        moments, shared = {}, set()
        for number, state in self.optimizer.state_dict()["state"].items():
            for key, value in _flat(state):
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                moments[f"{number}.{key}"] = tensor.clone() if id(tensor) in shared else tensor
                shared.add(id(tensor))
        return moments


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:07d}"


def _gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Full tensors; sharded ones are gathered one after another and kept on the host, so that the device holds one
    full tensor at a time."""
    gathered = {}
    for name, tensor in tensors.items():
        shard = tensor.detach()
        full = full_tensor(shard)
        if keep:
            gathered[name] = (full if full is shard else full.cpu()).contiguous()
    return gathered


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values; bitsandbytes keeps some of them in a dict of their own."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value
