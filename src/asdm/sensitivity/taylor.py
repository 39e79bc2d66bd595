"""Sensitivity of all removable units at once: a first-order estimate from forward and backward passes.

To first order, the prediction moves by J b when a unit's branch output b goes, J being the derivative of the
prediction by the unit's hidden states. For random v with independent entries of variance 1 the expectation
of <v, J b>^2 is |J b|^2, and <v, J b> is <J^T v, b>: one backward pass from v gives it for every unit and
every sample (inferred: the Taylor criterion of arXiv 1906.10771, with random projections of the prediction in
place of a loss, whose gradient vanishes at the teacher). The result is in the ablation's terms:
|prediction without it - prediction|^2 / |prediction|^2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asdm.data.calibration import CalibrationCall, squared_norm
from asdm.edits import UnitEdit
from asdm.errors import AsdmError
from asdm.families import Branch, Denoiser, Unit, family_of
from asdm.measure.hooks import outputs_of

Progress = Callable[[int, int, str], None]
OnCall = Callable[[CalibrationCall, dict[str, Any], Tensor], None]
Products = dict[str, list[Tensor]]


def taylor_sensitivity(
    model: Denoiser,
    units: Sequence[Unit],
    calls: Sequence[CalibrationCall],
    *,
    probes: int,
    edits: Sequence[UnitEdit] = (),
    seed: int = 0,
    progress: Progress | None = None,
    recorded: Sequence[str] = (),
    on_call: OnCall | None = None,
) -> dict[str, dict[int, float]]:
    """Estimate each unit's relative squared error to first order, by time step.

    Args:
        edits: other edits to estimate too (`has_first_order_estimate`), by what they change of their unit's output.
        probes: random projections for each call: one forward pass, and a backward pass for each.
        progress: called with calls done, calls in all, and what is done.
        on_call: called with each call, the outputs of the modules named in `recorded`, and the prediction.

    Raises:
        AsdmError: a prediction is zero or not finite, or a gradient is not finite.
    """
    errors: dict[str, dict[int, float]] = {unit.name: {} for unit in units}
    errors |= {edit.trial_name: {} for edit in edits}
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        for index, call in enumerate(calls):
            with outputs_of(model, recorded) as outputs:
                products, prediction = _projected(model, units, edits, call, probes, generator)
            square = squared_norm(prediction, call)
            for name, by_timestep in errors.items():
                moved = sum(product.square().sum() for product in products[name])
                error = float(moved / square) / probes
                if not math.isfinite(error):
                    raise AsdmError(
                        f"{name}: its gradient at time step {call.timestep} is not finite; use float32, or "
                        "sensitivity by ablation"
                    )
                by_timestep[call.timestep] = error
            if on_call is not None:
                on_call(call, outputs, prediction)
            if progress is not None:
                progress(index + 1, len(calls), f"time step {call.timestep}")
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return errors


@torch.enable_grad()
def _projected(
    model: Denoiser,
    units: Sequence[Unit],
    edits: Sequence[UnitEdit],
    call: CalibrationCall,
    probes: int,
    generator: torch.Generator,
) -> tuple[Products, Tensor]:
    """<v, J b> (batch,) of each unit and edit for each of some random v; and the prediction."""
    products: Products = defaultdict(list)
    family = family_of(model)
    sample = call.arguments[family.sample_argument].detach().requires_grad_(True)
    with _recording_products(model, units, edits, products):
        prediction = family.predict(model, {**call.arguments, family.sample_argument: sample})
        for probe in range(probes):
            directions = torch.randn(prediction.shape, generator=generator).to(prediction)
            prediction.backward(directions, retain_graph=probe < probes - 1)
    return products, prediction.detach()


@contextmanager
def _recording_products(
    model: Denoiser, units: Sequence[Unit], edits: Sequence[UnitEdit], products: Products
) -> Iterator[None]:
    """Record <gradient, what goes of the output> (batch,) of every unit and edit in each backward pass."""
    family = family_of(model)
    edits_of: dict[str, list[UnitEdit]] = defaultdict(list)
    for edit in edits:
        edits_of[edit.unit].append(edit)
    layer_inputs: dict[str, Tensor] = {}

    def observe(unit: Unit, branch: Branch) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            io = family.block_io(model, unit.name)
            states, behind = io.image_input(args, kwargs).detach(), io.image_states(output)
            with torch.no_grad():
                kept = 0.0 if branch.kept is None else branch.kept(states)
                removed = {unit.name: behind.detach() - kept}
                for edit in edits_of[unit.name]:
                    instead = edit.estimated_output(module, (states, *args[1:]), layer_inputs[unit.layer])
                    removed[edit.trial_name] = behind.detach() - instead
            behind.register_hook(_product_recorder(removed, products))

        return hook

    def record_input(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer_inputs[layer] = family.block_io(model, layer).image_input(args, kwargs).detach()

        return hook

    with ExitStack() as hooks:
        for unit in units:
            module, branch = model.get_submodule(unit.name), family.branch(model, unit.name)
            hooks.enter_context(module.register_forward_hook(observe(unit, branch), with_kwargs=True))
            if unit.name in edits_of:
                layer = model.get_submodule(unit.layer)
                hooks.enter_context(layer.register_forward_pre_hook(record_input(unit.layer), with_kwargs=True))
        yield


def _product_recorder(removed: Mapping[str, Tensor], products: Products) -> Callable[[Tensor], None]:
    def record(gradient: Tensor) -> None:
        for name, part in removed.items():
            products[name].append((gradient.float() * part.float()).flatten(1).sum(1))

    return record
