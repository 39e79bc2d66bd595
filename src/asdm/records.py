"""What all records have in common that are saved as JSON or written by hand: plans, maps, stages, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from asdm.errors import AsdmError, one_line, shown
from asdm.reading import read_json

R = TypeVar("R", bound="Record")


class FieldError(ValueError):
    """What a check of a whole record finds wrong with one field of it: the field, and what is said behind its name."""

    def __init__(self, place: str, fault: str) -> None:
        self.place, self.fault = place, fault
        super().__init__(place + fault)


class RecordError(AsdmError):
    """The first thing that is wrong with a record. `place` is the field, empty where it is no single field's."""

    def __init__(self, error: ValidationError) -> None:
        self.place, self.fault = _first_fault(error)
        super().__init__(self.place + self.fault)


class Record(BaseModel):
    """Immutable fields; none that is unknown, no number that is not finite, no truth value for a number.

    Raises:
        RecordError: a field that is missing, unknown or out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RecordError(error) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _mentions(cls.model_fields[str(info.field_name)].annotation, (bool, Any)):
            raise ValueError("must not be true or false")
        return value


def read_record(kind: type[R], path: str | Path, what: str, remedy: str) -> R:
    """Read a record that was saved as JSON.

    Args:
        what: what the file should be, for the message.
        remedy: what makes one.

    Raises:
        AsdmError: it cannot be read, is no JSON, or no such record.
    """
    try:
        return kind.model_validate(read_json(Path(path)))
    except ValidationError as error:
        fault = first_fault(error)
    except AsdmError as error:
        fault = str(error)
    except (OSError, ValueError) as error:
        fault = one_line(error)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # of what reads earlier versions' fields
        fault = f"{type(error).__name__}: {one_line(error)}"
    raise AsdmError(f"{path}: not {what}: {fault}; {remedy}")


def first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with a record: the field, its value, and what is allowed."""
    return "".join(_first_fault(error))


def _first_fault(error: ValidationError) -> tuple[str, str]:
    """Return the field, and what is said behind its name."""
    first = error.errors(include_url=False)[0]
    place, value, cause = ".".join(str(part) for part in first["loc"]), first.get("input"), _cause(first)
    if isinstance(cause, RecordError | FieldError) and cause.place:  # also of a record inside this one
        return ".".join(filter(None, (place, cause.place))), cause.fault
    message = first["msg"][:1].lower() + first["msg"][1:] if cause is None else str(cause)
    if not place:
        return "", message
    if first["type"] == "missing" or isinstance(value, dict | list | tuple | BaseModel):
        return place, f": {message}"
    return place, f"={shown(value)}: {message}"


def _cause(fault: ErrorDetails) -> Exception | None:
    """Return the error that a check of ours raised; None for what pydantic found itself."""
    cause = fault.get("ctx", {}).get("error")
    return cause if isinstance(cause, Exception) else None


def _mentions(annotation: Any, kinds: tuple[Any, ...]) -> bool:
    """Return whether a type is, or is made of, one of these."""
    return annotation in kinds or any(_mentions(part, kinds) for part in get_args(annotation))
