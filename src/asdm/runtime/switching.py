"""Several denoisers in one pipeline: a small one at high noise, the original at low noise, where details are made.

Named in the abstract of arXiv 2406.00210 ("multi-UNet switching"); the rest is inferred.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm import checks
from asdm.diffusion.parameterization import parameterization_of
from asdm.digests import short_digest
from asdm.errors import AsdmError, NoSuchPartError
from asdm.families import Denoiser, ModelFamily, denoiser_call, family_of, require_torch
from asdm.measure.latency import measure_interleaved
from asdm.pipelines.derived import with_unet
from asdm.tensor_files import weights_digest

_DENOISERS = checks.each(checks.UNET, least=1)
_FRACTIONS = checks.each(checks.number())


class SwitchedDenoiser(nn.Module):
    """Several denoisers as one; the time step chooses which of them predicts. `switched` makes it.

    It stands in any pipeline while that is in memory. Save the denoisers themselves.
    """

    denoisers: nn.ModuleList  # from high noise to low
    boundaries: list[float]  # time steps below which each but the first takes over
    family: ModelFamily

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser that the (first) time step belongs to."""
        timestep = self.family.call_arguments(args, kwargs)["timestep"]
        now = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        place = sum(now < boundary for boundary in self.boundaries)
        return self.denoisers[place](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise NoSuchPartError(
                f"{name}: several denoisers in one pipeline have no parts of their own; do this with the pipeline of "
                "each, before switch_unets joins them"
            ) from error

    def __reduce__(self) -> Any:
        return _without_parts, (self.family.model_class,), vars(self)

    @property
    def add_embedding(self) -> Any:
        """SDXL's pipelines read its width."""
        return self.denoisers[-1].add_embedding

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        """As of each denoiser."""
        self._each("set_attention_slice", slice_size)

    def enable_freeu(self, *args: Any, **kwargs: Any) -> None:
        """As of each denoiser."""
        self._each("enable_freeu", *args, **kwargs)

    def disable_freeu(self) -> None:
        """As of each denoiser."""
        self._each("disable_freeu")

    def _each(self, method: str, *args: Any, **kwargs: Any) -> None:
        for denoiser in self.denoisers:
            getattr(denoiser, method)(*args, **kwargs)

    def load_lora_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """
        Raises:
            AsdmError: always.
        """
        raise AsdmError("several denoisers in one pipeline take no LoRA; load it into each, before they are joined")

    def _load_ip_adapter_weights(self, *_: Any, **__: Any) -> NoReturn:
        """
        Raises:
            AsdmError: always.
        """
        raise AsdmError("several denoisers in one pipeline take no IP-Adapter; load it into the pipeline of one")

    @property
    def megabytes(self) -> float:
        """Memory of the weights of all denoisers; tensors that they share count once."""
        tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in self.parameters()}
        return sum(tensors.values()) / 1e6

    def weights_digest(self) -> str:
        """Return a digest of the denoisers, their edits and the boundaries."""
        denoisers: Any = self.denoisers
        parts = [(weights_digest(each), each.config.get("edits")) for each in denoisers]
        return short_digest(json.dumps([self.boundaries, parts], default=str, sort_keys=True))

    def cache_cut(self, depth: int) -> NoReturn:
        """Features of one denoiser are not those of another.

        Raises:
            AsdmError: always.
        """
        raise AsdmError(f"a {type(self).__name__} has no blocks of its own; cache a pipeline with one denoiser")

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """
        Raises:
            AsdmError: always.
        """
        raise AsdmError("several denoisers in one pipeline are not saved together; save the pipeline of each")


@cache
def _switched_class(model_class: Any) -> type[Any]:
    """Return a class that pipelines take for the stock class."""
    return type(f"Switched{model_class.__name__}", (SwitchedDenoiser, model_class), {})


def _without_parts(model_class: Any) -> Any:
    """Return an object of the class, to which pickle gives its parts."""
    kind: Any = _switched_class(model_class)
    return object.__new__(kind)


@checks.arguments(denoisers=_DENOISERS, below=_FRACTIONS, timesteps=checks.whole())
def switched(denoisers: Sequence[Denoiser], below: Sequence[float], timesteps: int = 1000) -> Any:
    """Join several denoisers of one family.

    Args:
        denoisers: from high noise to low.
        below: for each but the first, the fraction of the schedule, in (0, 1) and falling, below which it takes over.
        timesteps: of the schedule.

    Raises:
        AsdmError: the numbers do not fit, or the denoisers read and write other tensors, have other dtypes or devices,
            or are exported graphs.
    """
    falling = [1.0, *below, 0.0]
    if len(below) != len(denoisers) - 1 or any(a <= b for a, b in itertools.pairwise(falling)):
        raise AsdmError(
            f"below={list(below)}: for {len(denoisers)} denoisers give {len(denoisers) - 1} falling fractions of the "
            "schedule between 1 and 0"
        )
    family = family_of(denoisers[0])
    _require_alike(family, denoisers)
    config = {name: value for name, value in denoisers[-1].config.items() if name != "edits" and name[0] != "_"}
    with torch.device("meta"):
        joined = _switched_class(family.model_class)(**config)  # type: ignore[arg-type]
    for name in [name for name, _ in joined.named_children()]:
        delattr(joined, name)
    joined.denoisers = nn.ModuleList(denoisers)
    joined.boundaries = [fraction * timesteps for fraction in below]
    joined.family = family
    return joined.eval()


def _require_alike(family: ModelFamily, denoisers: Sequence[Any]) -> None:
    first = denoisers[0]
    for denoiser in denoisers:
        require_torch(denoiser)
    for denoiser in denoisers[1:]:
        own = family_of(denoiser)
        if own is not family:
            raise AsdmError(f"a {family.label} and a {own.label}: switch between denoisers of one kind")
        name = family.unlike(first, denoiser)
        if name is not None:
            raise AsdmError(
                f"{name}: {first.config[name]} and {denoiser.config[name]}; switch between denoisers of one kind"
            )
        for name in ("dtype", "device"):
            one, other = getattr(first, name), getattr(denoiser, name)
            if one != other:
                raise AsdmError(f"{name}: {one} and {other}; bring the denoisers to one by .to({other})")


@checks.arguments(pipeline=checks.PIPELINE, unets=_DENOISERS, below=_FRACTIONS, speedup=checks.SPEEDUP)
def switch_unets(
    pipeline: DiffusionPipeline,
    unets: Sequence[Denoiser],
    *,
    below: Sequence[float] | None = None,
    speedup: float | None = None,
) -> DiffusionPipeline:
    """Make a pipeline that shares everything with `pipeline` and switches between denoisers.

    Args:
        unets: from high noise to low, usually a student and then the original.
        below: where each denoiser but the first takes over, as the fraction of the schedule that is left then.
        speedup: instead of `below`, for two denoisers: how many times faster all calls together are than calls of the
            second one alone; a timed call of each gives the fraction.

    Raises:
        AsdmError: not exactly one of `below` and `speedup`, a speed-up that even the first denoiser alone does not
            reach, or time steps that are no part of a schedule (EDM's, of CosXL and Playground v2.5).
    """
    if (below is None) == (speedup is None):
        raise AsdmError("give either below or speedup")
    timesteps = parameterization_of(pipeline.scheduler).num_timesteps
    if below is None:
        assert speedup is not None
        below = [1 - _student_fraction(pipeline, unets, speedup)]
    return with_unet(pipeline, switched(unets, below, timesteps))


def _student_fraction(pipeline: DiffusionPipeline, unets: Sequence[Denoiser], speedup: float) -> float:
    """Return the fraction of the schedule that the first of two denoisers predicts, so that all calls are so much
    faster."""
    if len(unets) != 2:
        raise AsdmError(f"speedup={speedup:g}: is for two denoisers, not {len(unets)}; give below")
    calls = {str(index): denoiser_call(unet) for index, unet in enumerate(unets)}
    times = measure_interleaved(calls, rounds=5, device=pipeline.device)
    first, last = times["0"].ms, times["1"].ms
    fraction = (1 - 1 / speedup) / (1 - first / last) if first < last else 2.0
    if not 0 < fraction < 1:
        raise AsdmError(
            f"speedup={speedup:g}: out of reach; the first denoiser alone is {last / first:.2f} times as fast as the "
            "second; give between 1 and that"
        )
    return fraction
