"""Fully sharded data parallelism (FSDP2): each process of a launch holds a shard of what is trained.

Weights, gradients, moments and averages are sharded; frozen parameters stay whole in every process. Torch's
`fully_shard` is called here, because Accelerate shards on accelerators only, and the frozen weights with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from asdm.families import families

Task = TypeVar("Task", bound=nn.Module)


def is_sharding_requested() -> bool:
    """Return whether the launch requests it, as `accelerate launch --use_fsdp` or its config does."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def gathered_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers inside a module whose weights are gathered together, for as long as each computes."""
    classes = tuple(each for family in families() for each in family.layer_classes)
    return [part for part in module.modules() if isinstance(part, classes)]


def sharded_twin(task: Task, device: torch.device) -> Task:
    """Make a second task with the same frozen children, and with shards of those that are trained.

    `task` stays as it is; `full_tensor` of the twin's parameters, called by all processes, brings them back.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    twin = copy.copy(task)
    twin._modules = {name: _sharded(child, mesh) for name, child in task._modules.items()}
    return twin


def _sharded(module: nn.Module | None, mesh: DeviceMesh) -> nn.Module | None:
    if module is None or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    # Modules of its own, and the same tensors, until their shards replace them.
    same = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, same)
    for layer in gathered_layers(twin):
        fully_shard(layer, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    return twin


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; all processes call it for the same ones, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(reference: Tensor, tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that all of them hold, where `reference` is sharded; in its shape, where
    version 0.1 saved another."""
    if tensor.numel() == reference.numel():
        tensor = tensor.view(reference.shape)
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    tensor = tensor.to(reference.device_mesh.device_type)
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def keep_in_host_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters to the host, while a sharded twin is trained in their place."""
    for parameter in parameters:
        parameter.data = parameter.data.cpu()
