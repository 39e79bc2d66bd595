"""The redundancy profile: what each removable unit of a denoiser costs, and how sensitive the prediction is to it.

Only the records and their file live here. `analysis` makes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from asdm.choices import CompensationKind, Sensitivity
from asdm.errors import AsdmError
from asdm.families import ModelFamily, UNetFamily, UnitKind, block_of
from asdm.families.registry import family_named
from asdm.files import write_text
from asdm.old_names import OLD_UNIT_FIELDS, renamed
from asdm.records import Record, read_record

MAX_LATENCY_DOUBT = 0.1  # uncertainty of the units' latencies up to which a plan goes by them


class UnitRecord(Record):
    """The cost and the sensitivity of one unit."""

    name: str = Field(description="Module path of the unit.")
    kind: UnitKind
    parent: str | None = Field(description="The unit that contains it; None at the top.")
    parameters: int = Field(description="Parameters that removal saves; those of a kept shortcut stay.")
    gmacs: float = Field(description="GMACs per sample that removal saves, attention products counted.")
    gmacs_without_attention: float = Field(description="The same, attention products not counted.")
    latency_ms: float = Field(description="Milliseconds of one denoiser call that removal saves.")
    latency_share: float = Field(description="`latency_ms` as a fraction of the call.")
    channels: int = Field(0, description="Channels of the unit's hidden states, on which a projection's cost depends.")
    positions: int = Field(0, description="Pixels or tokens of a sample in the unit's layer.")
    projection_folds: bool = Field(False, description="Whether a projection folds into other layers and costs nothing.")
    sensitivity: float = Field(
        description="|prediction without it - prediction|^2 / |prediction|^2, averaged over time steps and prompts "
        "(inferred), with the projection in its place that the profile's `compensate` names."
    )
    sensitivity_by_timestep: dict[int, float]

    @model_validator(mode="before")
    @classmethod
    def _present_names(cls, content: Any) -> Any:
        return renamed(content, OLD_UNIT_FIELDS) if isinstance(content, dict) else content

    @property
    def block(self) -> str:
        """The block that the unit is in."""
        return block_of(self.name)


class EditRecord(Record):
    """What an edit other than the removal of a unit saves, and its sensitivity. Fields as in `UnitRecord`."""

    edit: dict[str, Any] = Field(description="The edit as it stands in plans.")
    covers: list[str] = Field(description="Units that it removes or changes, so that no other edit of a plan can.")
    parameters: int
    gmacs: float
    gmacs_without_attention: float
    latency_ms: float
    channels: int = Field(0, description="Channels of the projection that can replace it; 0 where none can.")
    positions: int = 0
    enlarges: dict[str, float] = Field(
        {},
        description="How many times as many MACs other removals save beside the edit, by their names: those of what "
        "then runs at a higher resolution. Profiles of earlier versions do not say it.",
    )
    sensitivity: float = Field(description="As in `UnitRecord`, without a projection in its place.")
    sensitivity_by_timestep: dict[int, float]


class RedundancyMap(Record):
    """Every removable unit of a denoiser, and every other edit that a plan can choose, as a table of measurements."""

    model: str = Field(description="Name or path of the pipeline.")
    # Profiles of version 0.1 do not name the class: all are of UNets.
    denoiser_class: str = Field(UNetFamily.model_class.__name__, description="Name of the denoiser's stock class.")
    fingerprint: str = Field(description="Digest of the denoiser's architecture.")
    unet_config: dict[str, Any] = Field(description="The denoiser's config.")
    parameters: int = Field(gt=0, description="Of the whole denoiser.")
    gmacs: float = Field(gt=0, description="GMACs of one call per sample, attention products counted.")
    gmacs_without_attention: float
    latency_ms: float = Field(ge=0, description="Milliseconds of one call; 0 where it was not measured.")
    latency_doubt: float = Field(
        0.0,
        description="Half of the confidence intervals of all units' latencies together, relative to these, plus the "
        "fraction of the cores that other processes took.",
    )
    other_cores: float | None = Field(None, description="How many cores other processes kept busy.")
    latency_batch_size: int = Field(description="Of the timed calls: 2 is one image with guidance.")
    dtype: str
    threads: int
    timesteps: list[int] = Field(description="Time steps of the calibration calls.")
    prompts: int = Field(description="Samples in each calibration call.")
    seed: int
    estimator: Sensitivity | None = Field("ablation", description="None where nothing but sizes was determined.")
    compensate: CompensationKind = Field("none", description="The projection that the ablation tried in removed units.")
    unet_forwards: float = Field(description="How many denoiser calls' worth of time the sensitivities took.")
    necessary_forwards: float = Field(
        description="The least that an exact ablation takes when no prefix is computed twice."
    )
    seconds: float = Field(description="How long the analysis took.")
    units: list[UnitRecord] = Field(description="What the removal of each unit saves, and its sensitivity.")
    others: list[EditRecord] = Field([], description="The same of edits that are no removal of a unit.")

    @property
    def family(self) -> ModelFamily:
        """The family of the denoiser."""
        return family_named(self.denoiser_class)

    def units_by_block(self) -> dict[str, list[UnitRecord]]:
        """Return the units of each block, without those that are parts of another one."""
        found: dict[str, list[UnitRecord]] = {}
        for unit in self.units:
            if unit.parent is None:
                found.setdefault(unit.block, []).append(unit)
        return found

    def parts_by_unit(self) -> dict[str, list[UnitRecord]]:
        """Return the parts of each unit that has some, by its name."""
        found: dict[str, list[UnitRecord]] = {}
        for unit in self.units:
            if unit.parent is not None:
                found.setdefault(unit.parent, []).append(unit)
        return found

    @property
    def has_reliable_latencies(self) -> bool:
        """Whether the machine was quiet enough to measure each unit."""
        return self.latency_doubt <= MAX_LATENCY_DOUBT

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        write_text(Path(path), json.dumps(self.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> RedundancyMap:
        """Read a profile.

        Raises:
            AsdmError: no such file, or not a profile.
        """
        path = Path(path)
        if not path.is_file():
            raise AsdmError(f"{path}: no such redundancy profile; make one with `asdm analyze`")
        return read_record(cls, path, "a redundancy profile", "make one with `asdm analyze`")
