"""Load a pipeline from one `.safetensors` file in the layout of the original code."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    LDM_UNET_KEY,
    LDM_VAE_KEYS,
)

from asdm.choices import PredictionType
from asdm.errors import AsdmError, one_line
from asdm.pipelines.claims import CheckpointFacts, claim_of, claims_of, claims_of_tensors, settled
from asdm.pipelines.headers import KIND_NAMES, SD_KINDS, Header, kind_of
from asdm.pipelines.names import PICKLE_SUFFIXES
from asdm.pipelines.noise_schedules import edm_scheduler, scheduler_for
from asdm.pipelines.quiet import quiet
from asdm.pipelines.tensor_faults import explain_single_file, require_safetensors, require_weights, require_whole
from asdm.pipelines.untrusted import bounded_modules

_OTHER_PARTS = (*LDM_VAE_KEYS, "cond_stage_model.", "conditioner.")  # begin the names of a VAE and text encoders
SD2_SIDES = (96, 64)  # of latents, of the SD 2.x that predict velocities, and of those that predict noise


def load_single_file(
    path: Path, dtype: torch.dtype, given: PredictionType | None, config: str | Path | None
) -> tuple[DiffusionPipeline, list[str]]:
    """Load a pipeline from one file; returns it, and remarks for the user on what it was assumed to predict.

    Args:
        given: what its UNet predicts, by the user.
        config: as for `load_pipeline`.

    Raises:
        AsdmError: the file is a pickle, damaged, or not a whole Stable Diffusion checkpoint.
    """
    if path.suffix in PICKLE_SUFFIXES:
        raise AsdmError(f"{path}: a pickle, which can run code when loaded; convert it to .safetensors first")
    require_safetensors(path)
    require_weights(path)
    header = Header.of(path)
    kind = _sd_kind(header)
    claims = claims_of(header, kind) if config is None else [claim_of(config), *claims_of_tensors(header)]
    said = settled(claims, given, str(path))
    pipeline = _from_single_file(header, kind, dtype, config)
    require_whole(pipeline, path)
    return pipeline, _set_parameterization(pipeline, header, kind, said)


def _sd_kind(header: Header) -> str:
    """Return the kind of Stable Diffusion checkpoint that a file is."""
    kind = kind_of(header)
    if kind in SD_KINDS and not any(name.startswith(LDM_UNET_KEY) for name in header.tensors):
        raise AsdmError(
            f"{header.path}: not a whole Stable Diffusion checkpoint: no tensor's name begins with {LDM_UNET_KEY}, as "
            "those of its UNet do"
        )
    if kind in SD_KINDS and not any(name.startswith(_OTHER_PARTS) for name in header.tensors):
        raise AsdmError(
            f"{header.path}: a UNet alone, without VAE and text encoders; load the pipeline's folder, or take the "
            "whole checkpoint (asdm export without --unet-only)"
        )
    if kind == "xl_refiner":
        raise AsdmError(f"{header.path}: has no first text encoder, as SDXL's refiner; use a base model")
    if kind not in (*SD_KINDS, "upscale", "instruct-pix2pix"):
        raise AsdmError(f"{header.path}: a checkpoint of {kind}; use SD 1.x, 2.x or SDXL")
    return kind


def _from_single_file(header: Header, kind: str, dtype: torch.dtype, config: str | Path | None) -> DiffusionPipeline:
    is_xl = kind.startswith(("xl", "playground"))
    made = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    about = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    if config is not None and not os.path.isfile(config):  # a file says nothing of the parts
        is_pipeline = not os.path.isdir(config) or (Path(config) / "model_index.json").is_file()
        about = str(config) if is_pipeline else about
    try:
        with quiet(), bounded_modules(str(header.path)):
            return made.from_single_file(str(header.path), dtype=dtype, config=about)
    except Exception as error:  # of diffusers, any kind
        if isinstance(error, AsdmError | MemoryError):
            raise
        explain_single_file(header, about, kind)
        raise AsdmError(
            f"{header.path}: not a whole Stable Diffusion checkpoint, or its configuration, which diffusers takes from "
            f"the Hub, is out of reach ({one_line(error)})"
        ) from error


def _set_parameterization(pipeline: DiffusionPipeline, header: Header, kind: str, said: CheckpointFacts) -> list[str]:
    """Set the scheduler as is said, or else by the default of the architecture; returns remarks for the user."""
    remarks = list(said.remarks)
    edm = edm_scheduler(header)
    if edm is not None and not said.scheduler:
        pipeline.scheduler = edm
    elif said.prediction_type is None and kind != "playground-v2-5":
        assumed = pipeline.scheduler.config.get("prediction_type", "epsilon")
        remarks.append(f"does not say what its UNet predicts; assumed {assumed}, the default of {KIND_NAMES[kind]}")
    with quiet():
        pipeline.scheduler = scheduler_for(pipeline.scheduler, said)
    if kind == "v2" and said.prediction_type == "epsilon" and pipeline.unet.config.sample_size == SD2_SIDES[0]:
        pipeline.unet.register_to_config(sample_size=SD2_SIDES[1])
    return remarks
