"""A generated image, and what its PNG file says of how it was made."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of
from asdm.files import replacing_file
from asdm.generation.request import GenerationRequest
from asdm.generation.schedulers import scheduler_label
from asdm.pipelines.decoders import is_tiny
from asdm.reading import parse_json
from asdm.version import __version__

JSON_CHUNK, A1111_CHUNK = "asdm", "parameters"
_PACKAGES = ("diffusers", "transformers", "torch")


@dataclass(frozen=True)
class GeneratedImage:
    """One image, and how it was made.

    `seconds` is the time that it took, of a batch its share. `about` is what the PNG's JSON chunk holds.
    """

    image: Image.Image
    prompt: str
    seed: int
    seconds: float
    about: Mapping[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write a PNG with two text chunks: `parameters`, in A1111's format, and `asdm`, JSON."""
        with replacing_file(Path(path)) as partial:
            self.write(partial)
        return Path(path)

    def write(self, path: Path) -> None:
        """Write the PNG to a temporary name."""
        info = PngInfo()
        info.add_text(A1111_CHUNK, a1111_parameters(self.about))
        info.add_text(JSON_CHUNK, json.dumps(self.about, ensure_ascii=False))
        self.image.save(path, format="PNG", pnginfo=info)


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a PNG so that a reader sees a whole file or none."""
    with replacing_file(path) as partial:
        image.save(partial, format="PNG")
    return path


def read_about(path: str | Path) -> dict[str, Any]:
    """Read the JSON chunk of a PNG that `GeneratedImage.save` wrote.

    Raises:
        AsdmError: the file is no PNG, or has no such chunk.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            found: dict[str, Any] = parse_json(image.info[JSON_CHUNK])
            if not isinstance(found, dict):
                raise TypeError("no object")
    except Exception as error:  # of Pillow's reader, many kinds
        raise AsdmError(f"{path}: not a PNG that asdm generated ({type(error).__name__})") from None
    return found


def description(pipeline: DiffusionPipeline, request: GenerationRequest) -> dict[str, Any]:
    """Return what all images of a request have in common, for the JSON chunk; without what was not used.

    Args:
        pipeline: with the request's scheduler.
        request: with its steps and guidance scale.
    """
    scheduler = pipeline.scheduler
    own = inspect.signature(type(scheduler).__init__).parameters
    config = {name: value for name, value in scheduler.config.items() if name in own and _is_json(value)}
    about = {
        "negative": request.negative,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": {"class": type(scheduler).__name__, "label": scheduler_label(scheduler), "config": config},
        "decoder": (_name_of(pipeline.vae) or type(pipeline.vae).__name__) if is_tiny(pipeline.vae) else None,
        "strength": None if request.image is None else request.image_strength,
        "masked": None if request.mask is None else True,
        "cfg_cutoff": None if request.cfg_cutoff == 1 else request.cfg_cutoff,
        "clip_skip": request.clip_skip,
        "weighted": request.weighted or None,
        "cache": request.cache_speedup or (request.cache_schedule and request.cache_schedule.name),
        "loras": [{"name": lora.path.stem, "scale": lora.scale} for lora in request.loras],
        "controlnet": request.controlnet
        and {
            "name": shared_name(str(request.controlnet)),
            "scale": 1.0 if request.control_scale is None else request.control_scale,
        },
        "model": _name_of(pipeline),
        **_architecture(denoiser_of(pipeline)),
        "versions": {"asdm": __version__, **{name: version(name) for name in _PACKAGES}},
    }
    return {name: value for name, value in about.items() if value not in (None, "", [])}


def _architecture(denoiser: Any) -> dict[str, Any]:
    """Return the plan by which a denoiser was pruned, as plan files have it; of a stock model a plan without edits.

    Of several denoisers, that of the first; and below which time step each other one takes over.
    """
    switched = getattr(denoiser, "denoisers", None)
    if switched is not None:
        return {**_architecture(switched[0]), "switched_below": list(denoiser.boundaries)}
    family = family_of(denoiser)
    original = denoiser.original() if hasattr(denoiser, "original") else denoiser
    base = {"class": family.model_class.__name__, "fingerprint": family.fingerprint(original)}
    return {"plan": {"base": base, "edits": [dict(edit) for edit in denoiser.config.get("edits") or ()]}}


def _is_json(value: Any) -> bool:
    """Return whether JSON has the value: it has no infinite numbers."""
    return not isinstance(value, float) or math.isfinite(value)


def _name_of(loaded: Any) -> str | None:
    """Return what a pipeline or a model was loaded from; None for one that was made here."""
    name = loaded.config.get("_name_or_path")
    return shared_name(name) if name else None


def shared_name(name: str) -> str:
    """Return a model's name for others: of a folder or file on this machine the last part, not the way there."""
    return Path(name).name if os.path.isabs(name) or Path(name).exists() else name


def a1111_parameters(about: Mapping[str, Any]) -> str:
    """Return the text chunk `parameters` as A1111 writes it, which ComfyUI and others read."""
    loras = "".join(f" <lora:{lora['name']}:{lora['scale']:g}>" for lora in about.get("loras", ()))
    lines = [about["prompt"] + loras]
    if about.get("negative"):
        lines.append(f"Negative prompt: {about['negative']}")
    fields = {
        "Steps": about["steps"],
        "Sampler": about["scheduler"]["label"],
        "CFG scale": f"{about['guidance_scale']:g}",
        "Seed": about["seed"],
        "Size": f"{about['width']}x{about['height']}",
        "Model": about.get("model"),
        "VAE": about.get("decoder"),
        "Denoising strength": about.get("strength"),
        "Clip skip": about["clip_skip"] + 1 if "clip_skip" in about else None,  # A1111 counts from 1, which skips none
        "ControlNet": about["controlnet"]["name"] if "controlnet" in about else None,
        "Version": f"asdm {about['versions']['asdm']}",
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """Quote a value that has a separator in it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
