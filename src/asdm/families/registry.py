"""Which families there are, and which one a model, a pipeline or a class is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.errors import AsdmError
from asdm.families.base import Denoiser, ModelFamily
from asdm.measure.macs import MacCount, counting_macs

_FAMILIES: list[ModelFamily] = []


def register_family(family: type[ModelFamily]) -> type[ModelFamily]:
    """Make a family known (a class decorator)."""
    _FAMILIES.append(family())
    return family


def families() -> Sequence[ModelFamily]:
    """Return all registered families."""
    return tuple(_FAMILIES)


def family_of(model: Any) -> ModelFamily:
    """Return the family of a denoiser, or of a pipeline's denoiser: the one of the most derived class. What stands in
    for a denoiser, such as exported graphs, names its family in its attribute `family`.

    Raises:
        AsdmError: it is of none of the registered families.
    """
    if isinstance(model, DiffusionPipeline):
        return family_of(denoiser_of(model))
    named = getattr(model, "family", None)
    if isinstance(named, ModelFamily):
        return named
    fitting = [family for family in _FAMILIES if isinstance(model, family.model_class)]
    if fitting:
        return max(fitting, key=lambda family: len(family.model_class.__mro__))
    if hasattr(model, "_orig_mod"):
        raise AsdmError("the model is compiled; give the original of it, its attribute _orig_mod")
    raise _unknown(type(model).__name__)


def family_named(class_name: str) -> ModelFamily:
    """Return the family whose stock class, or a subclass of it, has this name.

    Raises:
        AsdmError: there is none.
    """
    fitting = [family for family in _FAMILIES if class_name.endswith(family.model_class.__name__)]
    if not fitting:
        raise _unknown(class_name)
    return max(fitting, key=lambda family: len(family.model_class.__name__))


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """Return the pipeline's denoiser: its UNet or transformer.

    Raises:
        AsdmError: it has none of a registered family.
    """
    return getattr(pipeline, component_of(pipeline))


def component_of(pipeline: DiffusionPipeline) -> str:
    """Return the name of the pipeline's component that is its denoiser.

    Raises:
        AsdmError: it has none of a registered family.
    """
    for family in _FAMILIES:
        if getattr(pipeline, family.component, None) is not None:
            return family.component
    raise _unknown(type(pipeline).__name__)


def denoiser_call(model: Denoiser, batch_size: int = 2, seed: int = 0) -> Callable[[], Tensor]:
    """One call of a denoiser on random inputs at its native size; batch 2 is one image with guidance."""
    family = family_of(model)
    arguments = family.random_inputs(model, batch_size, seed)
    return lambda: family.predict(model, arguments)


def macs_of_call(model: Denoiser) -> MacCount:
    """Count what a denoiser computes for one sample at its native size."""
    with counting_macs(model) as count:
        denoiser_call(model, batch_size=1)()
    return count


def _unknown(name: str) -> AsdmError:
    known = ", ".join(family.model_class.__name__ for family in _FAMILIES)
    return AsdmError(f"{name}: no denoiser of a known family; known are {known}")
