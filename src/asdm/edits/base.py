"""The edits that a plan is made of, as small typed records. What each does is in `surgery.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from asdm.errors import AsdmError
from asdm.old_names import OLD_EDIT_KINDS

CompensationKind = Literal["none", "bias", "diagonal", "linear"]


@dataclass(frozen=True)
class _Edit:
    edit: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, value in vars(self).items():
            if not _fits(value, hints[name]):
                raise AsdmError(f"{name}: {value!r} is not allowed; it is {_said(hints[name])}")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in plans and configs."""
        return {"edit": self.edit, **asdict(self)}

    def __str__(self) -> str:
        rest = self.to_dict()
        name = " ".join(str(rest.pop(key)) for key in ("edit", "unit") if key in rest)
        return f"{name} ({', '.join(f'{key}: {value}' for key, value in rest.items())})" if rest else name


@dataclass(frozen=True)
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

    edit = "remove"
    unit: str
    compensate: CompensationKind = "none"
    compensate_time: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compensate_time and self.compensate not in ("bias", "linear"):
            raise AsdmError(f"compensate_time goes with compensate bias or linear, not {self.compensate}")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if value not in ("none", False)}


@dataclass(frozen=True)
class GriAttention(_Edit):
    """Global-regional attention in the place of a self-attention (`asdm.edits.regional_attention`).

    `unit` names an `attn1`; `regions` along each side of the map of tokens; `pool`, the side of the squares of
    tokens that are averaged to a global one, 0 for none; `weighted`, whether a global token counts for as many
    of those as the region does not see itself.
    """

    edit = "gri_attention"
    unit: str
    regions: int = 4
    pool: int = 2
    weighted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("regions", self.regions, 1)
        _at_least("pool", self.pool, 0)


@dataclass(frozen=True)
class CondConv(_Edit):
    """A bank of kernels in the place of one (CLME-CondConv, `asdm.edits.cond_conv`).

    `unit` names a resnet's `conv1` or `conv2` that stays, `experts` the teacher's convolutions, mostly of removed
    units, whose kernels join the own one. `router`: what decides the mixture, the input's average, the time
    embedding, or both.
    """

    edit = "cond_conv"
    unit: str
    experts: list[str]
    router: Literal["input", "input+time", "time"] = "input"
    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experts:
            raise AsdmError("experts is empty; name the convolutions to inherit from")


@dataclass(frozen=True)
class DropLayers(_Edit):
    """Drop whole layers, as BK-SDM does: the student is a stock UNet (`asdm.edits.drop_layers`).

    Of each down block the first `layers_per_block` layers stay, of each up block these and the last; `levels`
    counts the stages that stay, the outermost first. It is a plan's only edit.
    """

    edit = "drop_layers"
    layers_per_block: int
    mid_block: bool = True
    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("layers_per_block", self.layers_per_block, 1)
        if self.levels is not None:
            _at_least("levels", self.levels, 2)


UnitEdit = Remove | GriAttention | CondConv
Edit = UnitEdit | DropLayers
EDIT_KINDS: dict[str, type[Edit]] = {kind.edit: kind for kind in (Remove, GriAttention, CondConv, DropLayers)}


def parse_edits(edits: Iterable[Any]) -> list[Edit]:
    """Edits from records or plain dicts.

    Raises:
        AsdmError: an edit of an unknown kind, or with a missing, unknown or impossible field.
    """
    if isinstance(edits, str | bytes | dict) or not isinstance(edits, Iterable):
        raise AsdmError(f"edits={edits!r}: must be a list of edits")
    return [edit if isinstance(edit, _Edit) else _parse(edit) for edit in edits]  # type: ignore[misc]


def _parse(content: Any) -> Edit:
    try:
        if not isinstance(content, dict) or "edit" not in content:
            raise AsdmError("an edit is an object with a field `edit`")
        name = str(content["edit"])
        kind = EDIT_KINDS.get(OLD_EDIT_KINDS.get(name, name))
        if kind is None:
            raise AsdmError(f"there is no kind {content['edit']!r}")
        values = {name: value for name, value in content.items() if name != "edit"}
        for field in fields(kind):
            if field.name not in values and field.default is MISSING:
                raise AsdmError(f"field {field.name} is missing")
        for name in values:
            if name not in {field.name for field in fields(kind)}:
                raise AsdmError(f"there is no field {name}; fields are {', '.join(f.name for f in fields(kind))}")
        return kind(**values)
    except AsdmError as error:
        raise AsdmError(
            f"not an edit: {content!r}: {error}; allowed kinds: {', '.join(EDIT_KINDS)}, "
            'for example {"edit": "remove", "unit": "mid_block"}'
        ) from None


def _fits(value: Any, hint: Any) -> bool:
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return value in options
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    return any(_fits(value, option) for option in options) if options else type(value) is hint


def _said(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise AsdmError(f"{name} is {value}, and at least {least} is allowed")


def compensated(edits: Iterable[Edit]) -> list[Remove]:
    """The removals in whose place something is fitted."""
    return [edit for edit in edits if isinstance(edit, Remove) and edit.compensate != "none"]
