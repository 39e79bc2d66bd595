"""Fully sharded data parallelism (FSDP2): each process of a launch holds a part of what is trained.

Weights, gradients, moments and averages are parted; what is frozen stays whole in every process. Torch's `fully_shard`
is called here, as Accelerate shards only on accelerators, and with the frozen weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

GATHERED_TOGETHER = (ResnetBlock2D, BasicTransformerBlock)  # whole for as long as they compute
Task = TypeVar("Task", bound=nn.Module)


def sharding_is_asked_for() -> bool:
    """Whether the launch asks for it, as `accelerate launch --use_fsdp` or its config does."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def sharded_twin(task: Task, device: torch.device) -> Task:
    """The task again, with the same frozen children, and with those that are trained parted over the processes.

    `task` is left as it is; `Tensor.full_tensor` of the twin's parameters, called by all processes, brings them back.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    twin = copy.copy(task)
    twin._modules = {name: _sharded(child, mesh) for name, child in task._modules.items()}
    return twin


def _sharded(module: nn.Module | None, mesh: DeviceMesh) -> nn.Module | None:
    if module is None or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    # Modules of its own, and the same tensors, until they are replaced by their parts.
    same = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, same)
    for part in twin.modules():
        if isinstance(part, GATHERED_TOGETHER):
            fully_shard(part, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    return twin


def whole(tensor: Tensor) -> Tensor:
    """The tensor that this process may hold a part of; all processes call it for the same ones, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(reference: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a tensor that all of them hold, where `reference` is parted; in its shape, where that was
    saved as another (by version 0.1)."""
    if tensor.numel() == reference.numel():
        tensor = tensor.view(reference.shape)
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    tensor = tensor.to(reference.device_mesh.device_type)
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def keep_in_host_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Make room on the accelerator for as long as a sharded twin is trained in their place."""
    for parameter in parameters:
        parameter.data = parameter.data.cpu()
