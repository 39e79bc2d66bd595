"""A pruning plan: the list of edits that is the student's architecture, as a file people can read and edit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from torch import Tensor

from asdm import checks
from asdm.edits import Edit, UnitEdit, parse_edits, removed_units
from asdm.errors import AsdmError
from asdm.families import family_of
from asdm.families.unet_structure import fingerprint, require_plain
from asdm.files import write_text
from asdm.measure.latency import Ratio
from asdm.records import Record, first_fault
from asdm.student.unet import AsdmUNet2DConditionModel, edits_of


class PlanBase(Record):
    """The UNet that a plan is for: its class and the digest of its architecture."""

    model_config = ConfigDict(populate_by_name=True)
    class_name: str = Field(alias="class")
    fingerprint: str

    @classmethod
    def of(cls, fingerprint: str) -> PlanBase:
        return cls.model_validate({"class": "UNet2DConditionModel", "fingerprint": fingerprint})


SpeedupBasis = Literal["measured", "latency", "macs"]


class PlanMetrics(Record):
    """What the planner aimed at and measured: ratios teacher / student; `predicted_sensitivity`, the sum of the map's
    for the edits, and `measured_sensitivity`, that of all edits together (`refine_plan`).

    `model`: the teacher's name. `predicted_sensitivity` is None where no sensitivities were needed. `speedup_basis`:
    what tells that the target is met, a measurement, or on a machine that was too busy for one the map's latencies or
    MACs. `measured_speedup_interval` holds the true speed-up.
    """

    model: str | None = None
    target: dict[str, float]
    predicted_sensitivity: float | None = None
    predicted_speedup: float
    measured_speedup: float | None = None
    measured_speedup_interval: tuple[float, float] | None = None
    speedup_basis: SpeedupBasis | None = None
    measured_sensitivity: float | None = None

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
    """A list of edits for one UNet architecture."""

    base: PlanBase
    edits: Edits
    figures: PlanMetrics | None = None

    @classmethod
    def for_unet(cls, unet: UNet2DConditionModel, edits: Iterable[Any] = ()) -> PruningPlan:
        """A plan made by hand; `edits` are records or dicts such as `{"edit": "remove", "unit": "mid_block"}`.

        Raises:
            AsdmError: an edit that is malformed, or names a unit that `unet` does not have.
        """
        plan = cls(
            base=PlanBase.of(fingerprint(unet)),
            edits=parse_edits(edits),
        )
        empty_student(unet, plan)
        return plan

    def to_json(self) -> str:
        return json.dumps(self.model_dump(exclude_none=True, by_alias=True), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
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
        try:
            content = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise AsdmError(f"{path}: not a plan: {error}; make one with `asdm plan`") from None
        try:
            if isinstance(content, dict):
                if not isinstance(content.get("edits"), list):
                    raise AsdmError(f"{path}: not a plan: edits is not a list; make one with `asdm plan`")
                content = {**content, "edits": parse_edits(content["edits"])}
            return cls.model_validate(content)
        except ValidationError as error:
            raise AsdmError(f"{path}: not a plan: {first_fault(error)}; make one with `asdm plan`") from None

    def require_for(self, unet: UNet2DConditionModel) -> None:
        """Raise an AsdmError unless the plan was made for this architecture."""
        found = fingerprint(unet)
        if self.base.fingerprint != found:
            raise AsdmError(
                f"plan for another model: its fingerprint is {self.base.fingerprint}, this UNet's {found}; "
                "make a plan for this one with `asdm plan`"
            )


def empty_student(unet: UNet2DConditionModel, plan: PruningPlan) -> UNet2DConditionModel:
    """The student's modules without weights (on the meta device)."""
    plan.require_for(unet)
    family = family_of(unet)
    exclusive = next((edit for edit in plan.edits if edit.is_exclusive), None)
    if exclusive is not None:
        if len(plan.edits) > 1:
            raise AsdmError(
                f"{exclusive.edit}: goes with no other edit, as it gives layers new numbers; make two plans"
            )
        shorter = exclusive.stock_config(unet, family)
        with init_empty_weights():
            return family.model_class.from_config(shorter)
    config = {key: value for key, value in unet.config.items() if key != "edits"}
    new = [edit.unit for edit in plan.edits if isinstance(edit, UnitEdit)]
    removed = removed_units(plan.edits, [], family)
    for name in new:
        outer = next((other for other in removed if other != name and family.is_covered_by(name, [other])), None)
        if outer is not None and not name.startswith(f"{outer}."):
            raise AsdmError(f"{name}: goes with {outer}, which the plan removes; drop one of them")
    earlier = [edit for edit in edits_of(unet) if not edit.gives_way_to(new, family)]
    config["edits"] = [edit.to_dict() for edit in [*earlier, *plan.edits]]
    with init_empty_weights():
        return AsdmUNet2DConditionModel.from_config(config)


@checks.arguments(unet=checks.UNET, plan=checks.a(PruningPlan, "asdm.make_plan makes one"))
def build_student(unet: UNet2DConditionModel, plan: PruningPlan) -> UNet2DConditionModel:
    """A student UNet: the teacher's architecture with the plan's edits, its weights inherited (copied).

    An `AsdmUNet2DConditionModel`, or a stock UNet2DConditionModel where the plan shortens. A plan without edits
    gives bit-identical outputs. The teacher is not changed; device, dtype and mode are the teacher's.

    Raises:
        AsdmError: a plan for another architecture, or with an edit that this UNet does not allow; or a LoRA is loaded,
            the UNet compiled or its weights offloaded.
    """
    require_plain(unet)
    student = empty_student(unet, plan)
    inherit_weights(student, unet)
    return student.train(unet.training)


def inherit_weights(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> None:
    """Copy every tensor that the student has from the teacher's tensor of the same name; what the student has
    of its own starts where it changes nothing.

    Raises:
        AsdmError: an expert of a new bank is not in the teacher.
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
