"""What every package may ask about a denoiser's architecture: one subclass of `ModelFamily` for each family of models.

Nothing outside `families/` and the student's model classes names a block, a layer or a class of an architecture.
"""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from asdm.choices import CompensationKind, Program
from asdm.edits.base import Edit
from asdm.errors import AsdmError
from asdm.families.records import (
    BlockIO,
    BlockPlace,
    Branch,
    CacheCut,
    OriginalLayout,
    PortableShape,
    Preset,
    Unit,
    UnitLike,
)
from asdm.families.tensors import fingerprint

Denoiser: TypeAlias = ModelMixin
GenerationInput = Literal["image", "mask", "lora", "controlnet", "clip_skip", "weighted"]


class Architecture(ABC):
    """The structure of a family's models, and how edits change it: all that a saved student needs to be built.

    Instances have no state.
    """

    component: ClassVar[str]  # the pipeline's attribute that holds the denoiser: "unet", "transformer"
    model_class: ClassVar[type[Any]]  # the stock class
    sample_argument: ClassVar[str] = "sample"  # of the denoiser's forward: the noisy latents

    # -- structure -------------------------------------------------------------------------------------

    @abstractmethod
    def blocks(self, model: Denoiser) -> list[str]:
        """Return paths of the blocks, in order of execution."""

    @abstractmethod
    def layers(self, model: Denoiser) -> list[str]:
        """Return paths of the layers that units belong to, in order of execution."""

    @abstractmethod
    def units(self, model: Denoiser) -> list[Unit]:
        """Return all removable units in order of execution, one that contains others before them."""

    @abstractmethod
    def execution_order(self, model: Denoiser) -> list[str]:
        """Return paths of modules whose outputs can be cached and replayed, in order of execution."""

    @abstractmethod
    def branch(self, model: Denoiser, unit: str) -> Branch:
        """Return how the output of a unit splits into what is kept and its branch."""

    @abstractmethod
    def removals(self, model: Denoiser) -> list[str]:
        """Return what can be removed beside units: whole parts of the model, as `Remove.unit` names them."""

    @abstractmethod
    def is_covered_by(self, name: str, removed: Collection[str]) -> bool:
        """Return whether a unit goes when `removed` does: by itself, with what contains it, or with what it is
        coupled to."""

    def coupled_blocks(self, model: Denoiser, removed: Collection[str]) -> list[list[str]]:
        """Return the groups of blocks that removals change together, so that none of them works without the others."""
        return []

    def has_blocks_of(self, student: Denoiser, teacher: Denoiser) -> bool:
        """Return whether each of the student's blocks can be replaced by the teacher's of the same name."""
        return self.blocks(student) == self.blocks(teacher)

    # -- edits -----------------------------------------------------------------------------------------

    @abstractmethod
    def removed(
        self, model: Denoiser, unit: str, compensate: CompensationKind, compensate_time: bool
    ) -> dict[str, nn.Module]:
        """Return the modules that take a removed unit's place, by their paths; change nothing.

        Raises:
            AsdmError: it cannot be removed, or not be compensated so.
        """

    @abstractmethod
    def projection_channels(self, model: Denoiser, unit: str) -> int:
        """Return the channels of the projection that can take the place of a removal; 0 where none can."""

    def conv_channels(self, model: Denoiser) -> dict[str, tuple[int, int]]:
        """Return the input channels of each convolution that can get expert kernels: of hidden states, and of the skip
        connection behind them."""
        return {}

    def prompt_channels(self, model: Denoiser, name: str) -> int:
        """Return the channels of the prompt's hidden states that the block around a module reads; 0 where it reads
        none."""
        return 0

    def stock_config(self, model: Denoiser, edits: Sequence[Edit]) -> dict[str, Any] | None:
        """Return the config of a stock model that equals the edited one; None where there is none."""
        return None

    def shorter_config(self, model: Denoiser, edit: Any) -> dict[str, Any]:
        """Return the config of the stock model without the layers that an edit `drop_layers` drops.

        Raises:
            AsdmError: the model does not allow the edit.
        """
        raise AsdmError(f"drop_layers: is not for a {type(model).__name__}; remove its units or blocks")

    def fitted_removals(self, model: Denoiser, edit: Any) -> tuple[Any, list[list[str]]]:
        """Return the edit `drop_layers` without what projections can be fitted for, and that: runs of units behind each
        other, by their names in the original `model`."""
        return edit, []

    def dropped_layers(self, edit: Any, units: Sequence[str]) -> list[str]:
        """Return the units that an edit `drop_layers` drops, given the names of all."""
        return []

    def teacher_key(self, name: str, student: Denoiser, teacher: Denoiser) -> str:
        """Return the teacher's name of a student's block, module or tensor."""
        return name

    def made_from(self, model: Denoiser) -> Any:
        """Return the model that a student was made of, without weights (on the meta device); None for an original, or
        for a smaller stock model whose config does not say it."""
        config: Any = model.config  # type: ignore[attr-defined]
        if not config.get("edits"):
            return None
        with torch.device("meta"):
            return self.model_class.from_config({key: value for key, value in config.items() if key != "edits"})

    def no_such_unit(self, model: Denoiser, name: str) -> AsdmError:
        """Return the error for a name that no unit has; it names the nearest one."""
        known = [unit.name for unit in self.units(model)]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        return AsdmError(
            f"{name}: no such unit in this model; "
            f"the nearest is {near[0] if near else 'none'} (`asdm analyze` lists them)"
        )


class ModelFamily(Architecture):
    """All that is known of a family's models: their structure, how they are called, and where features are cached."""

    label: ClassVar[str] = "denoiser"  # what reports call the denoiser
    tags: ClassVar[tuple[str, ...]] = ()  # of a model card for the Hub
    guidance_scale: ClassVar[float] = 7.5  # the usual one
    layer_classes: ClassVar[tuple[type[Any], ...]] = ()  # whose weights FSDP gathers together
    presets: ClassVar[tuple[str, ...]] = ()  # names of the family's published plans
    takes: ClassVar[frozenset[GenerationInput]] = frozenset()  # what its pipelines generate with, beside prompts

    def preset(self, name: str, units: Sequence[UnitLike]) -> Preset:
        """Return what a preset changes in a model with these units.

        Raises:
            AsdmError: the family has no such preset.
        """
        raise AsdmError(f"{name}: a preset for another family of models; give a budget instead")

    def fold_projections(self, model: Denoiser, within_blocks: bool) -> dict[str, CompensationKind]:
        """Fold in place every projection that folds into other weights; the model's output changes by rounding alone.

        Args:
            within_blocks: so does each block's output.

        Returns:
            The kinds of projections that are then left, for units where that changes: "none" where nothing is left.
        """
        return {}

    def projection_folds(self, model: Denoiser, unit: str) -> bool:
        """Return whether a linear projection in a unit's place folds, whatever else is removed."""
        return False

    def portable_shapes(self, config: Mapping[str, Any], units: Sequence[str]) -> list[PortableShape]:
        """Return the smaller stock models that every program reads, for a model of this config with these units.

        Raises:
            AsdmError: there is none.
        """
        raise AsdmError(f"portable: no shape of a smaller {self.label} is known to programs; plan without --portable")

    def semantic_module(self, model: Denoiser) -> str | None:
        """Path of the module whose output says what an image means; None where there is none."""
        return None

    def block_io(self, model: Denoiser, path: str) -> BlockIO:
        """Return where image and text states sit among the outputs of a block or layer."""
        return BlockIO()

    def block_places(self, blocks: Sequence[str]) -> dict[str, BlockPlace]:
        """Return where a diagram has each of these blocks: by default in one column, in their order."""
        return {block: BlockPlace(level, "middle") for level, block in enumerate(blocks)}

    def original_layout(self, model: Denoiser, program: Program | None) -> OriginalLayout:
        """Return the names of a model's tensors in the original code's layout, for a program that reads it; for None
        whether one does or not.

        Raises:
            AsdmError: the layout has no place for an edit of the model, or the program does not read its shape.
        """
        raise AsdmError(f"{type(model).__name__}: the original layout is for UNets; save it as a pipeline's folder")

    # -- calls -----------------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: list[str], side: int) -> dict[str, Tensor]:
        """Embed prompts with the pipeline's text encoders, for images of `side` pixels a side: fields of
        `asdm.diffusion.conditioning.Conditioning`."""

    @abstractmethod
    def conditioned_call(self, model: Denoiser, latents: Tensor, **conditioning: Tensor) -> dict[str, Any]:
        """Keyword arguments of a call on noisy latents, but for the time step; `conditioning` are the fields of
        `asdm.diffusion.conditioning.Conditioning` that are set."""

    def prediction(self, model: Denoiser, output: Tensor) -> Tensor:
        """Return the prediction (batch, channels, height, width) in what the denoiser puts out."""
        return output

    def predicted_channels(self, model: Denoiser) -> int:
        """Return how many channels a prediction has, and so the latents that it is made of."""
        written = torch.empty(1, model.config.out_channels, 1, 1, device="meta")
        return self.prediction(model, written).shape[1]

    def guidance_embedding(self, model: Denoiser, scales: Tensor) -> Tensor | None:
        """Return the embedding of guidance scales (batch,) that the denoiser reads; None where it reads none."""
        return None

    def embeds_guidance(self, model: Denoiser) -> bool:
        """Return whether the denoiser reads the guidance scale, and its prediction is guided."""
        return False

    def sampling_arguments(self) -> dict[str, Any]:
        """Arguments of the family's pipelines that `generate` passes."""
        return {}

    def prompt_tokens(self, pipeline: DiffusionPipeline) -> int:
        """Return the number of tokens of a prompt that the denoiser reads, with those that mark its start and end."""
        most: int = pipeline.tokenizer.model_max_length
        return most

    def require_controlnet(self, model: Denoiser, controlnet: Any, name: str = "") -> None:
        """Raise an AsdmError unless a ControlNet's residuals fit the model; `name` is the ControlNet's in the
        message."""
        raise AsdmError(f"{name}: no ControlNet is for a {type(model).__name__}; leave it out")

    def size_multiple(self, model: Denoiser) -> int:
        """Return the number that divides the sides of the latents that a model reads."""
        return 1

    @abstractmethod
    def sample_shape(self, model: Denoiser) -> tuple[int, int, int]:
        """(channels, height, width) of the sample that a call at native size reads."""

    def predict(self, model: Denoiser, arguments: Mapping[str, Any]) -> Tensor:
        """Return the prediction of one call. The sample is passed by position, as pipelines do: other libraries'
        patches rely on it."""
        others = {name: value for name, value in arguments.items() if name != self.sample_argument}
        return self.prediction(model, model(arguments[self.sample_argument], **others, return_dict=False)[0])

    @abstractmethod
    def random_inputs(self, model: Denoiser, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Random keyword arguments of a call at native size, the sample among them as "sample" or "hidden_states"."""

    def call_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call of the denoiser by name, the sample first."""
        names = _forward_names(self.model_class)  # type: ignore[arg-type]
        given = dict(zip(names, args, strict=False)) | kwargs
        return {names[0]: given.pop(names[0]), **given}

    def fingerprint(self, model: Denoiser) -> str:
        """Return a digest of the architecture (tensor names and shapes), equal for fine-tunes of one model."""
        return fingerprint(model)

    def require_known_inputs(self, model: Denoiser, name: str = "") -> None:
        """Raise an AsdmError where a model has inputs beside latents, a time step, a guidance scale and what prompts
        give; `name` is the checkpoint's in the message."""

    @abstractmethod
    def unlike(self, model: Denoiser, other: Denoiser) -> str | None:
        """Return the first config field by which two models read or write other tensors; None where one can replace
        the other."""

    @abstractmethod
    def cache_cut(self, model: Denoiser, depth: int, fresh: Sequence[str] = ()) -> CacheCut:
        """Return what is cached where the last `depth` layers, and the modules named in `fresh`, are always
        computed."""

    @abstractmethod
    def deepest_cut(self, model: Denoiser) -> int:
        """Return the largest `depth` of a `cache_cut`."""

    def cache_depths(self, model: Denoiser) -> list[int]:
        """Depths that a calibration compares."""
        return list(range(1, min(3, self.deepest_cut(model)) + 1))


@cache
def _forward_names(model_class: Any) -> tuple[str, ...]:
    """Return the names of a denoiser's inputs, in order."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]
