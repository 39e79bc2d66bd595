"""The hooks that cache features within a block of `cache_features`, and the session that decides for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from asdm.caching.extrapolation import extrapolated
from asdm.caching.state import SamplingState
from asdm.diffusion.parameterization import noise_level
from asdm.errors import AsdmError
from asdm.families import BlockIO, CacheCut, Denoiser, denoiser_of, family_of

HOOK_NAME = "asdm_cache_features"


class CachingSession:
    """Decides at each call of the denoiser whether it is full or cached.

    `full_steps` and `cached_steps` count the calls of each kind since the block was entered. `is_full` says it of step
    `index` of `count`; None if `budget` decides later in the call.
    """

    def __init__(self, pipeline: DiffusionPipeline, order: int, damping: float = 1.0):
        self.pipeline, self.order, self.damping = pipeline, order, damping
        self.family = family_of(denoiser_of(pipeline))
        self.is_full: Callable[[int, int], bool | None] = lambda index, count: True
        self.budget: float | None = None
        self.full_steps, self.cached_steps = 0, 0
        self.hooks: list[CachingHook] = []
        self.state = SamplingState()
        self._counting = threading.Lock()

    def __reduce__(self) -> Any:
        raise AsdmError("a denoiser with cached features is not copied; leave the block of cache_features first")

    @contextmanager
    def forced(self, is_cached: bool) -> Iterator[None]:
        """Make calls full or cached whatever the schedule says; for measurements."""
        self.state.forced = is_cached
        try:
            yield
        finally:
            self.state.forced = None
            self.state.timesteps = None

    @property
    def is_filled(self) -> bool:
        """Whether a full call has filled the cache."""
        return bool(self.state.cache)

    def replace_cached(self, value: Tensor) -> None:
        """Let the next cached call read this value at the cut; for measurements."""
        (border,) = (hook for hook in self.hooks if hook.is_read)
        self.state.cache[border] = [(0.0, value)]

    def close(self) -> None:
        """Drop what is cached in all threads."""
        self.hooks.clear()
        self.state = SamplingState()

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide for a call of the denoiser (a forward pre-hook)."""
        given = self.family.call_arguments(args, kwargs)
        sample, timestep = next(iter(given.values())), given["timestep"]
        timestep = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        state, scheduler = self.state, self.pipeline.scheduler
        state.sigma = noise_level(scheduler, timestep)
        if state.forced is not None:
            state.is_cached = state.forced
            if not state.forced:
                state.clear()
            return
        form = (sample.shape, sample.dtype, sample.device)
        step = state.advance(scheduler, timestep, form, given.get("encoder_hidden_states"))
        if step is None:
            state.clear()
        decision = True if step is None else self.is_full(*step)
        self._decide(decision is not False, is_final=decision is not None)

    def after_first_layer(self, io: BlockIO, output: Any) -> None:
        """Decide by how far the first layer's output has moved since the last full call."""
        assert self.budget is not None
        state, first = self.state, io.image_states(output)
        if state.first_output is not None and state.first_output.shape == first.shape:
            before = state.first_output
            state.change += float((first - before).abs().mean() / before.abs().mean().clamp(min=1e-12))
            self._decide(state.change > self.budget, is_final=True)
        if not state.is_cached:
            state.change = 0.0
        state.first_output = first.detach()

    def _decide(self, is_full: bool, is_final: bool) -> None:
        self.state.is_cached = not is_full
        if is_final:
            with self._counting:
                self.full_steps += is_full
                self.cached_steps += not is_full


class CachingHook(ModelHook):
    """Lets a module answer from the cache in cached calls.

    Args:
        is_read: whether a fresh module reads its output. Otherwise only the shape of the output matters.
        is_relative: whether the cached value is relative to the fresh input of the cut.
    """

    def __init__(self, session: CachingSession, io: BlockIO, is_read: bool = True, is_relative: bool = False):
        super().__init__()
        self.session, self.io, self.is_read, self.is_relative = session, io, is_read, is_relative

    def new_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.session.state
        past = state.cache.get(self)
        if state.is_cached and past:
            return self._extrapolated(past) if self.is_read else self._passed_on(past, args, kwargs)
        output = self.fn_ref.original_forward(*args, **kwargs)
        if self.is_read:
            state.other_outputs[self] = self.io.with_image_states(output, None)
            value = cached_value(self.io, output, state.fresh if self.is_relative else None)
            state.cache[self] = [*(past or ()), (state.sigma, value)][-1 - self.session.order :]
        else:
            # Relative values belong to blocks of one shape: the input passes through, and nothing is kept.
            kept = None if self.is_relative and isinstance(output, Tensor) else output
            state.cache[self] = [(state.sigma, kept)]
        return output

    def _extrapolated(self, past: list[tuple[float, Any]]) -> Any:
        state = self.session.state
        value = extrapolated(past, state.sigma, self.session.damping)
        if self.is_relative:
            assert state.fresh is not None
            value = state.fresh + value
        return self.io.with_image_states(state.other_outputs[self], value)

    def _passed_on(self, past: list[tuple[float, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept = past[-1][1]
        return self.io.image_input(args, kwargs) if kept is None else kept


def cached_value(io: BlockIO, output: Any, fresh: Tensor | None) -> Tensor:
    """Return what is cached of a module's output: a copy of its image states, or their difference from the fresh
    input."""
    states = io.image_states(output)
    # Modules behind it may change it in place, as FreeU does.
    return states.clone() if fresh is None else states - fresh


def on_input(denoiser: Denoiser, path: str, keep: Callable[[Tensor], Any]) -> RemovableHandle:
    """Hand the image states that a module is called with to `keep`."""
    io = family_of(denoiser).block_io(denoiser, path)
    return denoiser.get_submodule(path).register_forward_pre_hook(
        lambda _, args, kwargs: keep(io.image_input(args, kwargs)), with_kwargs=True
    )


@contextmanager
def hooked(denoiser: Denoiser, cut: CacheCut, session: CachingSession) -> Iterator[None]:
    """Put the hooks on the modules of a cut within the block."""
    family = session.family
    modules = {path: denoiser.get_submodule(path) for path in cut.cached}
    handles = [denoiser.register_forward_pre_hook(session.before_call, with_kwargs=True)]
    try:
        for path, module in modules.items():
            io, is_read = family.block_io(denoiser, path), path in cut.read
            session.hooks.append(CachingHook(session, io, is_read, is_relative=cut.relative_to is not None))
            HookRegistry.check_if_exists_or_initialize(module).register_hook(session.hooks[-1], HOOK_NAME)
        if cut.relative_to is not None:
            handles.append(on_input(denoiser, cut.relative_to, lambda states: setattr(session.state, "fresh", states)))
        if session.budget is not None:
            first = family.layers(denoiser)[0]
            io = family.block_io(denoiser, first)
            handles.append(
                denoiser.get_submodule(first).register_forward_hook(
                    lambda _module, _args, output: session.after_first_layer(io, output)
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            _remove_hook(module)
        session.close()


def _remove_hook(module: nn.Module) -> None:
    """Take the hook off and leave nothing behind, unless there are others."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(HOOK_NAME, recurse=False)
    if not registry.hooks:
        del module._diffusers_hook
        if vars(module).get("forward") == type(module).forward.__get__(module):
            del module.forward


def is_caching(denoiser: nn.Module) -> bool:
    """Return whether a block of `cache_features` is open for a denoiser."""
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    return any(registry.get_hook(HOOK_NAME) is not None for registry in registries if registry is not None)


def require_uncached(denoiser: nn.Module, work: str) -> None:
    """Raise an AsdmError within a block of `cache_features`, where not all modules compute in each call."""
    if is_caching(denoiser):
        raise AsdmError(f"{work}: the denoiser's features are cached; leave the block of cache_features first")


def cut_of(pipeline: DiffusionPipeline, depth: int, fresh: tuple[str, ...] = ()) -> CacheCut:
    """Return where a pipeline's denoiser is cut. Exported graphs and the like say it themselves."""
    denoiser = denoiser_of(pipeline)
    own = getattr(denoiser, "cache_cut", None)
    return family_of(denoiser).cache_cut(denoiser, depth, fresh) if own is None else own(depth)
