"""A denoiser and a list of edits: the student's modules, and the weights that it inherits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from asdm.edits import Edit, UnitEdit, removed_units
from asdm.errors import AsdmError
from asdm.families import Denoiser, family_of
from asdm.student.classes import student_class_of
from asdm.student.edited_model import edits_of


def model_without_weights(model: Any, edits: Sequence[Edit], *, may_be_stock: bool = True) -> Any:
    """Return the modules of the student that these edits make of a model, without weights (on the meta device).

    Args:
        may_be_stock: whether the student is of the stock class, with other names of modules, where that is possible.

    Raises:
        AsdmError: an edit that the model does not allow.
    """
    family = family_of(model)
    stock: dict[str, Any] | None
    exclusive = next((edit for edit in edits if edit.is_exclusive), None)
    if exclusive is not None:
        if len(edits) > 1:
            raise AsdmError(
                f"{exclusive.edit}: goes with no other edit, as it gives layers new numbers; make two plans"
            )
        stock = exclusive.stock_config(model, family)
    else:
        stock = family.stock_config(model, edits) if may_be_stock else None
    if stock is not None:
        with init_empty_weights():
            return family.model_class.from_config(stock)
    config = {key: value for key, value in model.config.items() if key != "edits"}
    new = [edit.unit for edit in edits if isinstance(edit, UnitEdit)]
    removed = removed_units(edits, [], family)
    for name in new:
        outer = next((other for other in removed if other != name and family.is_covered_by(name, [other])), None)
        if outer is not None and not name.startswith(f"{outer}."):
            raise AsdmError(f"{name}: goes with {outer}, which the plan removes; drop one of them")
    earlier = [edit for edit in edits_of(model) if not edit.gives_way_to(new, family)]
    config["edits"] = [edit.to_dict() for edit in [*earlier, *edits]]
    with init_empty_weights():
        return student_class_of(family).from_config(config)


def inherit_weights(student: Denoiser, teacher: Denoiser) -> None:
    """Copy every tensor of the student from the teacher. A student's own modules give their starting tensors.

    Raises:
        AsdmError: an expert kernel is not in the teacher.
    """
    family = family_of(teacher)
    source = teacher.state_dict()
    like = next(iter(source.values()))
    own: dict[str, Tensor] = {}
    for path, module in student.named_modules():
        if hasattr(module, "starting_tensors"):
            started = module.starting_tensors(path, teacher, family)
            own |= {f"{path}.{name}": tensor.to(like.device, like.dtype) for name, tensor in started.items()}
    inherited = {}
    for name in student.state_dict():
        original = family.teacher_key(name, student, teacher)
        inherited[name] = source[original].detach().clone() if original in source else own[name]
    student.load_state_dict(inherited, strict=True, assign=True)
