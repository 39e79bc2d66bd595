"""What all students' model classes have in common: a config that holds the edits, and strict loading.

A model is built stock, edited, then loaded. This file knows no architecture.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import ModelMixin
from diffusers.models.model_loading_utils import load_state_dict
from torch import Tensor, nn

from asdm.edits.base import EDIT_KINDS, Edit, UnitEdit, apply_edits, parse_edits
from asdm.edits.projections import Projection, reshape_saved
from asdm.errors import AsdmError, one_line
from asdm.families.base import Architecture
from asdm.families.tensors import FUSED_PROJECTIONS, require_plain
from asdm.student.standalone import module_source

_DISGUISE = "asdm."
_ALIGNMENT = 64  # bytes, of torch's allocator on CPUs
StudentClass = TypeVar("StudentClass", bound=type[Any])
STUDENT_CLASSES: list[type[Any]] = []


class EditedModel:
    """A mixin before a stock model class: the stock model with a list of edits applied.

    A subclass calls `apply_edits` in its constructor. Its name is the stock class's with "Asdm" before it.
    """

    architecture: ClassVar[Architecture]
    module_name: ClassVar[str]  # of the file beside the weights, without ".py"
    home: ClassVar[str]  # the module that defines the class
    # On disk the values of these fields carry a prefix: the stock class would otherwise accept the folder, ignore the
    # edits and fill the missing weights at random; so it stops with "asdm.CrossAttnDownBlock2D does not exist".
    disguised_fields: ClassVar[tuple[str, ...]]

    @property
    def _no_split_modules(self) -> list[str] | None:
        """Return those of the stock class, by which diffusers spreads a model over devices, and those of all kinds of
        edits; None where the stock class has none and is not spread."""
        stock = self.architecture.model_class._no_split_modules
        if stock is None:
            return None
        return [*stock, *(name for kind in EDIT_KINDS.values() for name in kind.no_split_modules)]

    def apply_edits(self, edits: Sequence[Any]) -> None:
        """Apply edits to the stock model and write them to the config."""
        records = [edit for edit in parse_edits(edits) if isinstance(edit, UnitEdit)]
        model: Any = self
        apply_edits(model, records, self.architecture)
        model.register_to_config(edits=[record.to_dict() for record in records])

    def original(self) -> Any:
        """Return the model without the edits and without weights (on the meta device)."""
        config: Any = self.config  # type: ignore[attr-defined]
        with torch.device("meta"):
            return self.architecture.model_class.from_config({key: config[key] for key in config if key != "edits"})

    @wraps(ModelMixin.save_pretrained)  # by the signature, a pipeline knows that a variant can be saved
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        # Beside the weights, and before they are uploaded, the module file that loads them without asdm. Tensors of
        # adapters and of fused projections would not load: the former are refused, the latter, which are copies, left
        # out.
        require_plain(self)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.module_name}.py").write_text(module_source(self.home), "utf-8")
        model: Any = self
        hook = model.register_state_dict_post_hook(_leave_out_fused)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """As the stock class, without the prefix: `from_config` reads a dict or a path, and both come here."""
        plain = {key: _plain(value) if key in cls.disguised_fields else value for key, value in config_dict.items()}
        parent: Any = super()
        return parent.extract_init_dict(plain, **kwargs)

    def to_json_string(self) -> str:
        parent: Any = super()
        config = json.loads(parent.to_json_string())
        config |= {key: _disguised(config[key]) for key in self.disguised_fields if key in config}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _load_pretrained_model(
        cls,
        model: nn.Module,
        state_dict: dict[str, Tensor] | None,
        resolved_model_file: list[Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the stock class, from folders of version 0.1, too (`reshape_saved`)."""
        projections = {name: module for name, module in model.named_modules() if isinstance(module, Projection)}
        if projections and state_dict is None:
            resolved_model_file = [load_state_dict(file) for file in resolved_model_file]
        for tensors in resolved_model_file if state_dict is None else [state_dict]:
            if isinstance(tensors, dict):
                reshape_saved(projections, tensors)
        parent: Any = super()
        return parent._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `ModelMixin.from_pretrained`, but strict; and weights are aligned in memory (`align_weights`), so that
        what was saved and loaded computes the same bits.

        Raises:
            AsdmError: a tensor is missing, extra or misshapen; its name is in the message.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        parent: Any = super()
        try:
            model, info = parent.from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, AsdmError):
                raise
            raise AsdmError(f"{pretrained_model_name_or_path}: {one_line(error, 300)}") from error
        for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[fault]:
                names = sorted(str(name) for name in info[fault])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise AsdmError(
                    f"{pretrained_model_name_or_path}: {fault.replace('_keys', '')} tensors for the edits in its "
                    f"config: {', '.join(names[:3])}{more}; save the student again"
                )
        align_weights(model)
        return (model, info) if wants_info else model


def register_student(kind: StudentClass) -> StudentClass:
    """Make a class known as that of its architecture's students (a class decorator)."""
    STUDENT_CLASSES.append(kind)
    return kind


def _leave_out_fused(_: Any, state_dict: dict[str, Tensor], *__: Any) -> None:
    """Remove the tensors of fused projections, which a model that is built for loading does not have."""
    for name in [name for name in state_dict if any(fused in name for fused in FUSED_PROJECTIONS)]:
        del state_dict[name]


def all_edits_of(model: Any) -> list[Edit]:
    """Return all edits by which a model was made, those that made it a smaller stock model first."""
    recorded = _recorded_edits(model.config)
    return [*recorded, *edits_of(model)]


def _recorded_edits(config: Any) -> list[Edit]:
    earlier = config.get("_original") or {}
    return [*(_recorded_edits(earlier) if earlier else []), *parse_edits(config.get("_edits") or [])]


def signature_with_edits(stock: type[Any]) -> inspect.Signature:
    """Return the signature of a stock class's constructor with `edits` behind, by which diffusers reads a config."""
    stock_parameters = inspect.signature(stock.__init__).parameters.values()
    edits = inspect.Parameter("edits", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=())
    return inspect.Signature([*stock_parameters, edits])


def align_weights(network: nn.Module) -> None:
    """Copy weights that are not aligned in a mapped file: the rounding of some CPUs depends on the address."""
    for parameter in network.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _disguised(value: Any) -> Any:
    return f"{_DISGUISE}{value}" if isinstance(value, str) else [_disguised(each) for each in value]


def _plain(value: Any) -> Any:
    return value.removeprefix(_DISGUISE) if isinstance(value, str) else [_plain(each) for each in value]


def edits_of(model: Any) -> list[UnitEdit]:
    """Return the edits already applied to a model; none for a stock one.

    Raises:
        AsdmError: a student's class that was loaded from its folder, whose modules this package does not know.
    """
    if type(model).__name__.startswith("Asdm") and not isinstance(model, EditedModel):
        raise AsdmError("a student that was loaded by the code in its folder; load it by asdm.load_pipeline")
    return [edit for edit in parse_edits(model.config.get("edits") or []) if isinstance(edit, UnitEdit)]
