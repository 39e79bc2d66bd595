"""Calls of a denoiser that end at a given module. Outputs of what runs before it are cached from call to call, so a
sequence of modules in order of execution costs little more than one whole call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from asdm.data.calibration import CalibrationCall
from asdm.families import Denoiser, family_of
from asdm.measure.hooks import CachedOutput, outputs_of, swapped

CACHE_BYTES = 2**30  # the most that one model's cached outputs take


@dataclass(frozen=True)
class ModuleCall:
    """What a module read and returned in one call of the denoiser: hidden states, and its positional arguments."""

    input: Tensor
    output: Tensor
    args: tuple[Any, ...]


class PartialCalls:
    """The calibration calls of one denoiser, each of which can be run up to a module.

    Modules must be requested in order of execution, and what precedes a requested one must not change any more.
    """

    def __init__(self, model: Denoiser, calls: Sequence[CalibrationCall]):
        self.model: Any = model
        self.calls = calls
        self._family = family_of(model)
        self._order = self._family.execution_order(model)
        self._cached: list[dict[str, CachedOutput]] = [{} for _ in calls]
        self._cached_bytes = 0

    def latent_sides(self, index: int) -> tuple[int, int]:
        """Return height and width of the latents of call number `index`."""
        height, width = self.calls[index].arguments[self._family.sample_argument].shape[-2:]
        return height, width

    def until(self, paths: Sequence[str], index: int) -> dict[str, ModuleCall]:
        """Run call number `index` up to the last of the named modules; return what each of them read and returned."""
        seen: dict[str, ModuleCall] = {}
        cached, last = self._cached[index], paths[-1]

        def record(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                io = self._family.block_io(self.model, path)
                seen[path] = ModuleCall(io.image_input(args, kwargs), io.image_states(output), args)
                if path == last:
                    raise _ReachedError

            return hook

        new = [name for name in self._order if name not in cached and not last.startswith(name)]
        with swapped(self.model, cached), outputs_of(self.model, new) as outputs:
            handles = [
                self.model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True) for path in paths
            ]
            try:
                self._family.predict(self.model, self.calls[index].arguments)
            except _ReachedError:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        self._cache(cached, outputs)
        return seen

    def _cache(self, cached: dict[str, CachedOutput], outputs: dict[str, Any]) -> None:
        for name, output in outputs.items():
            size = _bytes_of(output)
            if self._cached_bytes + size <= CACHE_BYTES:
                cached[name] = CachedOutput(output)
                self._cached_bytes += size


class _ReachedError(Exception):
    """Ends a call once the last requested module has run."""


def _bytes_of(output: Any) -> int:
    tensors = output if isinstance(output, tuple) else (output,)
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
