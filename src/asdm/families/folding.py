"""Projections folded into the layers around them, which changes no output. Knows no architecture.

A chain is a part of a model in which each step's output is read by the next step alone. A projection y = A x + b in it
folds into what makes x, where all of x is put out by layers: W to A W, c to A c + b. It folds into what reads y, a 1x1
layer: W to W A, c to c + W b. Behind a residual step x + f(x) only its constant folds, into the last layer of f.
Projections behind each other become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asdm.choices import CompensationKind
from asdm.edits.expert_kernels import CondConv2d
from asdm.edits.projections import ConstantProjection, ScaleProjection, TimeProjection, projection_of
from asdm.edits.remove import RemovedUnit

_LAYERS = (nn.Linear, nn.Conv2d, TimeProjection, CondConv2d)  # no subclasses: those of quantised layers, for example
_KINDS: tuple[CompensationKind, ...] = ("bias", "diagonal", "linear")  # by the dimensions of the weight


@dataclass(frozen=True)
class Affine:
    """A function of channels: y = `weight` x + `bias`, in float64.

    `weight` is (out, in), or (channels,) where it is diagonal; None for the identity.
    """

    weight: Tensor | None
    bias: Tensor

    @classmethod
    def of(cls, projection: Any) -> Affine:
        """Return what a projection makes of the hidden states, which it may add to."""
        bias = _exact(projection.bias)
        if isinstance(projection, ConstantProjection):
            return cls(None, bias)
        weight = _exact(projection.weight).flatten(0 if isinstance(projection, ScaleProjection) else 1)
        return cls(weight + _identity(weight) if projection.adds else weight, bias)

    @property
    def kind(self) -> CompensationKind:
        """The simplest kind of projection that can be this function."""
        return _KINDS[0 if self.weight is None else self.weight.ndim]

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing at all."""
        unchanged = self.weight is None or torch.equal(self.weight, _identity(self.weight))
        return unchanged and not self.bias.any()

    def linear(self, tensor: Tensor) -> Tensor:
        """Return `weight` times a tensor (.., in, n)."""
        if self.weight is None:
            return tensor
        return self.weight[:, None] * tensor if self.weight.ndim == 1 else self.weight @ tensor

    def then(self, after: Affine) -> Affine:
        """Return this function followed by another."""
        bias = after.linear(self.bias[:, None])[:, 0] + after.bias
        if self.weight is None:
            return Affine(after.weight, bias)
        if self.weight.ndim == 2 or after.weight is None:
            return Affine(after.linear(self.weight) if self.weight.ndim == 2 else self.weight, bias)
        return Affine(after.weight * self.weight, bias)


@dataclass(frozen=True)
class Kept:
    """A step that stays.

    `layers`: those whose outputs add up to all of the step's output; none where its input passes by. `constant`: a
    layer whose bias is added to the output, and None where there is none. Their sum is divided by `scale`.
    """

    layers: tuple[Any, ...] = ()
    constant: Any = None
    scale: float = 1.0

    def absorb(self, after: Affine) -> bool:
        """Fold what follows the step into its layers; return whether that is possible."""
        constant = self.constant
        if not _is_plain(constant) or constant.bias is None:
            return False
        if after.weight is not None and (not self.layers or not all(map(_is_plain, self.layers))):
            return False
        if after.weight is None and isinstance(constant, CondConv2d):  # its biases are mixed, by weights of any sum
            return False
        for layer in self.layers if after.weight is not None else ():
            _transform_output(layer, after)
        _set(constant.bias, _exact(constant.bias) + self.scale * after.bias)
        return True


@dataclass(frozen=True)
class Removed:
    """A removed unit with a projection in its place. What it adds up is divided by `scale`."""

    unit: str
    module: RemovedUnit
    scale: float = 1.0

    @property
    def function(self) -> Affine:
        """The projection, without `scale`."""
        return Affine.of(self.module.compensation)

    @property
    def can_go(self) -> bool:
        """Whether the projection is all that the module does."""
        return self.scale == 1 and self._time is None

    @property
    def _time(self) -> Any:
        return getattr(self.module, "time_compensation", None)

    def absorb(self, after: Affine) -> bool:
        """Fold what follows the unit into its projection; return whether that is possible."""
        both = self.function.then(Affine(after.weight, self.scale * after.bias))
        if self._time is not None:
            if both.kind == "diagonal":  # a kind of projection that has no term of the time embedding
                return False
            _transform_output(self._time, after)
        self._replace(both)
        return True

    def drop(self) -> None:
        """Leave the identity in the projection's place."""
        self.module.compensation = None

    def _replace(self, function: Affine) -> None:
        old = self.module.compensation
        new: Any = projection_of(function.kind, len(function.bias), tokens=old.adds)
        new.to(old.bias.device, old.bias.dtype).train(old.training).requires_grad_(old.bias.requires_grad)
        if function.weight is not None:
            weight = function.weight - _identity(function.weight) if old.adds else function.weight
            _set(new.weight, weight.view(new.weight.shape))
        _set(new.bias, function.bias)
        self.module.compensation = new


def fold_chain(chain: Sequence[Kept | Removed], reader: Any = None) -> dict[str, CompensationKind]:
    """Fold in place the projections of a chain; return the kinds that are then left, for units where that changes.

    Args:
        chain: its steps in order of execution, without those that do nothing.
        reader: the layer that alone reads the last step's output, if it is a 1x1 convolution or linear.
    """
    kinds: dict[str, CompensationKind] = {}
    before: Kept | Removed | None = None
    for step in chain:
        if isinstance(step, Removed) and step.can_go and before is not None and before.absorb(step.function):
            step.drop()
            kinds[step.unit] = "none"
            if isinstance(before, Removed):
                kinds[before.unit] = before.function.kind
        else:
            before = step
    if isinstance(before, Removed) and before.can_go and _reads_channels(reader):
        _transform_input(reader, before.function)
        before.drop()
        kinds[before.unit] = "none"
    return kinds


def _is_plain(layer: Any) -> bool:
    """Return whether it is a layer whose outputs can be transformed by its tensors."""
    return type(layer) in _LAYERS and getattr(layer, "groups", 1) == 1


def _reads_channels(layer: Any) -> bool:
    """Return whether it is a layer that reads one position at a time."""
    return _is_plain(layer) and layer.bias is not None and layer.weight.shape[2:].numel() == 1


def _transform_output(layer: Any, after: Affine) -> None:
    """Let a layer put out what `after`, without its constant, makes of its output."""
    _set(layer.weight, after.linear(_exact(layer.weight).flatten(1)).view(layer.weight.shape))
    if layer.bias is not None:
        _set(layer.bias, after.linear(_exact(layer.bias)[:, None])[:, 0])
    if isinstance(layer, CondConv2d) and layer.sources:
        kernels = _exact(layer.expert_weight).unflatten(0, (-1, layer.out_channels))
        _set(layer.expert_weight, after.linear(kernels).flatten(0, 1))
        _set(layer.expert_bias, after.linear(_exact(layer.expert_bias).mT).mT)


def _transform_input(layer: Any, before: Affine) -> None:
    """Let a layer read what `before` reads."""
    weight = _exact(layer.weight).flatten(1)
    _set(layer.bias, _exact(layer.bias) + weight @ before.bias)
    if before.weight is not None:
        both = weight * before.weight if before.weight.ndim == 1 else weight @ before.weight
        _set(layer.weight, both.view(layer.weight.shape))


def _exact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # MPS has no float64


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value)


def _identity(like: Tensor) -> Tensor:
    """Return the identity as a weight (channels, channels) or (channels,)."""
    ones = torch.ones(len(like), dtype=like.dtype, device=like.device)
    return ones if like.ndim == 1 else ones.diag()
