"""The edits that a plan is made of, as small typed records. What each does is in `surgery.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from asdm.errors import AsdmError

CompensationKind = Literal["none", "bias", "diagonal", "linear"]


class _Edit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __str__(self) -> str:
        fields = self.model_dump()
        name = " ".join(str(fields.pop(key)) for key in ("edit", "unit") if key in fields)
        return f"{name} ({', '.join(f'{key}: {value}' for key, value in fields.items())})" if fields else name


class Remove(_Edit):
    """Drop a unit's residual branch and keep its shortcut.

    `unit` names a resnet, an attention, an `attn1`, `attn2` or `ff` inside one, the whole `mid_block`, or
    the innermost stage by its down block ("down_blocks.3": with its up block and the resampling
    between them and the next stage).

    `compensate` puts a map of the unit's input in the branch's place, fitted to what the teacher does there
    (`asdm.fit_compensation`; beyond the paper): a constant for each channel, a scale and a constant for each
    channel, or a linear map of all channels (a 1x1 convolution). Where the unit has a 1x1 shortcut the fit
    folds into it and costs nothing. `compensate_time` adds a term linear in the time embedding, in resnets.
    """

    edit: Literal["remove"] = "remove"
    unit: str
    compensate: CompensationKind = "none"
    compensate_time: bool = False

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value not in ("none", False)}

    @model_validator(mode="after")
    def _time_goes_with_what_is_fitted(self) -> Remove:
        if self.compensate_time and self.compensate not in ("bias", "linear"):
            raise ValueError(f"compensate_time goes with compensate bias or linear, not {self.compensate}")
        return self


class GriAttention(_Edit):
    """Global-regional attention in the place of a self-attention (`asdm.student.gri_attention`).

    `unit` names an `attn1`; `regions` along each side of the map of tokens; `pool`, the side of the squares of
    tokens that are averaged to a global one, 0 for none; `weighted`, whether a global token counts for as many
    as it was averaged from.
    """

    edit: Literal["gri_attention"] = "gri_attention"
    unit: str
    regions: int = Field(4, ge=1)
    pool: int = Field(2, ge=0)
    weighted: bool = False


class CondConv(_Edit):
    """A bank of kernels in the place of one (CLME-CondConv, `asdm.student.cond_conv`).

    `unit` names a resnet's `conv1` or `conv2` that stays, `experts` the teacher's convolutions, mostly of removed
    units, whose kernels join the own one. `router`: what decides the mixture, the input's average, the time
    embedding, or both.
    """

    edit: Literal["cond_conv"] = "cond_conv"
    unit: str
    experts: list[str] = Field(min_length=1)
    router: Literal["input", "input+time", "time"] = "input"
    activation: Literal["softmax", "sigmoid"] = "softmax"


class Shorten(_Edit):
    """Drop whole layers, as BK-SDM does: the student is a stock UNet (`asdm.student.stock`).

    Of each down block the first `layers_per_block` layers stay, of each up block these and the last; `levels`
    counts the stages that stay, the outermost first. It is a plan's only edit.
    """

    edit: Literal["shorten"] = "shorten"
    layers_per_block: int = Field(ge=1)
    mid_block: bool = True
    levels: int | None = Field(None, ge=2)


UnitEdit = Remove | GriAttention | CondConv
Edit = Annotated[UnitEdit | Shorten, Field(discriminator="edit")]
EDIT_KINDS = ("remove", "gri_attention", "cond_conv", "shorten")
_EDITS: TypeAdapter[list[Edit]] = TypeAdapter(list[Edit])


def parse_edits(edits: Iterable[Any]) -> list[Edit]:
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
        field = ".".join(str(part) for part in place[1:] if part not in EDIT_KINDS)
        raise AsdmError(
            f"not an edit: {wrong!r}: {field or 'edit'}: {first['msg'].lower()}; "
            f'allowed kinds: {", ".join(EDIT_KINDS)}, for example {{"edit": "remove", "unit": "mid_block"}}'
        ) from None


def compensated(edits: Iterable[Edit]) -> list[Remove]:
    """The removals in whose place something is fitted."""
    return [edit for edit in edits if isinstance(edit, Remove) and edit.compensate != "none"]
