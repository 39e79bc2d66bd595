"""Checkpoints: the weights, their average, the optimiser's moments and the loss scale of a step, resumed bit for bit.

`kill -9` at any moment leaves the newest checkpoint whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import Tensor, nn

from asdm.errors import AsdmError, one_line
from asdm.files import replacing_folder
from asdm.reading import read_json
from asdm.tensor_files import load_tensors
from asdm.training.optimizers import moment_names
from asdm.training.sharding import full_tensor, shard_like

_NAME = re.compile("checkpoint-[0-9]{1,12}")
_REMEDY = "remove this checkpoint's folder, and run the training again, which resumes at the one before"


def checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in `folder`."""
    return [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]


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
    file = path / ("ema.safetensors" if (path / "ema.safetensors").is_file() else "weights.safetensors")
    averaged = load_tensors(file, _REMEDY)
    for name, parameter in weights.items():
        if name not in averaged or averaged[name].numel() != parameter.numel():
            raise _of_another(path)
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
            averaged = self._of_this_model(path, "ema")
            self.ema.shadow_params = [
                shard_like(p, averaged[name]).to(p.device, copy=True) for name, p in self.weights.items()
            ]
            self.ema.optimization_step = step
        if self.scaler is not None and (path / "scaler.json").is_file():
            self._load_scaler(path / "scaler.json")
        return step

    def _load_weights(self, path: Path) -> None:
        weights = self._of_this_model(path, "weights")
        for name, parameter in self.weights.items():
            parameter.data.copy_(shard_like(parameter, weights[name]))

    def _of_this_model(self, path: Path, name: str) -> dict[str, Tensor]:
        """Return a checkpoint's file of tensors that belong to the weights by name and shape."""
        tensors = load_tensors(path / f"{name}.safetensors", _REMEDY)
        sizes = {key: tensor.numel() for key, tensor in tensors.items()}  # version 0.1 saved some in other shapes
        if sizes != {key: parameter.numel() for key, parameter in self.weights.items()}:
            raise _of_another(path)
        return tensors

    def _load_moments(self, path: Path) -> None:
        file = path / "optimizer.safetensors"
        state: dict[int, dict[str, Tensor | int]] = {}
        numbered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, value in load_tensors(file, _REMEDY).items():
            number, _, key = name.partition(".")
            if not (number.isdecimal() and int(number) < len(numbered)):
                raise AsdmError(f"{file}: {name} is no moment of this optimizer; {_REMEDY}")
            # bitsandbytes counts its steps in an int.
            counts = not value.ndim and not value.is_floating_point()
            moment = int(value) if counts else shard_like(numbered[int(number)], value)
            state.setdefault(int(number), {})[key] = moment
        self._require_moments(state, numbered, file)
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise AsdmError(f"{file}: moments of another optimizer ({one_line(error)}); {_REMEDY}") from None

    def _require_moments(self, state: dict[int, dict[str, Any]], numbered: list[nn.Parameter], file: Path) -> None:
        """Raise an AsdmError where a parameter's moments are not those of its optimizer, by name and size."""
        allowed = moment_names(self.optimizer)
        for number, moments in state.items() if allowed is not None else ():
            sizes = {"step": 1} | dict.fromkeys(moments.keys() - {"step"}, numbered[number].numel())
            is_sized = all(isinstance(m, Tensor) and m.numel() == sizes[key] for key, m in moments.items())
            if moments.keys() not in (allowed or ()) or not is_sized:
                raise AsdmError(f"{file}: the moments of parameter {number} are another optimizer's; {_REMEDY}")

    def _load_scaler(self, path: Path) -> None:
        assert self.scaler is not None
        try:
            self.scaler.load_state_dict(read_json(path))
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise AsdmError(f"{path}: no loss scale ({one_line(error)}); {_REMEDY}") from None

    def _moments(self) -> dict[str, Tensor]:
        """Return the optimiser's state, by parameter's number and key; a copy of what parameters share."""
        moments, shared = {}, set()
        for number, state in self.optimizer.state_dict()["state"].items():
            for key, value in _flat(state):
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                moments[f"{number}.{key}"] = tensor.clone() if id(tensor) in shared else tensor
                shared.add(id(tensor))
        return moments


def require_same_run(
    folder: Path, known: Mapping[str, Any], now: Mapping[str, Any], *, may_lengthen: bool = True
) -> None:
    """Require that the checkpoints in a folder are of a run with these settings.

    Args:
        known: the settings that the run was begun with.
        may_lengthen: the number of `steps` may have grown since.

    Raises:
        AsdmError: they are another run's.
    """
    changed = [name for name in now if known.get(name) != now[name]]
    steps = known.get("steps")
    is_longer = may_lengthen and isinstance(steps, int) and changed == ["steps"] and now["steps"] > steps
    if changed and not is_longer:
        raise AsdmError(
            f"{folder}: begun with other settings ({', '.join(changed)}); repeat those, or use another output folder"
        )


def _of_another(path: Path) -> AsdmError:
    return AsdmError(f"{path}: a checkpoint of another model; use another output folder")


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
