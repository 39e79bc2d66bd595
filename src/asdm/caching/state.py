"""Where in a sampling the denoiser is, and what is cached in it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class SamplingState(threading.local):
    """The state of one sampling. Each thread that calls the denoiser has its own."""

    def __init__(self) -> None:
        self.is_cached = False  # the call that is under way
        self.sigma = 0.0  # its noise level
        self.forced: bool | None = None  # whether calls are cached, whatever the schedule says
        self.cache: dict[Any, list[tuple[float, Any]]] = {}  # hook -> (noise level, value), oldest first
        self.other_outputs: dict[Any, Any] = {}  # hook -> what its module put out beside the cached value
        self.restart()

    def restart(self) -> None:
        """The next call is the first of a sampling."""
        self.timesteps: Any = None  # the scheduler's
        self.index = -1  # the last call's, among them
        self.form: tuple[Any, ...] = ()  # the sample's shape, dtype and device
        self.prompts: Any = None  # embeddings
        self.is_interleaved = False  # several samplings visit each step
        self.clear()

    def clear(self) -> None:
        """Drop what is cached."""
        self.cache.clear()
        self.other_outputs.clear()
        self.fresh: Tensor | None = None  # the input that cached values are relative to
        self.first_output: Tensor | None = None  # by a budget: the first layer's, and how far it has moved since
        self.change = 0.0

    def advance(self, scheduler: Any, timestep: float, form: tuple[Any, ...], prompts: Any) -> tuple[int, int] | None:
        """Move on to the step of a call.

        A pipeline embeds the prompts for each sampling, so a call with the last call's own embeddings is of the same
        sampling. Embeddings that only have equal values are of the same sampling if the scheduler confirms the step.

        Returns:
            The step's index and the number of steps if the call is at the step behind the last call's, in the same
            sampling; else None.
        """
        timesteps: Any = getattr(scheduler, "timesteps", None)
        same = self.form == form and _equal(prompts, self.prompts) and _equal(timesteps, self.timesteps)
        index = _index_of(timestep, timesteps, self.index) if same else -1
        if same and prompts is not self.prompts:
            same = getattr(scheduler, "step_index", None) == index
        if not same or index < self.index:
            self.restart()
            self.index = (getattr(scheduler, "begin_index", None) or 0) - 1  # image-to-image skips the first steps
            index = _index_of(timestep, timesteps, self.index)
            same = False
        self.is_interleaved |= same and 0 <= index == self.index
        follows = same and not self.is_interleaved and 0 <= self.index == index - 1
        self.timesteps, self.index, self.form, self.prompts = timesteps, index, form, prompts
        return (index, len(timesteps)) if follows else None


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def _index_of(timestep: float, timesteps: Any, last: int) -> int:
    """Index of a time step in a sampling whose last call was at `last`; -1 if the sampling does not visit it."""
    if not isinstance(timesteps, Tensor):
        return -1
    found = (timesteps.float().cpu() - timestep).abs().lt(1e-3).nonzero().flatten().tolist()
    # Second-order schedulers visit a time step twice.
    return next((i for i in found if i > last), found[-1]) if found else -1
