"""Load a pipeline: by a registered name, a Hub id, a folder, a single file, or a full-size shape."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from asdm import checks
from asdm.choices import PredictionType
from asdm.devices import on_device
from asdm.errors import AsdmWarning
from asdm.pipelines.claims import as_prediction_type
from asdm.pipelines.folders import load_folder, load_from_hub, set_parameterization
from asdm.pipelines.names import require_model_named
from asdm.pipelines.random_models import RANDOM, random_pipeline
from asdm.pipelines.single_file import load_single_file
from asdm.pipelines.supported import as_supported, require_supported
from asdm.registry import PIPELINES, registered_folder
from asdm.student.edited_model import align_weights


@checks.arguments(model=checks.path, dtype=checks.floating)
def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    prediction_type: PredictionType | None = None,
    config: str | Path | None = None,
) -> DiffusionPipeline:
    """Load a pipeline for text-to-image or inpainting.

    Several sources may say what a file's UNet predicts, and whether its schedule ends at zero SNR. They are, the
    strongest first: a `.yaml` or `.json` of the file's name beside it, its marker tensors (`v_pred`, `ztsnr`), its
    metadata, a `scheduler_config.json` in its folder, and its number of training steps. If none says it, or if they
    contradict each other, an `AsdmWarning` says what was assumed.

    A pipeline for image-to-image becomes one for text-to-image. So does one for inpainting whose UNet reads no mask,
    and one that samples Stable Diffusion's parts in another way (PAG, ControlNet ..); an `AsdmWarning` tells of that.
    Weights of the variant fp16 are taken where there are no others.

    Args:
        model: "demo" (the embedded pipeline) or another registered name, a Hub id, a folder, a single `.safetensors`
            file, or full size with random weights, to measure speed: "random:sd15", "random:sd15-inpainting",
            "random:sd21", "random:sdxl".
        dtype: of the weights.
        device: where to put it; CPU by default.
        prediction_type: what its UNet predicts, "epsilon", "v_prediction" or "sample", whatever the checkpoint says.
        config: takes the place of what the checkpoint and files beside it say: a pipeline's folder or Hub id, a folder
            with a `scheduler_config.json`, or a file, `.json` (a scheduler's) or `.yaml` (of the original code).

    Raises:
        AsdmError: there is no such model or config, or it is damaged, a pickle, or of another kind; or
            its UNet has inputs that this package does not give it.
    """
    if device is not None:
        on_device(torch.empty(0), device)  # refused before anything is read
    pipeline = _load_named(str(model), dtype, False, prediction_type, config)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            align_weights(part)
    return pipeline if device is None else on_device(pipeline, device)


def load_mapped(
    model: str | Path,
    *,
    dtype: torch.dtype,
    prediction_type: PredictionType | None = None,
    config: str | Path | None = None,
) -> DiffusionPipeline:
    """Load a pipeline as `load_pipeline` does, on the CPU, to read its weights once and not to compute with them.

    Weights of a folder stay in the mapped files, in the dtype that they have there; no copy of them is made.

    Args:
        dtype: of weights that are not in a folder.
    """
    return _load_named(str(model), dtype, True, prediction_type, config)


def _load_named(
    name: str,
    dtype: torch.dtype,
    as_stored: bool,
    prediction_type: PredictionType | None,
    config: str | Path | None,
) -> DiffusionPipeline:
    """Load a pipeline by its name; weights of a folder in their own dtype with `as_stored`."""
    given = None if prediction_type is None else as_prediction_type(prediction_type, "prediction_type")
    pipeline, remarks = _load(name, dtype, as_stored, given, config)
    if remarks:
        advice = "if that is wrong, give prediction_type or config (--prediction-type, --config)"
        warnings.warn(f"{name}: {'; '.join([*remarks, advice])}", AsdmWarning, stacklevel=4)
    require_supported(pipeline, name)
    pipeline = as_supported(pipeline)
    _limit_prompts(pipeline)
    pipeline.register_to_config(_name_or_path=name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _limit_prompts(pipeline: DiffusionPipeline) -> None:
    """Let tokenizers cut prompts at as many tokens as the text encoders have positions for: some configs do not say how
    many that are."""
    for suffix in ("", "_2"):
        tokenizer, encoder = (getattr(pipeline, name + suffix, None) for name in ("tokenizer", "text_encoder"))
        most = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)  # CLIP's alone have it
        if tokenizer is not None and most is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, most)


def _load(
    name: str, dtype: torch.dtype, as_stored: bool, given: PredictionType | None, config: str | Path | None
) -> tuple[DiffusionPipeline, list[str]]:
    """Return the pipeline of that name, and remarks for the user on what it was assumed to predict."""
    require_model_named(name)
    registered = registered_folder(name, PIPELINES)
    if registered is not None:
        pipeline = load_folder(registered, dtype, as_stored)
    elif name.startswith(RANDOM):
        pipeline = random_pipeline(name.removeprefix(RANDOM), dtype)
    elif os.path.isdir(name):
        pipeline = load_folder(Path(name), dtype, as_stored)
    elif os.path.isfile(name):
        return load_single_file(Path(name), dtype, given, config)
    else:
        pipeline = load_from_hub(name, dtype, as_stored)
    return pipeline, set_parameterization(pipeline, name, given, config)
