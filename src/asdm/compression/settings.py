"""What a run of `compress` is asked for, beside its results: a folder is resumed only with the same settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from asdm.choices import IMAGE_TO_IMAGE_SAMPLES, CompensationKind, Dtype, PredictionType, Sensitivity
from asdm.distillation.caption_only import read_captions
from asdm.distillation.recipes import RECIPES, SPLICED, read_stages
from asdm.distillation.stages import Stage, parse_stages
from asdm.errors import AsdmError
from asdm.files import MARKER, read_marker, write_text
from asdm.old_names import OLD_COMPRESSION_SETTINGS, renamed
from asdm.pipelines.decoders import require_decoder_named
from asdm.planning.budget import require_budget, require_portable
from asdm.planning.refine import ROUNDS
from asdm.records import Record

KIND = "compression"  # of a folder, in its marker
_TRAINING = {"steps", "recipe", "stages", "captions"}  # what the training compares, stage by stage, as it is resumed
_EVALUATED = ("evaluation.json", "work/images")  # one of these is there once the training is over
# Settings that folders of 0.1.0 do not name, as their runs are continued.
_NEW_SETTINGS: dict[str, Any] = {
    "captions": None,
    "image_to_image": IMAGE_TO_IMAGE_SAMPLES,
    "strength": None,
    "decoder": None,
    "save_decoder": False,
    "portable": False,
}


class Settings(Record):
    """The settings of a run, with the defaults filled in that depend on the model."""

    model: str = Field(description="The teacher, as for `load_pipeline`.")
    budget: dict[str, Any] = Field(description="speedup, params, macs and preset; all but one are None.")
    sensitivity: Sensitivity | None = Field(description="How sensitivities are measured; None for the default.")
    compensate: CompensationKind = Field(description="What is fitted in place of removed branches.")
    refine: int = Field(description="Rounds of refinement.")
    data: str | None = Field(description="The data source.")
    steps: int | None = Field(description="Training steps; None with stages.")
    recipe: str | None = Field(description="The recipe's name; None with stages.")
    samples: int = Field(description="Images per split in the evaluation.")
    sampling_steps: int = Field(description="Sampling steps in the evaluation.")
    image_to_image: int = Field(
        IMAGE_TO_IMAGE_SAMPLES, description="Images per split of the evaluation that start from an image."
    )
    strength: float | None = Field(None, description="Of the evaluation's image-to-image; None for the default.")
    stages: list[Stage] | None = Field(description="The distillation in detail, instead of steps and recipe.")
    seed: int = Field(description="Seed of all random numbers.")
    prediction_type: PredictionType | None = Field(None, description="What the model predicts, if given.")
    config: str | None = Field(None, description="The model's configuration, if given.")
    dtype: Dtype = Field("float32", description="What the teacher and the result compute in.")
    captions: str | None = Field(None, description="Captions without images for the distillation, if given.")
    decoder: str | None = Field(None, description="A tiny decoder with which the result is measured too, if given.")
    save_decoder: bool = Field(False, description="Whether the result is saved with the tiny decoder.")
    portable: bool = Field(False, description="Whether the student is a stock model that other programs read.")

    @property
    def claims(self) -> dict[str, Any]:
        """What was said of the model beside its checkpoint."""
        given = {"prediction_type": self.prediction_type, "config": self.config}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def tried(self) -> CompensationKind:
        """The projections that units are tried with: none for a portable student, where what folds comes on top."""
        return "none" if self.portable else self.compensate

    @property
    def is_random(self) -> bool:
        """Whether the model has random weights, which are good for speed and memory only."""
        return has_random_weights(self.model)

    @property
    def result_row(self) -> int:
        """Which of the evaluation's rows is of the pipeline that is saved: the one before the last where the tiny
        decoder is only measured."""
        return -2 if self.decoder is not None and not self.save_decoder else -1

    def saved(self) -> dict[str, Any]:
        """Return the settings as JSON data."""
        content = self.model_dump(mode="json", exclude={"prediction_type", "config", "dtype"})
        # Folders of versions without the setting have the default.
        return content | self.claims | ({} if self.dtype == "float32" else {"dtype": self.dtype})

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the teacher and the result compute in."""
        return getattr(torch, self.dtype)


def has_random_weights(model: str) -> bool:
    """Return whether a model's name asks for random weights."""
    return model.startswith("random:")


def make_settings(
    model: str | Path,
    budget: dict[str, Any],
    *,
    compensate: CompensationKind | None,
    refine: int | None,
    data: str | Path | None,
    steps: int,
    recipe: str | Path,
    stages: Sequence[Stage] | None,
    captions: str | Path | None = None,
    config: str | Path | None,
    decoder: str | Path | None = None,
    save_decoder: bool = False,
    portable: bool = False,
    **others: Any,
) -> Settings:
    """Check the settings that depend on each other, and fill in their defaults.

    Raises:
        AsdmError: not one budget, or what does not go with `portable`; a distillation without data, a recipe that does
            not exist or whose students sample unlike their teacher, or no tiny decoder of that name.
    """
    require_budget(**budget)
    if portable:
        require_portable(budget["preset"], compensate)
    if decoder is not None:
        require_decoder_named(str(decoder))
    elif save_decoder:
        raise AsdmError("save_decoder=True: there is no tiny decoder to save; give decoder too")
    if stages is None and recipe not in RECIPES:
        stages = read_stages(recipe)
    if data is None and (steps > 0 or stages):
        raise AsdmError(f"steps={steps} of distillation need data: name a folder of captioned images, or give 0 steps")
    if recipe == "lcm" or any(stage.scope == "consistency" for stage in stages or ()):
        raise AsdmError(
            f"recipe={recipe}: its students sample otherwise than the teacher they are compared with; compress "
            "by another recipe, then run asdm distill --recipe lcm on the result"
        )
    if captions is not None and str(captions) != SPLICED:
        read_captions(captions)
    is_random, has_preset = has_random_weights(str(model)), budget["preset"] is not None
    if refine is None:
        refine = 0 if is_random or has_preset or portable else ROUNDS
    return Settings(
        model=str(model),
        budget=budget,
        compensate=compensate or ("none" if is_random else "linear"),
        refine=refine,
        data=None if data is None else str(data),
        steps=steps if stages is None else None,
        recipe=str(recipe) if stages is None else None,
        stages=None if stages is None else list(stages),
        captions=None if captions is None else str(captions),
        config=None if config is None else str(config),
        decoder=None if decoder is None else str(decoder),
        save_decoder=save_decoder,
        portable=portable,
        **others,
    )


def claim_folder(folder: Path, settings: Settings, teacher: str | None = None) -> None:
    """Mark a folder as this run's, or find that it is. Settings of a training that is not over may have changed.

    Args:
        teacher: digest of the model's weights.

    Raises:
        AsdmError: it was made with other settings, or of other weights.
    """
    marker = folder / MARKER
    if marker.is_file():
        require_same_settings(folder, settings, teacher)
        about = read_marker(folder)
        if _is_evaluated(folder):
            return
    else:
        about = {"kind": KIND} | ({} if teacher is None else {"teacher": teacher})
    folder.mkdir(parents=True, exist_ok=True)
    about |= {"settings": settings.saved()}
    write_text(marker, json.dumps(about, indent=1) + "\n")


def require_same_settings(folder: Path, settings: Settings, teacher: str | None = None) -> None:
    """Raise an AsdmError if the folder was made with other settings, or of another `teacher`. Write nothing."""
    marker, wanted = folder / MARKER, settings.saved()
    if not marker.is_file():
        return
    found = _present_names(_saved_settings(folder))
    may_change = set() if _is_evaluated(folder) else _TRAINING
    changed = [key for key in {**wanted, **found} if key not in may_change and found.get(key) != wanted.get(key)]
    if changed:
        raise AsdmError(
            f"{folder}: made with other settings ({', '.join(changed)}); repeat those, or name another folder"
        )
    if teacher is not None and read_marker(folder).get("teacher", teacher) != teacher:
        raise AsdmError(f"{folder}: begun when {settings.model} had other weights; name another folder")


def _is_evaluated(folder: Path) -> bool:
    """Return whether the training in a folder is over, so that a changed one would not be the one that was judged."""
    return any((folder / name).exists() for name in _EVALUATED)


def _saved_settings(folder: Path) -> dict[str, Any]:
    found = read_marker(folder).get("settings")
    return found if isinstance(found, dict) else {}


def _present_names(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version saved, by the present names."""
    saved = _NEW_SETTINGS | renamed(saved, OLD_COMPRESSION_SETTINGS)
    try:
        if saved.get("stages") is not None:
            saved["stages"] = [stage.model_dump(mode="json") for stage in parse_stages(saved["stages"])]
    except AsdmError:
        pass  # stages that this version cannot read are other stages
    return saved
