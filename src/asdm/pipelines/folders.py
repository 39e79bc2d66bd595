"""Load a pipeline from a folder or from the Hub, students included."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from asdm.choices import PredictionType
from asdm.diffusion.kinds import require_channels
from asdm.errors import AsdmError, AsdmWarning, one_line
from asdm.families import component_of, families
from asdm.files import MARKER
from asdm.pipelines.claims import claim_of, claim_of_scheduler, claims_of_tensors, settled
from asdm.pipelines.damaged import require_vocabulary
from asdm.pipelines.derived import with_unet
from asdm.pipelines.headers import Header
from asdm.pipelines.names import folder_of, model_help
from asdm.pipelines.noise_schedules import scheduler_for, takes_zero_snr
from asdm.pipelines.quiet import quiet
from asdm.pipelines.supported import class_for, left_out
from asdm.pipelines.tensor_faults import (
    explain_folder,
    require_safetensors,
    require_shards,
    require_weights,
    require_whole,
)
from asdm.pipelines.untrusted import (
    bounded_modules,
    classes_of_parts,
    require_no_more_than_its_files,
    require_safe_folder,
    without_network,
)
from asdm.reading import read_json
from asdm.student.classes import student_class

_BESIDE = ["README.md", MARKER]  # the licence and the teacher are in them
VARIANT = "fp16"  # of weights that many checkpoints have alone


def load_folder(folder: Path, dtype: torch.dtype, as_stored: bool = False) -> DiffusionPipeline:
    """Load a pipeline from a folder.

    Args:
        as_stored: keep each part in the dtype of its files, in the mapped files.

    Raises:
        AsdmError: the folder is no pipeline's, or it is incomplete or damaged.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise AsdmError(f"{folder}: not a pipeline folder (no model_index.json); MODEL is {model_help()}")
    require_safe_folder(folder)
    about = read_json(index)
    kind = class_for(about, folder)
    denoiser = folder / _component_in(folder)
    if not (denoiser / "config.json").is_file():
        raise AsdmError(f"{folder}: a pipeline folder without a UNet (no {denoiser.name}/config.json)")
    _require_parts(folder)
    for tokenizer in sorted(folder.glob("tokenizer*/")):
        require_vocabulary(tokenizer)
    for path in sorted(folder.glob("*/*.safetensors")):
        require_safetensors(path)
        require_weights(path)
    require_shards(folder)
    for part, model in classes_of_parts(folder).items():
        require_no_more_than_its_files(model, folder / part)
    if not any(denoiser.glob("*.safetensors")):
        raise AsdmError(f"{denoiser}: no .safetensors weights; pickles are not loaded, convert them first")
    pipeline = _from_pretrained(folder, kind, dtype, as_stored)
    if kind is not DiffusionPipeline and about.get("_class_name") != kind.__name__:
        require_channels(pipeline, str(folder))
        _warn_of_other_class(about, kind, folder)
    return pipeline


def _warn_of_other_class(index: dict[str, Any], kind: type[Any], folder: Path) -> None:
    """Issue an `AsdmWarning` that a pipeline is not loaded in its own class, and samples in another way."""
    own, lost = index["_class_name"], left_out(index, kind)
    without = f", without its {' and '.join(lost)}" if lost else ""
    warnings.warn(f"{folder}: a {own}; loaded as the plain pipeline of its parts{without}", AsdmWarning, stacklevel=5)


def load_from_hub(name: str, dtype: torch.dtype, as_stored: bool = False) -> DiffusionPipeline:
    """Download a pipeline from the Hub, and load it.

    Raises:
        AsdmError: there is none of that name, or it is damaged.
    """
    try:
        with quiet():
            class_for(DiffusionPipeline.load_config(name), name)  # refused before its weights are downloaded
            try:
                folder = DiffusionPipeline.download(name, use_safetensors=True)
            except OSError:  # also where the weights are there in this variant alone
                folder = DiffusionPipeline.download(name, use_safetensors=True, variant=VARIANT)
    except AsdmError:
        raise
    except (OSError, ValueError) as error:
        told = f"not found, here or on the Hub ({one_line(error)}); MODEL is {model_help()}"
        raise AsdmError(f"{name}: {told}") from error
    with quiet(), suppress(OSError):  # a model is whole without them
        snapshot_download(name, allow_patterns=_BESIDE)
    return load_folder(Path(folder), dtype, as_stored)


def set_parameterization(
    pipeline: DiffusionPipeline, name: str, given: PredictionType | None, config: str | Path | None
) -> list[str]:
    """Set the scheduler of a pipeline from a folder as the user or its own config says.

    diffusers passes over what a config says where the scheduler's class cannot do it, or where the config is too old to
    say it. Returns remarks for the user.
    """
    own = claim_of_scheduler(pipeline.scheduler)
    claims = [own if config is None else claim_of(config)]
    if config is None and own.prediction_type is None:
        weights = (folder_of(name) / component_of(pipeline)).glob("*.safetensors")
        headers = [Header.of(path) for path in sorted(weights)]
        claims += [claim for header in headers for claim in claims_of_tensors(header)]
    said = settled(claims, given, name)
    passed_over = bool(said.zero_snr) and not takes_zero_snr(type(pipeline.scheduler))
    passed_over |= own.prediction_type is None and said.prediction_type is not None
    if given is None and config is None and not passed_over:
        return []
    with quiet():
        pipeline.scheduler = scheduler_for(pipeline.scheduler, said)
    return said.remarks


def _require_parts(folder: Path) -> None:
    """Raise an AsdmError where a part that a pipeline's index names has no folder."""
    for part, kind in read_json(folder / "model_index.json").items():
        named = isinstance(kind, list) and len(kind) == 2 and None not in kind
        if named and not (folder / part).is_dir():
            raise AsdmError(f"{folder}: lacks its {part}, which model_index.json names ({kind[1]}); download it again")


def _from_pretrained(folder: Path, kind: Any, dtype: torch.dtype, as_stored: bool) -> DiffusionPipeline:
    dtypes = {"default": dtype, **(_stored_dtypes(folder) if as_stored else {})}
    with quiet(), bounded_modules(str(folder)), without_network():
        try:
            pipeline = _with_its_denoiser(folder, kind, dtypes)
            require_whole(pipeline, folder)
            return pipeline
        except (AsdmError, MemoryError):
            raise
        except Exception as error:  # of the libraries, any kind
            explain_folder(folder)
            raise AsdmError(f"{folder}: cannot be loaded: {one_line(error)}") from error


def _with_its_denoiser(folder: Path, kind: Any, dtypes: dict[str, torch.dtype]) -> DiffusionPipeline:
    """Return the pipeline in a folder, in this class of pipelines, each part with its full weights where it has them. A
    student is loaded by this package's class: code in a model's folder is never run."""
    parts = DiffusionPipeline.load_config(str(folder))
    variant = VARIANT if any(_has_variant_alone(folder / part) for part in parts) else None
    component = _component_in(folder)
    made = _student_class(folder / component / "config.json")
    # With a variant, diffusers prefers it in all parts.
    full = {
        part: _part_of(folder / part, model, dtypes)
        for part, model in classes_of_parts(folder).items()
        if variant and model is not made and _has_both(folder / part)
    }
    how = {"dtype": dtypes, "use_safetensors": True, "trust_remote_code": False, "variant": variant, **full}
    if made is None:
        pipeline: DiffusionPipeline = kind.from_pretrained(str(folder), **how)
        return pipeline
    student = _part_of(folder / component, made, dtypes)
    rest = kind.from_pretrained(str(folder), **how, **{component: None})
    rest.register_modules(**{component: student})
    return with_unet(rest, student)


def _part_of(folder: Path, model: Any, dtypes: dict[str, torch.dtype]) -> Any:
    """Return a part of a pipeline, of that class, from its own folder."""
    variant = VARIANT if _has_variant_alone(folder) else None
    dtype = dtypes.get(folder.name, dtypes["default"])
    return model.from_pretrained(folder, dtype=dtype, use_safetensors=True, variant=variant)


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the dtype of the files of each part in a pipeline's folder; float32 where a part has several."""
    found = {}
    for part in (path for path in folder.iterdir() if path.is_dir()):
        files = list(part.glob("*.safetensors"))
        if not _has_variant_alone(part):
            files = [path for path in files if f".{VARIANT}" not in path.name]
        tensors = [tensor for path in files for tensor in Header.of(path).tensors.values()]
        kinds = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if kinds:
            found[part.name] = kinds.pop() if len(kinds) == 1 else torch.float32
    return found


def _component_in(folder: Path) -> str:
    """Return the name of the part of a pipeline's folder that is its denoiser."""
    names = [family.component for family in families()]
    return next((name for name in names if (folder / name / "config.json").is_file()), names[0])


def _has_variant_alone(folder: Path) -> bool:
    return _variants(folder) == {True}


def _has_both(folder: Path) -> bool:
    return _variants(folder) == {True, False}


def _variants(folder: Path) -> set[bool]:
    """Return for the weights in a folder whether they are of the variant, for some of them or all."""
    return {f".{VARIANT}" in path.name for path in folder.glob("*.safetensors")}


def _student_class(config: Path) -> type[Any] | None:
    """Return the class of the student that a denoiser's config describes; None of a stock model."""
    try:
        name = read_json(config).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None  # loading says what is wrong with it
    return student_class(name)
