"""Models of transformers beside a pipeline: its CLIP, networks of metrics, encoders of semantics. Strangers may have
written their folders too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModel

from asdm.errors import AsdmError
from asdm.pipelines.damaged import refuse_damaged, require_finite, require_readable
from asdm.pipelines.quiet import quiet
from asdm.pipelines.untrusted import bounded_modules, require_as_large_as_its_files, require_safe_config

_NAMED = 3  # tensors that a message names


def load_transformers_model(
    kind: Any, name: str | Path, remedy: str = "download it again", *, whole: bool = True
) -> Any:
    """Load a model of transformers in float32, to infer with.

    Args:
        kind: its class, or AutoModel for the one that its config names.
        name: a folder, or a Hub id.
        remedy: what to do if it cannot be loaded, for the message.
        whole: refuse one that lacks a tensor; some models of images have no weights for a pooling layer.

    Raises:
        AsdmError: there is none, it is damaged, a pickle, or another kind's, lacks a tensor, or asks for others' code.
    """
    folder = Path(name)
    if folder.is_dir():
        require_safe_config(folder / "config.json")
        require_readable(folder)
    with refuse_damaged(name, remedy), quiet(), bounded_modules(str(name)):
        if folder.is_dir():
            _require_as_large(kind, folder)
        model, found = kind.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    absent = sorted(found["missing_keys"]) if whole else []  # which transformers draws at random
    if absent:
        some = ", ".join(absent[:_NAMED])
        raise AsdmError(f"{name}: lacks {len(absent)} of its tensors, among them {some}; {remedy}")
    require_finite(model, name, remedy)
    return model.eval()


def _require_as_large(kind: Any, folder: Path) -> None:
    """Raise an AsdmError where the model would have many more parameters than its files hold."""
    with init_empty_weights(include_buffers=True):
        if kind is AutoModel:
            empty = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        else:
            empty = kind(kind.config_class.from_pretrained(folder))
    require_as_large_as_its_files(empty, folder)
