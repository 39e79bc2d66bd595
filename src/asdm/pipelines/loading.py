"""Load a teacher pipeline (embedded default, Hub id, folder, single file, random full-size); save a student."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers import logging as diffusers_logging
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    LDM_UNET_KEY,
    SingleFileComponentError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, CLIPTextModel
from transformers.utils import logging as transformers_logging

from asdm import checks
from asdm.errors import AsdmError, AsdmWarning, one_line
from asdm.families.unet_structure import require_known_inputs, require_plain
from asdm.files import replacing_folder
from asdm.pipelines.checkpoints import (
    KIND_NAMES,
    SD_KINDS,
    Header,
    Parameterization,
    PredictionType,
    as_prediction_type,
    claim_of,
    claim_of_scheduler,
    claims_of,
    claims_of_tensors,
    edm_scheduler,
    kind_of,
    scheduler_for,
    settled,
    takes_zero_snr,
)
from asdm.pipelines.model_card import model_card
from asdm.pipelines.random_models import UNETS, random_pipeline
from asdm.pipelines.tensor_faults import (
    OF_TEXT,
    explain_folder,
    explain_single_file,
    require_all_read,
    require_loaded,
    require_shards,
    require_weights,
)
from asdm.student.unet import AsdmUNet2DConditionModel, align_weights

PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")
SD2_SIDES = (96, 64)  # of latents, of the SD 2.x that predict velocities, and of those that predict noise
VARIANT = "fp16"  # of weights that many checkpoints have alone
MARKER = "asdm.json"  # in a folder that this tool wrote: what it is, and that it may be replaced
KINDS_FROM_IMAGES = (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
KINDS = (StableDiffusionPipeline, StableDiffusionXLPipeline, LatentConsistencyModelPipeline, *KINDS_FROM_IMAGES)
MODEL_HELP = f"demo, a Hub id, a folder, a .safetensors file, or {' | '.join(f'random:{shape}' for shape in UNETS)}"


@checks.arguments(model=checks.path, dtype=checks.floating)
def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    prediction_type: PredictionType | None = None,
    config: str | Path | None = None,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline, or one for inpainting.

    Args:
        model: "demo" (the embedded default), a Hub id, a folder, a single `.safetensors` file, or "random:sd15" and so
            on (`UNETS`: randomly initialised, full size, for speed).
        device: where to put it; CPU by default.
        prediction_type: what its UNet predicts, "epsilon", "v_prediction" or "sample", whatever the checkpoint says.
        config: what its configuration is instead of what the checkpoint and files beside it say: a pipeline's folder or
            Hub id, a folder with a `scheduler_config.json`, or a file, `.json` (a scheduler's) or `.yaml` (of the
            original code).

    What a file predicts, and whether its schedule ends at zero SNR, is told by, the strongest first, a `.yaml` or
    `.json` of its name beside it, its marker tensors (`v_pred`, `ztsnr`), its metadata, a `scheduler_config.json` in
    its folder, and the number of steps of its training. Where none tells, or they contradict each other, an
    `AsdmWarning` says what was assumed.

    One for image-to-image, or for inpainting with a UNet that is not made for it, comes back as text-to-image. Weights
    that are there in the variant fp16 alone are taken.

    Raises:
        AsdmError: there is no such model or config, or it is damaged, a pickle, or not a Stable Diffusion pipeline; or
            its UNet has inputs that this package does not give it.
    """
    if device is not None:
        on_device(torch.empty(0), device)  # refused before anything is read
    name = str(model)
    given = None if prediction_type is None else as_prediction_type(prediction_type, "prediction_type")
    if name == "demo":
        from asdm.demo import pipeline_folder

        pipeline = _load_folder(pipeline_folder(), dtype)
    elif name.startswith("random:"):
        pipeline = _random_pipeline(name.removeprefix("random:"), dtype)
    elif os.path.isdir(name):
        pipeline = _load_folder(Path(name), dtype)
    elif os.path.isfile(name):
        pipeline, remarks = _load_single_file(Path(name), dtype, given, config)
    elif _looks_like_path(name):
        raise AsdmError(f"{name}: no such folder or file; MODEL is {MODEL_HELP}")
    else:
        pipeline = _load_from_hub(name, dtype)
    if not os.path.isfile(name):
        remarks = _parameterize(pipeline, name, given, config)
    if remarks:
        advice = "if that is wrong, give prediction_type or config (--prediction-type, --config)"
        warnings.warn(f"{name}: {'; '.join([*remarks, advice])}", AsdmWarning, stacklevel=2)
    if not isinstance(pipeline, KINDS) or not isinstance(pipeline.unet, UNet2DConditionModel):
        raise AsdmError(
            f"{name}: a {type(pipeline).__name__}; use SD 1.x, 2.x or SDXL, for text-to-image or inpainting"
        )
    if pipeline.text_encoder is None:
        raise AsdmError(f"{name}: has no first text encoder, as SDXL's refiner; use a base model")
    if pipeline.unet.config.sample_size is None:
        raise AsdmError(f"{name}: its UNet does not say for which size it is; write sample_size into unet/config.json")
    channels = pipeline.unet.config.in_channels
    if channels != pipeline.vae.config.latent_channels and not is_inpainting(pipeline):
        raise AsdmError(
            f"{name}: its UNet takes {channels} channels, as those for upscaling or edits do; use a checkpoint for "
            "text-to-image or inpainting"
        )
    require_known_inputs(pipeline.unet, name)
    if (pipeline.unet.config.addition_embed_type == "text_time") != is_sdxl(pipeline):
        raise AsdmError(
            f"{name}: a {type(pipeline).__name__} whose UNet has addition_embed_type "
            f"{pipeline.unet.config.addition_embed_type}; SDXL has text_time, SD 1.x and 2.x none; mend its configs"
        )
    if is_inpainting(pipeline) and "Inpaint" not in type(pipeline).__name__:
        pipeline = image_to_image(pipeline, with_mask=True)
    elif isinstance(pipeline, KINDS_FROM_IMAGES) and not is_inpainting(pipeline):
        pipeline = _text_to_image(pipeline)
    elif isinstance(pipeline, LatentConsistencyModelPipeline) and pipeline.unet.config.time_cond_proj_dim is None:
        pipeline = _text_to_image(pipeline)  # theirs embeds the guidance scale
    pipeline.register_to_config(_name_or_path=name)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            align_weights(part)
    return pipeline if device is None else on_device(pipeline, device)


def on_device(part: Any, device: str | torch.device) -> Any:
    """A pipeline or a network, moved there.

    Raises:
        AsdmError: there is no such device here.
    """
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        return part.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise AsdmError(f"device {device}: not to be had ({one_line(error)}); use cpu") from None


@checks.arguments(pipeline=checks.PIPELINE, folder=checks.path, about=checks.a(dict))
def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Save a pipeline, student or teacher, as a folder that `load_pipeline` and diffusers load.

    Written beside its place and renamed, so that an interrupted save leaves nothing that loads. A student's folder
    carries the code of its UNet, and loads without this package by
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

    Where there is one already, what else was put into it (a `clip` folder, a schedule) is kept.

    Raises:
        AsdmError: `folder` exists and is not a pipeline that this tool wrote, or a LoRA is loaded.
    """
    folder = Path(folder)
    require_ours(folder, "pipeline")
    _require_savable(pipeline)
    with replacing_folder(folder) as partial, quiet():
        _save_parts(pipeline, partial)
        _keep_others(folder, partial)
        card = model_card(pipeline, folder.name, (about or {}).get("teacher"))
        (partial / "README.md").write_text(card, "utf-8")
        (partial / MARKER).write_text(json.dumps({"kind": "pipeline", **(about or {})}, indent=1) + "\n", "utf-8")
    return folder


def save_pipeline_into(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Put a pipeline's parts into a folder of ours that holds other things too; what makes it load comes last."""
    _require_savable(pipeline)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary, quiet():
        _save_parts(pipeline, Path(temporary))
        (folder / "model_index.json").unlink(missing_ok=True)
        parts = sorted(Path(temporary).iterdir(), key=lambda path: path.name == "model_index.json")
        for part in parts:
            target = folder / part.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(part, target)


def _require_savable(pipeline: DiffusionPipeline) -> None:
    require_plain(pipeline.unet)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(getattr(pipeline, name, None), "peft_config", None):
            raise AsdmError(f"a LoRA is loaded in the {name}; keep it with fuse_lora(), then unload_lora_weights()")


def _save_parts(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save the parts so that tools on transformers 4, too, find every weight and the tokenizers' words."""
    pipeline.save_pretrained(folder)
    for weights in folder.glob("text_encoder/*.safetensors"):
        with safe_open(weights, "pt") as tensors:
            names = list(tensors.keys())
        if isinstance(pipeline.text_encoder, CLIPTextModel) and not any(map(OF_TEXT.match, names)):
            # Made by transformers 5; 4 takes such names for none of its own, and goes on without.
            renamed = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
            save_file(renamed, weights, {"format": "pt"})
    write_vocabularies(folder)


def _keep_others(folder: Path, partial: Path) -> None:
    """Copy what is in `folder`, and no part of the pipeline that was saved there."""
    try:
        parts = json.loads((folder / "model_index.json").read_text("utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        return
    for entry in folder.iterdir():
        if entry.name not in (*parts, "model_index.json") and not (partial / entry.name).exists():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, partial / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, partial / entry.name, follow_symlinks=False)


def write_vocabularies(folder: Path) -> None:
    """Beside each `tokenizer.json` in a pipeline's folder the two files that transformers 4 reads instead."""
    for path in folder.glob("tokenizer*/tokenizer.json"):
        words = json.loads(path.read_text("utf-8"))
        model = words["model"]
        if model.get("type") != "BPE":
            continue
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (path.parent / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
        (path.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
        added = {token["content"]: token["id"] for token in words["added_tokens"]}
        if added := {word: number for word, number in added.items() if word not in model["vocab"]}:
            (path.parent / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False), "utf-8")


def require_ours(folder: Path, kind: str) -> None:
    """Raise an AsdmError if `folder` exists, is not empty, and is not of this kind and written by this tool.

    Args:
        kind: as it stands in the folder's `MARKER`: pipeline, prepared, compression or export.
    """
    if folder.is_file():
        raise AsdmError(f"{folder}: a file; name a folder that does not exist yet")
    if folder.name in ("", ".."):  # it could not be replaced as a whole
        raise AsdmError(f"{folder}: name a folder in it, not itself")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise AsdmError(
            f"{folder}: exists and was not written by asdm (it has no {MARKER}); name another folder or remove it"
        )
    found = read_marker(folder).get("kind", kind)
    if found != kind:
        raise AsdmError(
            f"{folder}: holds what asdm calls {found}, and would be replaced by {kind}; name another folder or remove "
            "it"
        )


def read_marker(folder: Path) -> dict[str, Any]:
    """What a folder's `MARKER` says of it; nothing where there is none, or a damaged one."""
    try:
        about = json.loads((folder / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def image_to_image(pipeline: DiffusionPipeline, with_mask: bool = False) -> DiffusionPipeline:
    """The pipeline for image-to-image, or for inpainting, that shares this pipeline's parts.

    Not by `from_pipe`, which leaves out a component whose class is a subclass of the one expected.
    """
    if with_mask:
        kind = StableDiffusionXLInpaintPipeline if is_sdxl(pipeline) else StableDiffusionInpaintPipeline
    else:
        kind = StableDiffusionXLImg2ImgPipeline if is_sdxl(pipeline) else StableDiffusionImg2ImgPipeline
    other = kind(**pipeline.components, **_extra_arguments(pipeline))
    other.set_progress_bar_config(disable=True)
    return other


def _text_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    kind = StableDiffusionXLPipeline if is_sdxl(pipeline) else StableDiffusionPipeline
    arguments = _extra_arguments(pipeline)
    arguments.pop("requires_aesthetics_score", None)  # of the refiner's
    return kind(**pipeline.components, **arguments)


@checks.arguments(pipeline=checks.PIPELINE, unet=checks.a(nn.Module))
def with_unet(pipeline: DiffusionPipeline, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """A second pipeline that shares everything with `pipeline` but the UNet."""
    parts = {**pipeline.components, "unet": unet}
    other = type(pipeline)(**parts, **_extra_arguments(pipeline))
    other.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
    other.set_progress_bar_config(disable=True)
    return other


def without_safety_checker(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline, or where it has a safety checker a second one without: the black images that it gives out instead
    of those that it suspects must not be judged as drawn ones."""
    if getattr(pipeline, "safety_checker", None) is None:
        return pipeline
    other = with_unet(pipeline, pipeline.unet)
    other.register_modules(safety_checker=None)
    other.register_to_config(requires_safety_checker=False)
    return other


def load_clip(pipeline: DiffusionPipeline) -> CLIPModel | None:
    """The CLIPModel saved beside a pipeline (folder `clip`), where there is one."""
    from asdm.demo import pipeline_folder

    name = str(pipeline.config.get("_name_or_path"))
    folder = (pipeline_folder() if name == "demo" else Path(name)) / "clip"
    if not folder.is_dir():
        return None
    with quiet():
        return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


def clip_statistics(clip: CLIPModel) -> tuple[list[float], list[float]]:
    """Mean and deviation by which a CLIP that was loaded from a folder wants pixels in [0, 1] to be normalised."""
    about: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):  # of transformers 4, and of 5
        path = Path(clip.name_or_path) / name
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            about |= found.get("image_processor", found)
    return about.get("image_mean", [0.5] * 3), about.get("image_std", [0.5] * 3)


def is_sdxl(pipeline: DiffusionPipeline) -> bool:
    return hasattr(pipeline, "text_encoder_2")


def is_random(pipeline: DiffusionPipeline) -> bool:
    """Whether its weights are random: good for speed and memory alone."""
    return str(pipeline.config.get("_name_or_path")).startswith("random:")


def is_inpainting(pipeline: DiffusionPipeline) -> bool:
    """Whether the UNet also reads a mask and the latents of a masked image."""
    return pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels + 1


def _extra_arguments(pipeline: DiffusionPipeline) -> dict[str, Any]:
    allowed = ("requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score")
    return {name: pipeline.config[name] for name in allowed if name in pipeline.config}


def _load_folder(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    index = folder / "model_index.json"
    if not index.is_file():
        raise AsdmError(f"{folder}: not a pipeline folder (no model_index.json); MODEL is {MODEL_HELP}")
    if not (folder / "unet" / "config.json").is_file():
        raise AsdmError(f"{folder}: a pipeline folder without a UNet (no unet/config.json)")
    _require_parts(folder)
    for path in sorted(folder.glob("*/*.safetensors")):
        require_safetensors(path)
        require_weights(path)
    require_shards(folder)
    if not any((folder / "unet").glob("*.safetensors")):
        raise AsdmError(f"{folder / 'unet'}: no .safetensors weights; pickles are not loaded, convert them first")
    return _from_pretrained(str(folder), dtype)


def _require_parts(folder: Path) -> None:
    """Raise an AsdmError where a part that a pipeline's index names has no folder."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
    except ValueError as error:
        raise AsdmError(f"{folder / 'model_index.json'}: damaged ({one_line(error)}); download it again") from None
    for part, kind in index.items() if isinstance(index, dict) else ():
        named = isinstance(kind, list) and len(kind) == 2 and None not in kind
        if named and not (folder / part).is_dir():
            raise AsdmError(f"{folder}: lacks its {part}, which model_index.json names ({kind[1]}); download it again")


def _load_from_hub(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    try:
        with quiet():
            try:
                folder = DiffusionPipeline.download(name, use_safetensors=True)
            except OSError:  # also where the weights are there in this variant alone
                folder = DiffusionPipeline.download(name, use_safetensors=True, variant=VARIANT)
        return _from_pretrained(str(folder), dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, AsdmError):
            raise
        raise AsdmError(f"{name}: not found, here or on the Hub ({one_line(error)}); MODEL is {MODEL_HELP}") from error


def _from_pretrained(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    how = {"dtype": dtype, "use_safetensors": True}
    with quiet():
        try:
            parts = DiffusionPipeline.load_config(name)
            variant = VARIANT if any(_has_variant_alone(Path(name) / part) for part in parts) else None
            if not _is_student(Path(name) / "unet" / "config.json"):
                pipeline = DiffusionPipeline.from_pretrained(name, **how, variant=variant)
                _require_whole(pipeline, Path(name))
                return pipeline
            # By the class of this package: code that lies in a model's folder is never run.
            folder = Path(name) / "unet"
            own = VARIANT if _has_variant_alone(folder) else None
            unet = AsdmUNet2DConditionModel.from_pretrained(folder, **how, variant=own)
            pipeline = DiffusionPipeline.from_pretrained(name, **how, variant=variant, unet=None)
            pipeline = with_unet(pipeline, unet)
            _require_whole(pipeline, Path(name))
            return pipeline
        except (SafetensorError, RuntimeError, KeyError, OSError, ValueError, AttributeError, TypeError) as error:
            if isinstance(error, AsdmError) or (isinstance(error, OSError | ValueError) and not Path(name).is_dir()):
                raise
            explain_folder(Path(name))
            raise AsdmError(f"{name}: cannot be loaded: {one_line(error)}") from error


def _require_whole(pipeline: DiffusionPipeline, place: Path) -> None:
    """Raise an AsdmError where a tensor was not there to be loaded from this folder or file."""
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            require_loaded(module, str(place), part, sorted((place / part).glob("*.safetensors")))
    if isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
        files = [place] if place.is_file() else sorted((place / "unet").glob("*.safetensors"))
        require_all_read(pipeline.unet, str(place), files)


def _parameterize(
    pipeline: DiffusionPipeline, name: str, given: PredictionType | None, config: str | Path | None
) -> list[str]:
    """Let a pipeline that was not loaded from one file sample as was said: by the user, or by its own config where the
    scheduler's class, or that config's age, let it be passed over. Returns remarks for the user."""
    own = claim_of_scheduler(pipeline.scheduler)
    claims = [own if config is None else claim_of(config)]
    if config is None and own.prediction_type is None:
        headers = [Header.of(path) for path in sorted((Path(name) / "unet").glob("*.safetensors"))]
        claims += [claim for header in headers for claim in claims_of_tensors(header)]
    said = settled(claims, given, name)
    passed_over = bool(said.zero_snr) and not takes_zero_snr(type(pipeline.scheduler))
    passed_over |= own.prediction_type is None and said.prediction_type is not None
    if given is None and config is None and not passed_over:
        return []
    with quiet():
        pipeline.scheduler = scheduler_for(pipeline.scheduler, said)
    return said.remarks


def _has_variant_alone(folder: Path) -> bool:
    names = [path.name for path in folder.glob("*.safetensors")]
    return bool(names) and all(f".{VARIANT}" in name for name in names)


def _is_student(config: Path) -> bool:
    try:
        return json.loads(config.read_text("utf-8")).get("_class_name") == AsdmUNet2DConditionModel.__name__
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return False  # what is wrong with it is told by who loads it


def _load_single_file(
    path: Path, dtype: torch.dtype, given: PredictionType | None, config: str | Path | None
) -> tuple[DiffusionPipeline, list[str]]:
    if path.suffix in PICKLE_SUFFIXES:
        raise AsdmError(f"{path}: a pickle, which can run code when loaded; convert it to .safetensors first")
    require_safetensors(path)
    require_weights(path)
    header = Header.of(path)
    kind = _sd_kind(header)
    claims = claims_of(header, kind) if config is None else [claim_of(config), *claims_of_tensors(header)]
    said = settled(claims, given, str(path))
    pipeline = _from_single_file(header, kind, dtype, config)
    _require_whole(pipeline, path)
    return pipeline, _parameterize_single_file(pipeline, header, kind, said)


def _sd_kind(header: Header) -> str:
    kind = kind_of(header)
    if kind in SD_KINDS and not any(name.startswith(LDM_UNET_KEY) for name in header.tensors):
        raise AsdmError(
            f"{header.path}: not a whole Stable Diffusion checkpoint: no tensor's name begins with {LDM_UNET_KEY}, as "
            "those of its UNet do"
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
        with quiet():
            return made.from_single_file(str(header.path), dtype=dtype, config=about)
    except (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError) as error:
        with suppress(OSError):  # the configuration is out of reach
            explain_single_file(header, about, kind)
        raise AsdmError(
            f"{header.path}: not a whole Stable Diffusion checkpoint, or its configuration, which diffusers takes from "
            f"the Hub, is out of reach ({one_line(error)})"
        ) from error


def _parameterize_single_file(
    pipeline: DiffusionPipeline, header: Header, kind: str, said: Parameterization
) -> list[str]:
    """Let a pipeline from one file sample as is said, or else by default of its architecture. Returns remarks."""
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


def require_safetensors(path: Path) -> None:
    """Raise an AsdmError unless `path` is a whole safetensors file."""
    try:
        with safe_open(path, "pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        pickled = start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        why = "a pickle named .safetensors" if pickled else f"truncated or damaged ({one_line(error)})"
        raise AsdmError(f"{path}: not a safetensors file: {why}; download or convert it again") from None


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") != 1
        or Path(name).suffix in (".safetensors", *PICKLE_SUFFIXES)
    )


def _random_pipeline(shape: str, dtype: torch.dtype) -> DiffusionPipeline:
    if shape not in UNETS:
        raise AsdmError(f"random:{shape}: no such shape; allowed: {', '.join(f'random:{s}' for s in UNETS)}")
    return random_pipeline(shape, dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from the libraries while a pipeline is loaded or saved."""
    level = diffusers_logging.get_verbosity()
    with_bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    diffusers_logging.set_verbosity_error()
    for log in with_bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
        for log in with_bars:
            log.enable_progress_bar()
