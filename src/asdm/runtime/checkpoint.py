"""A pipeline as one safetensors file in the original code's layout, for ComfyUI, Forge and stable-diffusion.cpp."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.loaders.single_file_utils import LDM_UNET_KEY
from huggingface_hub import metadata_load
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from asdm import checks
from asdm.caching.session import require_uncached
from asdm.choices import FileDtype, Program
from asdm.diffusion.conditioning import image_size
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of
from asdm.families.records import OriginalLayout
from asdm.files import read_marker, require_file_place, write_text
from asdm.pipelines.names import folder_of
from asdm.pipelines.original_layout import CONFIG_KEY, StoredTensor, original_tensors
from asdm.pipelines.saving import require_savable
from asdm.pipelines.streaming import write_safetensors
from asdm.student.edited_model import all_edits_of
from asdm.version import __version__

_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
_VERSION_KEY, _EDITS_KEY = "asdm.version", "asdm.edits"
_PROGRAM_NAMES = {"comfyui": "ComfyUI and Forge", "sdcpp": "stable-diffusion.cpp", "diffusers": "diffusers"}
_PREDICTIONS = {"v_prediction": "v"}  # as modelspec has them
_ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}
_VELOCITY_NOTES = {
    "comfyui": "predicts velocities, which ComfyUI and Forge do not see in this file: put the node "
    "ModelSamplingDiscrete with v_prediction behind the loader, or choose v-prediction in Forge",
    "sdcpp": "predicts velocities, which stable-diffusion.cpp guesses at most: give it --prediction v",
    "diffusers": "predicts velocities: give from_single_file the scheduler of this pipeline",
}
_NOISE_NOTE = (
    "predicts noise, and ComfyUI and Forge take this file for one that predicts velocities: put the node "
    "ModelSamplingDiscrete with eps behind the loader, or choose epsilon in Forge"
)
_ZERO_SNR_NOTES = {
    "comfyui": "samples by a noise schedule that ends at zero SNR, which ComfyUI does not see in this file: switch on "
    "zsnr in the node ModelSamplingDiscrete behind the loader, with {sampling}; in Forge choose the noise schedule "
    "Zero Terminal SNR",
    "sdcpp": "samples by a noise schedule that ends at zero SNR, for which stable-diffusion.cpp has no option: its "
    "images are less bright and less dark there; export it for comfyui",
    "diffusers": "samples by a noise schedule that ends at zero SNR: give from_single_file this pipeline's folder as "
    'config, or a scheduler with rescale_betas_zero_snr=True and timestep_spacing="trailing"',
}
_SAMPLINGS = {"epsilon": "eps", "sample": "x0"}  # as ComfyUI's node has them
_SAMPLE_NOTE = "predicts the sample (x0), which no program sees in a file: set it there (ModelSamplingDiscrete, x0)"
_FEW_STEPS_NOTE = "samples in few steps: choose the sampler lcm with 4 to 8 steps and a guidance (CFG) of 1"


@dataclass(frozen=True)
class ExportedCheckpoint:
    """The file of an export, the card beside it, and what its user has to set in the program."""

    file: Path
    card: Path
    notes: list[str]


@checks.arguments(
    pipeline=checks.PIPELINE,
    file=checks.path,
    program=checks.literal(Program),
    unet_only=checks.flag,
    dtype=checks.literal(FileDtype),
    license=checks.path,
)
@torch.no_grad()
def export_checkpoint(
    pipeline: DiffusionPipeline,
    file: str | Path,
    program: Program = "comfyui",
    *,
    unet_only: bool = False,
    dtype: FileDtype = "fp16",
    license: str | None = None,
) -> ExportedCheckpoint:
    """Write a pipeline as one safetensors file in the layout of the original code, and a card beside it.

    The tensors are written one after another; no second copy of the model is made. The metadata has the plan, the
    licence and what the UNet predicts, by the names of modelspec.

    Args:
        file: its name ends in .safetensors. The card has the same name and ends in .md.
        program: who reads the file: "comfyui" (and Forge), "sdcpp" (stable-diffusion.cpp), or "diffusers", whose
            `from_single_file` reads any shape with a config. They number the layers of students differently.
        unet_only: leave out the VAE and the text encoders.
        dtype: of the file's weights: "fp16" or "fp32".
        license: of the model; by default what the model card in the pipeline's folder says.

    Raises:
        AsdmError: the program cannot compute the student or does not know its shape, `file` is another's, or a value
            does not fit `dtype`.
    """
    file = Path(file)
    require_file(file)
    denoiser = denoiser_of(pipeline)
    require_savable(pipeline)
    require_uncached(denoiser, "export")
    tensors, layout = original_tensors(pipeline, program, unet_only)
    prediction, zero_snr = _prediction(pipeline)
    if layout.kind == "sdxl":
        tensors += _markers(prediction, zero_snr, unet_only)
    notes = _notes(pipeline, layout, program, unet_only)
    metadata = _metadata(pipeline, file.stem, layout, license or _license(pipeline))
    write_safetensors(file, tensors, _DTYPES[dtype], metadata)
    card = _card_beside(file)
    write_text(card, _card(metadata, program, unet_only, notes))
    return ExportedCheckpoint(file, card, notes)


def require_file(file: Path) -> None:
    """Raise an AsdmError for a file that cannot be written, or if it or its card was not written by an export."""
    if file.suffix != ".safetensors":
        raise AsdmError(f"{file}: a checkpoint's name ends in .safetensors; name it so")
    require_file_place(file)
    card = _card_beside(file)
    if card.is_dir():
        raise AsdmError(f"{card}: is a folder, and the card beside {file.name} has its name; name another file")
    if file.exists() and not _is_export(file):
        raise AsdmError(f"{file}: exists and is no export of asdm; name another file or remove it")
    if card.exists() and not _is_card(card):
        raise AsdmError(
            f"{card}: exists, is no card of an export, and would be replaced by that of {file.name}; name another file "
            "or remove it"
        )


def _card_beside(file: Path) -> Path:
    return file.with_suffix(".md")


def _is_export(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as content:
            return _VERSION_KEY in (content.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _is_card(path: Path) -> bool:
    try:
        return path.is_file() and _OF_CARDS.search(path.read_text("utf-8", "replace")) is not None
    except OSError:
        return False


# -- what the file says of the model -----------------------------------------------------------------------


def _prediction(pipeline: DiffusionPipeline) -> tuple[str, bool]:
    """Return what the UNet predicts, and whether its schedule ends at zero SNR."""
    config = pipeline.scheduler.config  # type: ignore[attr-defined]
    return config.get("prediction_type", "epsilon"), bool(config.get("rescale_betas_zero_snr", False))


def _markers(prediction: str, zero_snr: bool, unet_only: bool) -> list[StoredTensor]:
    """Return the empty tensors by which programs know SDXL's fine-tunes that predict velocities.

    Of a UNet alone ComfyUI reads only what has the UNet's prefix.
    """
    names = (["v_pred"] if prediction == "v_prediction" else []) + (["ztsnr"] if zero_snr else [])
    names += [LDM_UNET_KEY + name for name in names if unet_only]
    return [StoredTensor(name, (0,), lambda: torch.empty(0)) for name in names]


def _notes(pipeline: DiffusionPipeline, layout: OriginalLayout, program: Program, unet_only: bool) -> list[str]:
    """Return what the user has to set in the program, as the file cannot say it."""
    notes = []
    prediction, zero_snr = _prediction(pipeline)
    seen = _sees_velocity(pipeline, layout, program, unet_only)
    if prediction == "v_prediction" and not seen:
        notes.append(_VELOCITY_NOTES[program])
    elif prediction == "epsilon" and seen and layout.velocity_sign is not None:
        notes.append(_NOISE_NOTE)
    elif prediction == "sample":
        notes.append(_SAMPLE_NOTE)
    # ComfyUI reads `ztsnr` beside `v_pred` alone.
    if zero_snr and not (layout.kind == "sdxl" and program == "comfyui" and prediction == "v_prediction"):
        notes.append(_ZERO_SNR_NOTES[program].format(sampling=_SAMPLINGS.get(prediction, prediction)))
    if isinstance(pipeline.scheduler, LCMScheduler):  # type: ignore[attr-defined]
        notes.append(_FEW_STEPS_NOTE)
    return notes


def _sees_velocity(pipeline: DiffusionPipeline, layout: OriginalLayout, program: Program, unet_only: bool) -> bool:
    """Return whether the program finds out from the file that a model predicts velocities, where it does."""
    if layout.kind == "sdxl":  # by marker tensors
        return program == "comfyui" or (program == "sdcpp" and not unet_only)
    if layout.velocity_sign is None:
        return False
    tensor, spread = layout.velocity_sign
    return float(denoiser_of(pipeline).state_dict()[tensor].float().std(correction=0)) > spread


def _metadata(pipeline: DiffusionPipeline, title: str, layout: OriginalLayout, license: str | None) -> dict[str, str]:
    denoiser = denoiser_of(pipeline)
    prediction, zero_snr = _prediction(pipeline)
    side = str(image_size(pipeline))
    teacher = read_marker(_folder(pipeline)).get("teacher")
    about = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _architecture(denoiser, layout, prediction, int(side)),
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": _PREDICTIONS.get(prediction, prediction),
        "modelspec.license": license,
        "ss_zero_terminal_snr": "true" if zero_snr else None,
        "asdm.teacher": teacher if isinstance(teacher, str) else None,
        _EDITS_KEY: json.dumps([edit.to_dict() for edit in all_edits_of(denoiser)]),
        CONFIG_KEY: json.dumps(_plain_config(denoiser)),
        _VERSION_KEY: __version__,
    }
    return {name: _as_utf8(value) for name, value in about.items() if value is not None}


def _as_utf8(text: str) -> str:
    """Escape what a name that is no UTF-8 has in it: programs do not read a file with such metadata."""
    return text.encode("utf-8", "backslashreplace").decode()


def _plain_config(denoiser: Any) -> dict[str, Any]:
    """Return a denoiser's config without paths and versions of the machine that saved it."""
    dropped = ("_name_or_path", "_diffusers_version", "_class_name", "_use_default_values")
    return json.loads(json.dumps({key: value for key, value in denoiser.config.items() if key not in dropped}))


def _architecture(denoiser: Any, layout: OriginalLayout, prediction: str, side: int) -> str:
    """Return the name that modelspec gives to the kind of model."""
    name = _ARCHITECTURES[layout.kind]
    if family_of(denoiser).sample_shape(denoiser)[0] == 9:
        return f"{name}-inpainting"
    if layout.kind == "sd2":
        return f"{name}-768-v" if prediction == "v_prediction" else f"{name}-512"
    return name


def _license(pipeline: DiffusionPipeline) -> str | None:
    """Return the licence that the model card in the pipeline's folder names; None where none does."""
    card = _folder(pipeline) / "README.md"
    try:
        found = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        return None
    return found if isinstance(found, str) else None


def _folder(pipeline: DiffusionPipeline) -> Path:
    """Return the folder that a pipeline was loaded from; one that does not exist where it was not."""
    return folder_of(pipeline.config.get("_name_or_path") or "/nonexistent")


_OF_CARDS = re.compile("^A checkpoint in the original layout.* written by asdm ", re.MULTILINE)
_CARD = """# {title}

A checkpoint in the original layout{parts}, for {program}, written by asdm {version}.

- architecture: {architecture}
- images: {resolution}
- predicts: {prediction}
- licence: {license}
- made of: {teacher}

## To set

{notes}

## Plan

{plan}
"""


def _card(metadata: dict[str, str], program: Program, unet_only: bool, notes: list[str]) -> str:
    edits = [json.dumps(edit) for edit in json.loads(metadata[_EDITS_KEY])]
    return _CARD.format(
        title=metadata["modelspec.title"],
        parts=" without VAE and text encoders" if unet_only else "",
        program=_PROGRAM_NAMES[program],
        version=metadata[_VERSION_KEY],
        architecture=metadata["modelspec.architecture"],
        resolution=metadata["modelspec.resolution"],
        prediction=metadata["modelspec.prediction_type"],
        license=metadata.get("modelspec.license", "not stated; it is the original model's"),
        teacher=metadata.get("asdm.teacher", "not stated"),
        notes="\n".join(f"- This model {note}." for note in notes) or "Nothing: the program reads all it needs.",
        plan="\n".join(f"- `{edit}`" for edit in edits) or "No edits.",
    )
