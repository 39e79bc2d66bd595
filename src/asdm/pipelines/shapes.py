"""A model's denoiser without its weights, for what follows from the architecture alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors import safe_open

from asdm.diffusion.kinds import RANDOM
from asdm.errors import AsdmError, one_line
from asdm.families import Denoiser, ModelFamily, UNetFamily, denoiser_of, families
from asdm.pipelines.loading import load_pipeline
from asdm.pipelines.names import require_model_named
from asdm.pipelines.original_layout import CONFIG_KEY
from asdm.pipelines.quiet import quiet
from asdm.pipelines.random_models import UNETS
from asdm.pipelines.tensor_faults import require_safetensors
from asdm.pipelines.untrusted import bounded_modules, require_plausible
from asdm.reading import parse_json
from asdm.registry import PIPELINES, registered_folder
from asdm.student.classes import student_class_of


def denoiser_without_weights(model: str, **claims: Any) -> Denoiser:
    """Make the denoiser of a model on the meta device from its configuration. Nothing else is downloaded.

    A single file is loaded, as its tensors are its configuration, unless `export_checkpoint` wrote it. So is a model of
    which something is claimed, by which the claims are checked.

    Args:
        model: as for `load_pipeline`.
        claims: `prediction_type` and `config`, as for `load_pipeline`.

    Raises:
        AsdmError: there is no such model, its configuration cannot be read, or the claims do not fit.
    """
    require_model_named(model)
    if any(claim is not None for claim in claims.values()):
        return denoiser_of(load_pipeline(model, **claims)).to("meta")
    exported = _exported_config(Path(model))
    if exported is not None:
        return denoiser_of_config(UNetFamily(), exported, model)
    if Path(model).is_file():
        return denoiser_of(load_pipeline(model)).to("meta")
    return denoiser_of_config(*_config(model), model)


def denoiser_of_config(family: ModelFamily, config: dict[str, Any], model: str) -> Denoiser:
    """Make a denoiser of a family and config, edits included, on the meta device.

    Args:
        model: what errors call it.

    Raises:
        AsdmError: the config is of no denoiser, or of one that is too large.
    """
    try:
        require_plausible(config, model)
        with init_empty_weights(include_buffers=True), bounded_modules(model):
            return student_class_of(family).from_config(config)
    except (AsdmError, MemoryError):
        raise
    except Exception as error:  # of diffusers, any kind
        raise AsdmError(f"{model}: no denoiser can be made by its configuration ({one_line(error)})") from error


def _exported_config(file: Path) -> dict[str, Any] | None:
    """Return the config in the metadata of a file that `export_checkpoint` wrote; None for any other."""
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    require_safetensors(file)
    with safe_open(file, "pt") as content:
        text = (content.metadata() or {}).get(CONFIG_KEY)
    try:
        found = None if text is None else parse_json(text)
    except ValueError:
        found = None
    return {"edits": (), **found} if isinstance(found, dict) else None


def _config(model: str) -> tuple[ModelFamily, dict[str, Any]]:
    if model.startswith(RANDOM):
        return UNetFamily(), {"edits": (), **UNETS[model.removeprefix(RANDOM)]}
    folder = registered_folder(model, PIPELINES) or Path(model)
    place = folder if folder.is_dir() else model
    first: Exception | None = None
    with quiet():
        for family in families():
            try:
                return family, dict(family.model_class.load_config(place, subfolder=family.component))
            except (OSError, ValueError, TypeError, RecursionError) as error:
                first = first or error
    raise AsdmError(f"{model}: the configuration of its denoiser cannot be read ({one_line(first)})")
