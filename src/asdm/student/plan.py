"""A pruning plan: the list of edits that is the student's architecture, as a file people can read and edit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from asdm import checks
from asdm.edits import Edit, parse_edits
from asdm.errors import AsdmError
from asdm.families import Denoiser, family_of
from asdm.files import write_text
from asdm.measure.latency import Ratio
from asdm.old_names import OLD_PLAN_FIELDS, renamed
from asdm.records import Record, read_record
from asdm.student.surgery import model_without_weights


class PlanBase(Record):
    """The denoiser that a plan is for: its stock class and the digest of its architecture."""

    model_config = ConfigDict(populate_by_name=True)
    class_name: str = Field(alias="class")
    fingerprint: str

    @classmethod
    def of(cls, fingerprint: str, class_name: str) -> PlanBase:
        return cls.model_validate({"class": class_name, "fingerprint": fingerprint})


SpeedupBasis = Literal["measured", "latency", "macs"]


class PlanMetrics(Record):
    """What the planner aimed at, predicted and measured; ratios are teacher / student."""

    model: str | None = Field(None, description="the teacher's name")
    target: dict[str, float] = Field(description="the budget: speedup, or the part of params or macs that may remain")
    predicted_sensitivity: float | None = Field(
        None, description="the sum of the edits' sensitivities; None where the profile has none"
    )
    predicted_speedup: float = Field(description="by the profile's latencies, or its MACs where it has no latencies")
    measured_speedup: float | None = Field(None, description="of student and teacher timed in turns")
    measured_speedup_interval: tuple[float, float] | None = Field(None, description="contains the true speed-up")
    speedup_basis: SpeedupBasis | None = Field(
        None,
        description="what shows that the target is met: a measurement, or on a busy machine the profile's latencies or "
        "MACs",
    )
    measured_sensitivity: float | None = Field(
        None, description="of all edits together, with their compensations fitted (`refine_plan`)"
    )

    @property
    def measured_ratio(self) -> Ratio | None:
        """The measured speed-up with its interval; None where it was not measured."""
        if self.measured_speedup is None:
            return None
        return Ratio(self.measured_speedup, *(self.measured_speedup_interval or [self.measured_speedup] * 2))


Edits = Annotated[
    list[Edit], PlainValidator(parse_edits), PlainSerializer(lambda edits: [edit.to_dict() for edit in edits])
]


class PruningPlan(Record):
    """A list of edits for one architecture."""

    base: PlanBase = Field(description="the architecture that the plan is for")
    edits: Edits = Field(description="records of edits, such as `Remove`")
    metrics: PlanMetrics | None = Field(
        None, description="the budget, and what was predicted and measured; None for a plan by hand"
    )

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, content: Any) -> Any:
        return renamed(content, OLD_PLAN_FIELDS) if isinstance(content, dict) else content

    @classmethod
    @checks.arguments(unet=checks.UNET)
    def for_unet(cls, unet: Denoiser, edits: Iterable[Any] = ()) -> PruningPlan:
        """Make a plan by hand; `edits` are records or dicts such as `{"edit": "remove", "unit": "mid_block"}`.

        Raises:
            AsdmError: an edit that is malformed, or names a unit that `unet` does not have.
        """
        family = family_of(unet)
        base = PlanBase.of(family.fingerprint(unet), family.model_class.__name__)
        plan = cls(base=base, edits=parse_edits(edits))
        model_without_weights(unet, plan.edits)
        return plan

    def to_json(self) -> str:
        """Return the plan as JSON."""
        return json.dumps(self.model_dump(exclude_none=True, by_alias=True), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan.

        Raises:
            AsdmError: no such file, not JSON, or not a plan.
        """
        path = Path(path)
        if not path.is_file():
            raise AsdmError(f"{path}: no such plan file; make one with `asdm plan`")
        return read_record(cls, path, "a plan", "make one with `asdm plan`")

    def require_for(self, unet: Denoiser) -> None:
        """Raise an AsdmError unless the plan was made for this architecture."""
        found = family_of(unet).fingerprint(unet)
        if self.base.fingerprint != found:
            raise AsdmError(
                f"plan for another model: its fingerprint is {self.base.fingerprint}, this one's {found}; "
                "make a plan for this one with `asdm plan`"
            )
