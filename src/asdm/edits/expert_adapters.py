"""Adapters that are merged into convolutions with expert kernels: the experts follow the own kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from asdm.edits.expert_kernels import CondConv2d
from asdm.errors import AsdmError

_IN_EXPERTS = "merged_into_experts"  # an attribute of an adapter's layer: the adapters merged into the experts


def require_followed(conv: nn.Module) -> None:
    """Raise an AsdmError where a LoRA was merged into the own kernel alone."""
    merged = _merged(conv)
    if merged != _followed(conv):
        names = ", ".join(merged or _followed(conv))
        raise AsdmError(
            f"a LoRA ({names}) was merged into a convolution's own kernel, or out of it, and not "
            "its expert kernels: merge and unmerge by fuse_lora() and unfuse_lora() of the UNet or the pipeline"
        )


def require_fusable(unet: nn.Module) -> None:
    """Raise an AsdmError where an adapter cannot be merged into a convolution with expert kernels.

    The kernels must be mixed by a softmax, and the adapter must do no more than add to a kernel.
    """
    for name, layer in _adapted(unet).items():
        require_followed(layer)
        if layer.base_layer.activation != "softmax" or not _only_adds(layer):
            raise AsdmError(
                f"{name}: expert kernels mixed by {layer.base_layer.activation} and an adapter of type "
                f"{type(layer).__name__} cannot be fused; softmax and a plain LoRA can: leave the adapter unfused"
            )


@contextmanager
def experts_following(unet: nn.Module) -> Iterator[None]:
    """Repeat on the expert kernels what adapters add to the own kernel, or subtract, within the block.

    The weights of a softmax add up to 1, so the result equals that of the adapter beside the convolution.
    """
    with ExitStack() as stack:
        for layer in _adapted(unet).values():
            if _merged(layer) == _followed(layer):
                stack.enter_context(_experts_following(layer))
        yield


@contextmanager
def _experts_following(layer: Any) -> Iterator[None]:
    conv = layer.base_layer
    weight, bias = conv.weight.clone(), conv.bias.clone()
    yield
    conv.expert_weight.data += (conv.weight.data - weight.data).flatten(1).repeat(len(conv.sources), 1)
    conv.expert_bias.data += conv.bias.data - bias.data
    setattr(layer, _IN_EXPERTS, _merged(layer))
    # A pipeline's `unfuse_lora`, and peft for a disabled adapter, call this of each layer.
    layer.unmerge = partial(_unmerge_with_experts, layer)


def _unmerge_with_experts(layer: Any) -> None:
    """Take adapters out of the own kernel, as peft's layer does, and out of the expert kernels if they are there."""
    with _experts_following(layer) if _merged(layer) == _followed(layer) else nullcontext():
        type(layer).unmerge(layer)


def _adapted(unet: nn.Module) -> dict[str, Any]:
    """Return peft's layers around convolutions with expert kernels, by name."""
    layers = {name: module for name, module in unet.named_modules() if hasattr(module, "merged_adapters")}
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer.base_layer, CondConv2d) and layer.base_layer.sources
    }


def _merged(layer: nn.Module) -> tuple[str, ...]:
    """Return the adapters merged into the own kernel."""
    return tuple(getattr(layer, "merged_adapters", ()))


def _followed(layer: nn.Module) -> tuple[str, ...]:
    """Return the adapters merged into the expert kernels."""
    return tuple(getattr(layer, _IN_EXPERTS, ()))


def _only_adds(layer: nn.Module) -> bool:
    """Return whether peft's layer only adds to the kernel; by class names, as a student loads without peft."""
    kinds = {kind.__name__ for kind in type(layer).__mro__}
    return bool(kinds & {"LoraLayer", "LycorisLayer"}) and not getattr(layer, "lora_variant", None)
