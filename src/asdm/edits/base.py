"""The base of all edit kinds: the record, the registry, and how edits are parsed and applied.

Each kind is one file beside this one. Its record has the methods by which every package asks what an edit does.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from asdm.choices import CompensationKind
from asdm.errors import AsdmError, shown
from asdm.measure.hooks import set_module, swapped
from asdm.old_names import OLD_EDIT_KINDS


class EditedFamily(Protocol):
    """What edits ask of the family of the model that they change (`asdm.families.base.Architecture`)."""

    def units(self, model: Any) -> Sequence[Any]: ...

    def layers(self, model: Any) -> list[str]: ...

    def removals(self, model: Any) -> list[str]: ...

    def is_covered_by(self, name: str, removed: Collection[str]) -> bool: ...

    def removed(
        self, model: Any, unit: str, compensate: CompensationKind, compensate_time: bool
    ) -> dict[str, nn.Module]: ...

    def projection_channels(self, model: Any, unit: str) -> int: ...

    def conv_channels(self, model: Any) -> dict[str, tuple[int, int]]: ...

    def prompt_channels(self, model: Any, name: str) -> int: ...

    def shorter_config(self, model: Any, edit: Any) -> dict[str, Any]: ...

    def dropped_layers(self, edit: Any, units: Sequence[str]) -> list[str]: ...

    def no_such_unit(self, model: Any, name: str) -> AsdmError: ...


@dataclass(frozen=True)
class Edit:
    """One change of an architecture, as plans and configs hold it.

    A kind must implement `replacements`. The other methods have defaults for an edit that changes one unit.

    `order`: edits of a higher order are applied later. `is_exclusive`: whether the edit must be its plan's only one;
    it then builds a whole model from `stock_config`. `is_removal`: whether nothing is computed in its place.
    `has_first_order_estimate`: whether `estimated_output` is implemented. `no_split_modules`: classes of modules that
    must stay on one device.
    """

    edit: ClassVar[str]
    order: ClassVar[int] = 0
    is_exclusive: ClassVar[bool] = False
    is_removal: ClassVar[bool] = False
    has_first_order_estimate: ClassVar[bool] = False
    no_split_modules: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _type_hints(kind)
        for name, value in list(vars(self).items()):
            try:
                object.__setattr__(self, name, _field_value(value, hints[name]))
            except ValueError:
                raise AsdmError(f"{name}: {shown(value)} is not allowed; it is {_said(hints[name])}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the edit as it stands in plans and configs."""
        return {"edit": self.edit, **asdict(self)}

    def __str__(self) -> str:
        rest = self.to_dict()
        name = " ".join(str(rest.pop(key)) for key in ("edit", "unit") if key in rest)
        return f"{name} ({', '.join(f'{key}: {value}' for key, value in rest.items())})" if rest else name

    # -- what it does ----------------------------------------------------------------------------------

    def replacements(self, model: Any, family: EditedFamily) -> dict[str, nn.Module]:
        """Return the new modules by the module paths that they go to; change nothing.

        Raises:
            AsdmError: the model does not allow the edit.
        """
        raise NotImplementedError

    def stock_config(self, model: Any, family: EditedFamily) -> dict[str, Any]:
        """Return the config of the stock model that an exclusive edit makes."""
        raise NotImplementedError

    # -- which units it is about -----------------------------------------------------------------------

    def covers(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        """Return those of these units that the edit removes or changes, so that no other edit of a plan can."""
        return self.removed_units(units, family)

    def removed_units(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        """Return the names of what the edit removes, given all units of the model."""
        return []

    def gives_way_to(self, units: Collection[str], family: EditedFamily) -> bool:
        """Return whether the edit, made earlier, is void once new edits change these units."""
        return False

    # -- how it is analysed and planned ----------------------------------------------------------------

    @classmethod
    def candidates(cls, model: Any, family: EditedFamily, positions: Mapping[str, int]) -> Sequence[UnitEdit]:
        """Return edits of this kind that `analyze` should try beside the removal of each unit.

        Args:
            positions: tokens or pixels of each layer's output, per sample.
        """
        return ()

    @property
    def trial_name(self) -> str:
        """The name of the edit among all that are tried."""
        return str(self)

    @property
    def measured_with(self) -> Hashable:
        """Edits with equal values are measured together, each by its own `changed_paths`; None: measured alone."""
        return None

    def changed_paths(self, model: Any, family: EditedFamily) -> list[str]:
        """Return the modules whose cost the edit changes."""
        return list(self.replacements(model, family))

    def estimated_output(self, module: Any, args: tuple[Any, ...], layer_input: Tensor) -> Tensor:
        """Return what the unit's `module` would give with this edit; it is not in place.

        Args:
            args: the positional inputs of the unit's module.
            layer_input: the first input of the layer that the unit belongs to.
        """
        raise NotImplementedError

    @classmethod
    def adapted(cls, path: str, module: nn.Module, student: Any) -> nn.Module:
        """Return an original module in the form that a student with edits of this kind can call at `path`."""
        return module

    # -- compensation ----------------------------------------------------------------------------------

    @property
    def compensation(self) -> CompensationKind:
        """The kind of projection that is fitted in place of what the edit removes."""
        return "none"

    @property
    def compensates_time(self) -> bool:
        """Whether the projection reads the time embedding, too."""
        return False

    def with_compensation(self, kind: CompensationKind) -> Edit:
        """Return the edit with this kind of projection, or the edit itself where it can have none."""
        return self

    def projection_channels(self, model: Any, family: EditedFamily) -> int:
        """Return the channels of the projection that can be fitted in its place; 0 where none can."""
        return 0


@dataclass(frozen=True)
class UnitEdit(Edit):
    """An edit of one unit of the model, or of one module inside a unit; `unit` is its module path."""

    unit: str

    def covers(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        return [name for name in units if family.is_covered_by(name, [self.unit])]

    def gives_way_to(self, units: Collection[str], family: EditedFamily) -> bool:
        return family.is_covered_by(self.unit, units)

    def changed_layer(self, layers: Sequence[str]) -> str:
        """Return the first of these layers, in order of execution, that the edit changes."""
        unit = f"{self.unit}."
        return next(name for name in layers if unit.startswith(f"{name}.") or name.startswith(unit))


# -- the registry --------------------------------------------------------------------------------------

Kind = TypeVar("Kind", bound=type[Edit])
EDIT_KINDS: dict[str, type[Edit]] = {}


def register_edit(kind: Kind) -> Kind:
    """Make an edit kind known by its name (a class decorator)."""
    EDIT_KINDS[kind.edit] = kind
    return kind


def parse_edits(edits: Iterable[Any]) -> list[Edit]:
    """Return edits from records or plain dicts.

    Raises:
        AsdmError: an edit of an unknown kind, or with a missing, unknown or impossible field.
    """
    if isinstance(edits, str | bytes | dict) or not isinstance(edits, Iterable):
        raise AsdmError(f"edits={shown(edits)}: must be a list of edits")
    return [edit if isinstance(edit, Edit) else _parse(edit) for edit in edits]


def _parse(content: Any) -> Edit:
    try:
        if not isinstance(content, dict) or "edit" not in content:
            raise AsdmError("an edit is an object with a field `edit`")
        name = str(content["edit"])
        kind = EDIT_KINDS.get(OLD_EDIT_KINDS.get(name, name))
        if kind is None:
            raise AsdmError(f"there is no kind {shown(content['edit'])}")
        values = {name: value for name, value in content.items() if name != "edit"}
        for field in fields(kind):
            if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
                raise AsdmError(f"field {field.name} is missing")
        for name in values:
            if name not in {field.name for field in fields(kind)}:
                raise AsdmError(f"there is no field {name}; fields are {', '.join(f.name for f in fields(kind))}")
        return kind(**values)
    except AsdmError as error:
        raise AsdmError(
            f"not an edit: {shown(content)}: {error}; allowed kinds: {', '.join(sorted(EDIT_KINDS, reverse=True))}, "
            'for example {"edit": "remove", "unit": "mid_block"}'
        ) from None


@cache
def _type_hints(kind: type[Edit]) -> dict[str, Any]:
    return get_type_hints(kind)


def _field_value(value: Any, hint: Any) -> Any:
    """Return a value, as JSON may hold it, as a field of this type has it: a list is a tuple, an integer a float.

    Types that JSON does not hold are compared as they are, and generic ones beside list, tuple and dict not at all.

    Raises:
        ValueError: the field cannot have this value.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in parts:
            with suppress(ValueError):
                return _field_value(value, part)
    elif origin is Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_field_value(item, *parts) for item in value]
    elif origin is tuple:
        if isinstance(value, list | tuple):
            each = parts[:1] * len(value) if Ellipsis in parts else parts
            if len(value) == len(each):
                return tuple(map(_field_value, value, each))
    elif origin is dict:
        if isinstance(value, dict):
            return {_field_value(key, parts[0]): _field_value(item, parts[1]) for key, item in value.items()}
    elif hint is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif hint is Any or not isinstance(hint, type) or type(value) is hint:
        return value
    raise ValueError(value)


def _said(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if hint is float:
        return "a finite number"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def require_at_least(name: str, value: int, least: int) -> None:
    """Raise an AsdmError where a field of an edit is below its least value."""
    if value < least:
        raise AsdmError(f"{name} is {value}, and at least {least} is allowed")


# -- edits and models ----------------------------------------------------------------------------------


def apply_edits(model: nn.Module, edits: Sequence[UnitEdit], family: EditedFamily) -> None:
    """Change `model` in place.

    Raises:
        AsdmError: an edit names a unit that is not there, one named before, or one inside another.
    """
    names = [edit.unit for edit in edits]
    for name in names:
        if names.count(name) > 1:
            raise AsdmError(f"{name}: named twice by the plan; name it once")
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise AsdmError(f"{name}: lies inside {outer}, which the plan removes as a whole; drop one of them")
    for edit in sorted(edits, key=lambda edit: edit.order):
        for path, module in edit.replacements(model, family).items():
            set_module(model, path, module)


@contextmanager
def edited(model: nn.Module, edit: Edit, family: EditedFamily) -> Iterator[None]:
    """Apply one edit for the length of the block, then put the original modules back."""
    with swapped(model, edit.replacements(model, family)):
        yield


@contextmanager
def restored(student: nn.Module, teacher: nn.Module, edit: Edit, family: EditedFamily) -> Iterator[None]:
    """Put the teacher's modules in place of what an edit changed, for the length of the block."""
    modules = {path: teacher.get_submodule(path) for path in edit.changed_paths(teacher, family)}
    for kind in EDIT_KINDS.values():
        modules = {path: kind.adapted(path, module, student) for path, module in modules.items()}
    with swapped(student, modules):
        yield


def candidate_edits(model: Any, family: EditedFamily, positions: Mapping[str, int]) -> list[UnitEdit]:
    """Return the edits that `analyze` tries beside the removal of each unit, of all kinds that offer some."""
    return [edit for kind in EDIT_KINDS.values() for edit in kind.candidates(model, family, positions)]


def removed_units(edits: Iterable[Edit], units: Sequence[str], family: EditedFamily) -> list[str]:
    """Return the names of what these edits remove, given all units of the model."""
    return [name for edit in edits for name in edit.removed_units(units, family)]


def compensated(edits: Iterable[Edit]) -> list[Any]:
    """Return the edits in whose place a projection is fitted."""
    return [edit for edit in edits if edit.compensation != "none"]
