"""Exact sensitivities: make an edit, call the denoiser, compare the predictions.

Changes no model: edits are made for the length of one call. Layers before the first one that an edit changes answer
from a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from asdm.compensation.projections import ProjectionTensors, compensating
from asdm.data.calibration import CalibrationCall, relative_error
from asdm.edits import UnitEdit, edited
from asdm.families import Denoiser, family_of
from asdm.measure.hooks import CachedOutput, outputs_of, swapped
from asdm.measure.latency import seconds_of

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trial:
    """A change of a model that is tried: its name, the first layer that it changes, and a context that makes it."""

    name: str
    layer: str
    applied: Callable[[], AbstractContextManager[None]]


def trials_of(
    model: Denoiser, edits: Sequence[UnitEdit], projections: Mapping[str, ProjectionTensors] | None = None
) -> list[Trial]:
    """Return the trials of edits. A removal is tried with the projection that `projections` has for its unit, or
    without one."""
    family = family_of(model)
    layers = family.layers(model)
    trials = []
    for edit in edits:
        projection = (projections or {}).get(edit.unit) if edit.compensation != "none" else None
        if projection is None:
            applied = partial(edited, model, edit.with_compensation("none"), family)
        else:
            applied = partial(compensating, model, edit, projection)
        trials.append(Trial(edit.trial_name, edit.changed_layer(layers), applied))
    return trials


def ablate(
    model: Denoiser,
    trials: Sequence[Trial],
    calls: Sequence[CalibrationCall],
    progress: Progress | None,
    references: Sequence[Tensor] | None = None,
) -> tuple[dict[str, dict[int, float]], float]:
    """Return the relative squared error of the prediction in each trial, by time step, and what that took in
    denoiser calls.

    Args:
        references: what the error is against, one prediction for each call; by default the model's own.
    """
    errors: dict[str, dict[int, float]] = {trial.name: {} for trial in trials}
    done, spent, whole = 0, 0.0, 0.0
    order = family_of(model).execution_order(model)

    def count(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(trials) * len(calls), name)

    for index, call in enumerate(calls):
        outputs, reference, seconds = record_call(model, order, call)
        whole += seconds
        if references is not None:
            reference = references[index]
        start = time.perf_counter()
        for name, error in trial_errors(model, trials, call, outputs, reference, count).items():
            errors[name][call.timestep] = error
        spent += time.perf_counter() - start
    return errors, (spent + whole) / (whole / len(calls))


def trial_errors(
    model: Denoiser,
    trials: Sequence[Trial],
    call: CalibrationCall,
    outputs: dict[str, Any],
    reference: Tensor,
    on_trial: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Return each trial's relative squared error in one call.

    Args:
        outputs: the outputs of the modules of the family's order of execution in this call. They are consumed.
        reference: the prediction that the error is against.
        on_trial: called with each trial's name.

    Raises:
        AsdmError: `reference` is zero or not finite.
    """
    errors: dict[str, float] = {}
    family = family_of(model)
    with ExitStack() as cached:
        for name in family.execution_order(model):
            for trial in [trial for trial in trials if trial.layer == name]:
                with trial.applied():
                    prediction = family.predict(model, call.arguments)
                errors[trial.name] = relative_error(prediction, reference, call)
                on_trial(trial.name)
            if name in outputs:  # a placeholder may never be called
                cached.enter_context(swapped(model, {name: CachedOutput(outputs.pop(name))}))
    return errors


def record_call(model: Denoiser, names: Sequence[str], call: CalibrationCall) -> tuple[dict[str, Any], Tensor, float]:
    """Return the named modules' outputs in one call, the prediction, and the seconds that the call took."""
    with outputs_of(model, names) as outputs:
        predictions: list[Tensor] = []
        predict = family_of(model).predict
        seconds = seconds_of(lambda: predictions.append(predict(model, call.arguments)), model.device)
        return outputs, predictions[0], seconds
