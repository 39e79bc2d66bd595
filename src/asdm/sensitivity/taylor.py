"""Sensitivity of all removable units at once: a first-order estimate from forward and backward passes.

To first order, the prediction moves by J b when a unit's branch output b goes, J being the derivative of the
prediction by the unit's hidden states. For random v with independent entries of variance 1 the expectation
of <v, J b>^2 is |J b|^2, and <v, J b> is <J^T v, b>: one backward pass from v gives it for every unit and
every sample (inferred: the Taylor criterion of arXiv 1906.10771, with random projections of the prediction in
the place of a loss, whose gradient vanishes at the teacher). The unit is the ablation's:
|prediction without it - prediction|^2 / |prediction|^2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm.data.calibration import CalibrationCall
from asdm.edits import GriAttention
from asdm.edits.regional_attention import GriAttnProcessor
from asdm.families.unet_structure import Unit, shortcut_of
from asdm.measure.hooks import outputs_of

Progress = Callable[[int, int, str], None]
Recorded = Callable[[CalibrationCall, dict[str, Any], Tensor], None]


def taylor_sensitivity(
    unet: UNet2DConditionModel,
    units: Sequence[Unit],
    calls: Sequence[CalibrationCall],
    *,
    probes: int,
    regional: Sequence[GriAttention] = (),
    seed: int = 0,
    progress: Progress | None = None,
    recording: Sequence[str] = (),
    recorded: Recorded | None = None,
) -> dict[str, dict[int, float]]:
    """First-order estimate of each unit's relative squared error, by time step.

    Args:
        regional: global-regional attentions to estimate too, by what they change of the branch's output.
        probes: random projections for each call, which costs one forward pass and a backward pass for each.
        progress: called with calls done, calls in all, and what is done.
        recorded: called with each call, what the modules named in `recording` put out in it, and the prediction, for
            whom else they can serve.
    """
    errors: dict[str, dict[int, float]] = {name: {} for name in [*(u.name for u in units), *map(str, regional)]}
    generator = torch.Generator().manual_seed(seed)
    needed_gradients = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    unet.requires_grad_(False)
    try:
        for index, call in enumerate(calls):
            with outputs_of(unet, recording) as outputs:
                products, prediction = _projected(unet, units, regional, call, probes, generator)
            power = prediction.float().square().sum()
            for name, by_timestep in errors.items():
                moved = sum(product.square().sum() for product in products[name])
                by_timestep[call.timestep] = float(moved / power) / probes
            if recorded is not None:
                recorded(call, outputs, prediction)
            if progress is not None:
                progress(index + 1, len(calls), f"time step {call.timestep}")
    finally:
        for parameter in needed_gradients:
            parameter.requires_grad_(True)
    return errors


@torch.enable_grad()
def _projected(
    unet: UNet2DConditionModel,
    units: Sequence[Unit],
    regional: Sequence[GriAttention],
    call: CalibrationCall,
    probes: int,
    generator: torch.Generator,
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """<v, J b> (batch,) of each unit for each of some random v; and the prediction."""
    products: dict[str, list[Tensor]] = defaultdict(list)
    arguments = {**call.arguments, "sample": call.arguments["sample"].detach().requires_grad_(True)}
    with _meeting_gradients(unet, units, regional, products):
        prediction = unet(**arguments, return_dict=False)[0]
        for probe in range(probes):
            directions = torch.randn(prediction.shape, generator=generator).to(prediction)
            prediction.backward(directions, retain_graph=probe < probes - 1)
    return products, prediction.detach()


@contextmanager
def _meeting_gradients(
    unet: UNet2DConditionModel,
    units: Sequence[Unit],
    regional: Sequence[GriAttention],
    products: dict[str, list[Tensor]],
) -> Iterator[None]:
    """Note <gradient, what goes of the output> (batch,) of every edit in each backward pass."""
    handles = []
    processors = {edit.unit: GriAttnProcessor(edit.regions, edit.pool, edit.weighted) for edit in regional}
    names = {edit.unit: str(edit) for edit in regional}
    sides: dict[str, tuple[int, int]] = {}  # of the map of tokens, by transformer

    def note(unit: Unit) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            behind: Tensor = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                goes = {unit.name: behind.detach() - shortcut_of(unit, module, args)}
                if unit.name in processors:
                    instead = processors[unit.name](module, args[0].detach(), map_sides=sides[unit.layer])
                    goes[names[unit.name]] = behind.detach() - instead

            def meet(gradient: Tensor) -> None:
                for name, part in goes.items():
                    products[name].append((gradient.float() * part.float()).flatten(1).sum(1))

            behind.register_hook(meet)

        return hook

    def note_sides(layer: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            height, width = args[0].shape[2:]
            sides[layer] = height, width

        return hook

    for unit in units:
        handles.append(unet.get_submodule(unit.name).register_forward_hook(note(unit)))
        if unit.name in processors:
            handles.append(unet.get_submodule(unit.layer).register_forward_pre_hook(note_sides(unit.layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
