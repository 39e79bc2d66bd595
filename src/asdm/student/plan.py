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
from asdm.edits.base import DropLayers, Edit, GriAttention, UnitEdit, parse_edits
from asdm.edits.cond_conv import CondConv2d
from asdm.edits.drop_layers import teacher_key, with_dropped_layers
from asdm.edits.maps import Compensation, TimeCompensation
from asdm.errors import AsdmError
from asdm.families.unet_structure import conv_channels, fingerprint, is_covered_by, is_level, require_plain
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
    shorter = next((edit for edit in plan.edits if isinstance(edit, DropLayers)), None)
    if shorter is not None:
        if len(plan.edits) > 1:
            raise AsdmError("drop_layers: goes with no other edit, as it numbers the layers anew; make two plans")
        return with_dropped_layers(unet, shorter)
    config = {key: value for key, value in unet.config.items() if key != "edits"}
    new = [edit.unit for edit in plan.edits if not isinstance(edit, DropLayers)]
    innermost = next(filter(is_level, new), None)
    for name in new:
        if innermost is not None and not is_level(name) and is_covered_by(name, [innermost]):
            raise AsdmError(f"{name}: goes with {innermost}, which the plan removes; drop one of them")
    earlier = [edit for edit in edits_of(unet) if not _gives_way(edit, new)]
    config["edits"] = [edit.to_dict() for edit in [*earlier, *plan.edits]]
    with init_empty_weights():
        return AsdmUNet2DConditionModel.from_config(config)


def _gives_way(edit: UnitEdit, removed: list[str]) -> bool:
    """Whether an earlier edit is void once `removed` goes."""
    inside = any(edit.unit != unit and is_covered_by(edit.unit, [unit]) for unit in removed)
    return inside or (isinstance(edit, GriAttention) and edit.unit in removed)


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
    source = teacher.state_dict()
    like = next(iter(source.values()))
    own: dict[str, Tensor] = {}
    for path, module in student.named_modules():
        started: dict[str, Tensor] = {}
        if isinstance(module, Compensation | TimeCompensation):
            started = module.start()
        elif isinstance(module, CondConv2d) and f"{path}.expert_weight" not in source:
            gone = next((expert for expert in module.sources if f"{expert}.weight" not in source), None)
            if gone is not None:
                raise AsdmError(f"{path}: its expert {gone} is gone from this UNet; plan a bank with its removal")
            started = module.start(source, conv_channels(teacher), path)
        own |= {f"{path}.{name}": tensor.to(like.device, like.dtype) for name, tensor in started.items()}
    inherited = {}
    for name in student.state_dict():
        original = teacher_key(name, student, teacher)
        inherited[name] = source[original].detach().clone() if original in source else own[name]
    student.load_state_dict(inherited, strict=True, assign=True)
