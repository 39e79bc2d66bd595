"""Save a pipeline, teacher or student, as a folder that diffusers and older tools load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from asdm import checks
from asdm.errors import AsdmError
from asdm.families import denoiser_of, require_plain
from asdm.files import MARKER, replacing_folder, require_ours, write_text
from asdm.pipelines.model_card import model_card
from asdm.pipelines.quiet import quiet
from asdm.pipelines.tensor_faults import OF_TEXT
from asdm.reading import read_json


@checks.arguments(pipeline=checks.PIPELINE, folder=checks.path, about=checks.a(dict))
def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Save a pipeline, student or teacher, as a folder that `load_pipeline` and diffusers load.

    The folder is written beside its place and renamed, so that an interrupted save leaves nothing that loads. A
    student's folder carries the code of its UNet, and loads without this package by
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

    An earlier save of this tool is replaced. What else was put into its folder (a `clip` folder, a schedule) stays.

    Args:
        about: goes into the folder's marker; its `teacher` is named in the model card.

    Raises:
        AsdmError: `folder` exists and is not a pipeline that this tool wrote, a LoRA or an IP-Adapter is loaded, or a
            part cannot be saved, such as an OpenVINO graph.
    """
    folder = Path(folder)
    require_ours(folder, "pipeline")
    require_savable(pipeline)
    with replacing_folder(folder, keep=lambda partial: _keep_others(folder, partial)) as partial, quiet():
        _save_parts(pipeline, partial)
        card = model_card(pipeline, folder.name, (about or {}).get("teacher"))
        write_text(partial / "README.md", card)
        (partial / MARKER).write_text(json.dumps({"kind": "pipeline", **(about or {})}, indent=1) + "\n", "utf-8")
    return folder


def save_pipeline_into(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline's parts into a folder of this tool that holds other things too; what makes it load comes last."""
    require_savable(pipeline)
    saved = folder / ".saved"
    try:
        with replacing_folder(saved) as partial, quiet():
            _save_parts(pipeline, partial)
        (folder / "model_index.json").unlink(missing_ok=True)
        for part in sorted(saved.iterdir(), key=lambda path: path.name == "model_index.json"):
            target = folder / part.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(part, target)
    finally:
        shutil.rmtree(saved, ignore_errors=True)


def require_savable(pipeline: DiffusionPipeline) -> None:
    """Raise an AsdmError where a part of a pipeline cannot be saved, or would not load again."""
    for name, part in pipeline.components.items():
        if part is not None and not hasattr(part, "save_pretrained"):  # diffusers would leave it out
            raise AsdmError(
                f"the {name} is a {type(part).__name__}, which cannot be saved; save the pipeline that it was made of"
            )
        if name.startswith("text_encoder") and getattr(part, "peft_config", None):
            raise AsdmError(f"a LoRA is loaded in the {name}; keep it with fuse_lora(), then unload_lora_weights()")
    require_plain(denoiser_of(pipeline))


def _save_parts(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save the parts so that tools on transformers 4 also find every weight and the tokenizers' words."""
    pipeline.save_pretrained(folder)
    for weights in folder.glob("text_encoder/*.safetensors"):
        with safe_open(weights, "pt") as tensors:
            names = list(tensors.keys())
        if isinstance(pipeline.text_encoder, CLIPTextModel) and not any(map(OF_TEXT.match, names)):
            # transformers 5 made these names; 4 does not know them, and goes on with random weights.
            renamed = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
            save_file(renamed, weights, {"format": "pt"})
    write_vocabularies(folder)


def _keep_others(folder: Path, partial: Path) -> None:
    """Copy what is in `folder` and is no part of the pipeline that was saved there."""
    try:
        parts = read_json(folder / "model_index.json").keys()
    except (OSError, ValueError, AttributeError):
        return
    for entry in folder.iterdir():
        if entry.name not in (*parts, "model_index.json") and not (partial / entry.name).exists():
            if entry.is_dir() and not entry.is_symlink():
                shutil.copytree(entry, partial / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, partial / entry.name, follow_symlinks=False)


def write_vocabularies(folder: Path) -> None:
    """Write beside each `tokenizer.json` in a pipeline's folder the files that transformers 4 reads instead."""
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
