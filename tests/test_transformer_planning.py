"""Transformers are analysed, planned, compensated and refined as UNets are: no package but families knows them."""

import pytest
import torch

from asdm import PruningPlan, build_student, make_plan
from asdm.compensation.fitting import fit_to_calls, prediction_error, predictions
from asdm.compensation.projections import unit_projections
from asdm.data.calibration import CalibrationCall
from asdm.edits import Remove
from asdm.families import family_of
from asdm.planning.possible_edits import possible_edits
from asdm.planning.refine import _Refinement
from asdm.sensitivity.ablation import ablate, trials_of
from asdm.sensitivity.analysis import structure_map
from asdm.sensitivity.taylor import taylor_sensitivity
from conftest import tiny_transformer

BLOCK, GATED, UNGATED = "transformer_blocks.1", "transformer_blocks.2.ff", "transformer_blocks.3.attn2"


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.fixture(scope="module")
def calls(model):
    return [CalibrationCall(500, family_of(model).random_inputs(model, 6, seed)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def redundancy(model):
    return structure_map(model)


def without(model, unit, **fields):
    plan = PruningPlan.for_unet(model, [{"edit": "remove", "unit": unit, **fields}])
    return build_student(model, plan)


@torch.no_grad()
def test_a_unit_alone_has_the_error_of_a_student_without_it(model, calls):
    units, references = family_of(model).units(model), predictions(model, calls)
    errors, _ = ablate(model, trials_of(model, [Remove(unit=unit.name) for unit in units]), calls, None)
    assert list(errors) == [unit.name for unit in units]
    for unit in (BLOCK, GATED, UNGATED):
        expected = prediction_error(without(model, unit), calls[1:], references[1:])  # the last one at this time step
        assert errors[unit][500] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["bias", "diagonal", "linear"])
@pytest.mark.parametrize("unit", [BLOCK, GATED, UNGATED])
@torch.no_grad()
def test_a_fitted_projection_is_the_one_that_the_ablation_tried(model, calls, unit, kind):
    edit = Remove(unit=unit, compensate=kind)
    units = [each for each in family_of(model).units(model) if each.name == unit]
    projections = unit_projections(model, units, calls, kind)
    tried, _ = ablate(model, trials_of(model, [edit], projections), calls[1:], None)
    student, references = without(model, unit, compensate=kind), predictions(model, calls[1:])
    plain = prediction_error(student, calls[1:], references)
    fit_to_calls(model, student, calls)
    error = prediction_error(student, calls[1:], references)
    assert tried[unit][500] == pytest.approx(error, rel=1e-3)
    assert error < plain


def test_all_units_have_a_first_order_estimate(model, calls):
    units = family_of(model).units(model)
    errors = taylor_sensitivity(model, units, calls, probes=2)
    assert all(errors[unit.name][500] > 0 for unit in units)


def test_a_profile_counts_what_a_student_lacks(model, redundancy):
    total = sum(p.numel() for p in model.parameters())
    assert redundancy.denoiser_class == "PixArtTransformer2DModel" and not redundancy.others
    for unit in redundancy.units:
        if unit.name in (BLOCK, GATED, UNGATED):
            left = sum(p.numel() for p in without(model, unit.name, compensate="none").parameters())
            # A block has a table of scales and gates, which goes with it; branches leave it.
            assert unit.parameters == total - left
            assert unit.gmacs > 0 and unit.positions == 16


@torch.no_grad()
def test_a_plan_of_blocks_alone_is_refined(model, calls, redundancy):
    plan = make_plan(redundancy, params=0.8, compensate="none")
    PruningPlan.for_unet(model, plan.edits)
    blocks = plan.model_copy(update={"edits": [Remove(unit=BLOCK), Remove(unit="transformer_blocks.3")]})
    refinement = _Refinement(model, redundancy, possible_edits(redundancy, "none"), calls, calls, blocks)
    before = refinement.best.error
    student = build_student(model, blocks)  # a stock model with fewer blocks
    assert before == pytest.approx(prediction_error(student, calls, predictions(model, calls)), rel=1e-4)
    refinement.run_round(None)
    assert refinement.best.error <= before
    assert refinement.result().metrics.measured_sensitivity == refinement.best.error
