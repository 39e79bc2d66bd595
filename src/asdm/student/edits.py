"""The edits that a plan is made of, as small typed records. What each does is in `surgery.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from asdm.errors import AsdmError


class _Edit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Remove(_Edit):
    """Drop a unit's residual branch and keep its shortcut.

    `unit` names a resnet, an attention, an `attn1`, `attn2` or `ff` inside one, the whole `mid_block`, or
    the innermost stage by its down block ("down_blocks.3": with its up block and the resampling
    between them and the next stage).
    """

    edit: Literal["remove"] = "remove"
    unit: str


Edit = Annotated[Remove, Field(discriminator="edit")]
EDIT_KINDS = ("remove",)
_EDITS: TypeAdapter[list[Any]] = TypeAdapter(list[Remove])


def parse_edits(edits: Iterable[Any]) -> list[Remove]:
    """Edits from records or plain dicts.

    Raises:
        AsdmError: an edit of an unknown kind, or with a missing or unknown field.
    """
    plain = [edit.model_dump() if isinstance(edit, BaseModel) else edit for edit in edits]
    try:
        return _EDITS.validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        wrong = plain[place[0]] if place and isinstance(place[0], int) else plain
        field = ".".join(str(part) for part in place[1:])
        raise AsdmError(
            f"not an edit: {wrong!r}: {field or 'edit'}: {first['msg'].lower()}; "
            f'allowed kinds: {", ".join(EDIT_KINDS)}, for example {{"edit": "remove", "unit": "mid_block"}}'
        ) from None
