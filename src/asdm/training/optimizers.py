"""Optimisers: AdamW, the same with moments of 8 bits, and Muon, which takes fewer steps for the price of some matrix
products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from asdm.errors import AsdmError, needs_extra

OptimizerName = Literal["adamw", "adamw8bit", "muon"]


def make_optimizer(
    weights: dict[str, nn.Parameter],
    name: OptimizerName,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    learning_rate_factors: dict[str, float],
) -> torch.optim.Optimizer:
    """Return the optimiser of `weights`, by parameter name; vectors (norms, biases) are not decayed.

    `learning_rate_factors` slows down or speeds up the weights whose names start so; each group holds its
    factor as `factor`.

    Raises:
        AsdmError: bitsandbytes, whose AdamW keeps its moments in 8 bits (arXiv 2110.02861), is not installed.
    """

    def factor(weight: str) -> float:
        return next((f for start, f in learning_rate_factors.items() if weight.startswith(start)), 1.0)

    grouped: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for weight, parameter in weights.items():
        grouped[is_matrix(parameter), factor(weight)].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": weight_decay if matrix else 0.0, "factor": by, "muon": matrix}
        for (matrix, by), parameters in grouped.items()
    ]
    if name == "muon":
        return Muon(groups, lr=learning_rate, betas=betas)
    require_installed(name)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def require_installed(name: OptimizerName) -> None:
    """Raise an AsdmError where an optimiser's package is not installed."""
    if name == "adamw8bit":
        with needs_extra("8bit", "optimizer=adamw8bit"):
            import bitsandbytes.optim  # noqa: F401


def require_shardable(name: OptimizerName) -> None:
    """Raise an AsdmError for an optimiser that reads whole tensors, of which a process has a shard under FSDP."""
    if name != "adamw":
        raise AsdmError(f"optimizer={name}: not under FSDP; use adamw, or launch without FSDP")


def moment_names(optimizer: Any) -> list[set[str]] | None:
    """Return the names of a parameter's moments, one set for each kind of step; None where they are not known."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of Accelerate's wrapper
    kinds: dict[type, list[set[str]]] = {
        torch.optim.AdamW: [{"step", "exp_avg", "exp_avg_sq"}],
        Muon: [{"momentum"}, {"step", "mean", "square"}],
    }
    return kinds.get(type(optimizer))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon), so that every direction of a layer learns at the same pace.

    The step's size is matched to AdamW's (arXiv 2502.16982, Sec. 2.2), so that one learning rate serves
    both. Kernels of convolutions count as matrices (out, in * h * w). Groups without `muon` set, such as
    norms and biases, take AdamW steps. `torch.optim.Muon` refuses kernels, and takes its matrices one by one;
    here those of one shape go through together, and the iteration runs on their small Gram matrices.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float] = (0.9, 0.999), momentum: float = 0.95
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            (self._muon_step if group["muon"] else self._adamw_step)(group)
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
            by_shape[update.shape].append((parameter, update))
        for shape, items in by_shape.items():
            scale = 0.2 * max(shape) ** 0.5
            updates = orthogonalized(torch.stack([update for _, update in items]))
            for (parameter, _), update in zip(items, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * scale)

    def _adamw_step(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {"mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
                self.state[parameter] |= {"step": torch.tensor(0.0), **zeros}
        states = [self.state[parameter] for parameter in parameters]
        first, second = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (count, rows, columns) with their singular values pushed to about 1.

    Muon's quintic Newton-Schulz iteration. It acts on the Gram matrix alone: every iterate is a polynomial
    of it times the matrix.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    norms = torch.linalg.matrix_norm(wide, keepdim=True).clamp_min(1e-12)
    gram = wide @ wide.mT / norms.square()
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    product = None
    for step in range(steps):
        polynomial = torch.baddbmm(a * identity + b * gram, gram, gram, alpha=c)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    result = (product / norms) @ wide
    return result if wide is matrices else result.mT


def is_matrix(parameter: Tensor) -> bool:
    """Return whether a parameter has columns: matrices and kernels, not the scales of a depthwise 1x1 convolution."""
    return parameter.shape[1:].numel() > 1
