"""What every package may ask about a denoiser's architecture: one subclass of `ModelFamily` for each family of models.

Nothing outside `families/` and the student's model classes names a block, a layer or a class of an architecture.
"""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from asdm.choices import CompensationKind, Program
from asdm.edits.base import Edit
from asdm.errors import AsdmError
from asdm.families.tensors import fingerprint
from asdm.measure.macs import MacCount, counting_macs

Denoiser: TypeAlias = ModelMixin
GenerationInput = Literal["image", "mask", "lora", "controlnet", "clip_skip", "weighted"]
UnitKind = Literal["resnet", "attention", "self_attention", "cross_attention", "feed_forward", "block"]


@dataclass(frozen=True)
class Unit:
    """One removable residual branch.

    `name` is its module path in the denoiser, `parent` the unit that contains it (None at the top).
    """

    name: str
    kind: UnitKind
    parent: str | None = None

    @property
    def layer(self) -> str:
        """The outermost unit it belongs to."""
        return self.parent or self.name

    @property
    def block(self) -> str:
        """The block it is in, such as "down_blocks.0", "mid_block" or "transformer_blocks.3"."""
        return block_of(self.name)


def block_of(name: str) -> str:
    """Return the block that a module path is in: its first part, with the index where it has one."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


@dataclass(frozen=True)
class Branch:
    """How a unit's output splits: output = kept(input) + branch(input), times `scale` where the module scales its sum.

    `norm`: path of the norm that feeds this branch alone and goes with it, None where there is none.
    `channels`: of the hidden states that the branch is added to, as they come in.
    `kept`: what stays of the module's own output when the branch goes; None where the sum is taken outside the module,
    so that nothing of its output stays.
    `folds_into`: path of the layer, a 1x1 convolution or a linear layer, that a fitted projection folds into exactly.
    `is_gated`: whether the branch's output is multiplied by a gate outside the module.
    """

    path: str
    channels: int
    norm: str | None = None
    kept: Callable[[Tensor], Tensor] | None = None
    scale: float = 1.0
    folds_into: str | None = None
    is_gated: bool = False


@dataclass(frozen=True)
class BlockIO:
    """Where image and text states sit among a block's outputs; None where it puts out one tensor alone."""

    image: int | None = None
    text: int | None = None

    def image_states(self, output: Any) -> Tensor:
        """Return the image states in what a block or layer put out."""
        if isinstance(output, Tensor):
            return output
        return output[self.image or 0]

    def with_image_states(self, output: Any, states: Any) -> Any:
        """Return what a block or layer put out, with other image states."""
        if not isinstance(output, tuple):
            return states
        place = self.image or 0
        return (*output[:place], states, *output[place + 1 :])

    def image_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the image states that a block or layer is called with."""
        states: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return states


class UnitLike(Protocol):
    """What a `Unit` and its record in a redundancy profile have in common."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> UnitKind: ...

    @property
    def parent(self) -> str | None: ...

    @property
    def block(self) -> str: ...


@dataclass(frozen=True)
class Preset:
    """What a published plan changes in a model.

    `edit`: its only edit, where it is exclusive. Else `removed` names units and larger parts to remove, and the
    self-attentions with the most tokens attend by region; `prefers_speed` chooses the faster kind of that.
    """

    edit: Edit | None = None
    removed: frozenset[str] = frozenset()
    prefers_speed: bool = False


@dataclass(frozen=True)
class CacheCut:
    """Which modules answer from a cache at a cached step, in order of execution, and which of them is read.

    `relative_to`: the module whose input the cached output is kept relative to, so that what is fresh passes through;
    None where the output itself is cached.
    """

    cached: list[str]
    read: frozenset[str]
    relative_to: str | None = None


OriginalKind = Literal["sd1", "sd2", "sdxl"]


@dataclass(frozen=True)
class OriginalLayout:
    """The names of a model's tensors in the original code's layout.

    `names`: from the model's own names. `kind`: which of the original models has the model's parts.
    `velocity_sign`: a tensor by the model's own name, and the standard deviation above which the program takes the
    model for one that predicts velocities; None where it looks at none.
    """

    names: dict[str, str]
    kind: OriginalKind
    velocity_sign: tuple[str, float] | None = None


@dataclass(frozen=True)
class PortableShape:
    """A smaller stock model that every program reads, before its transformer blocks are chosen.

    `gone`: units and larger parts that it lacks. `depths`: how many transformer blocks an attention keeps, where that
    is fixed. `free`: attentions that may lose blocks as long as one stays, and how many they have.
    """

    edit: Any
    gone: list[str]
    depths: dict[str, int]
    free: dict[str, int]


@dataclass(frozen=True)
class BlockPlace:
    """Where a diagram of the model has a block: its level, 0 for the highest resolution, and its side."""

    level: int
    side: Literal["encoder", "middle", "decoder"]


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

    def original_layout(self, model: Denoiser, program: Program) -> OriginalLayout:
        """Return the names of a model's tensors in the original code's layout, for a program that reads it.

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


_FAMILIES: list[ModelFamily] = []


def register_family(family: type[ModelFamily]) -> type[ModelFamily]:
    """Make a family known (a class decorator)."""
    _FAMILIES.append(family())
    return family


def families() -> Sequence[ModelFamily]:
    """Return all registered families."""
    return tuple(_FAMILIES)


def family_of(model: Any) -> ModelFamily:
    """Return the family of a denoiser, or of a pipeline's denoiser. What stands in for a denoiser, such as exported
    graphs, names its family in its attribute `family`.

    Raises:
        AsdmError: it is of none of the registered families.
    """
    if isinstance(model, DiffusionPipeline):
        return family_of(denoiser_of(model))
    named = getattr(model, "family", None)
    if isinstance(named, ModelFamily):
        return named
    for family in _FAMILIES:
        if isinstance(model, family.model_class):
            return family
    raise _unknown(type(model).__name__)


def family_named(class_name: str) -> ModelFamily:
    """Return the family whose stock class, or a subclass of it, has this name.

    Raises:
        AsdmError: there is none.
    """
    for family in _FAMILIES:
        if class_name.endswith(family.model_class.__name__):
            return family
    raise _unknown(class_name)


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """Return the pipeline's denoiser: its UNet or transformer.

    Raises:
        AsdmError: it has none of a registered family.
    """
    return getattr(pipeline, component_of(pipeline))


def component_of(pipeline: DiffusionPipeline) -> str:
    """Return the name of the pipeline's component that is its denoiser.

    Raises:
        AsdmError: it has none of a registered family.
    """
    for family in _FAMILIES:
        if getattr(pipeline, family.component, None) is not None:
            return family.component
    raise _unknown(type(pipeline).__name__)


def denoiser_call(model: Denoiser, batch_size: int = 2, seed: int = 0) -> Callable[[], Tensor]:
    """One call of a denoiser on random inputs at its native size; batch 2 is one image with guidance."""
    family = family_of(model)
    arguments = family.random_inputs(model, batch_size, seed)
    return lambda: family.predict(model, arguments)


def macs_of_call(model: Denoiser) -> MacCount:
    """Count what a denoiser computes for one sample at its native size."""
    with counting_macs(model) as count:
        denoiser_call(model, batch_size=1)()
    return count


def _unknown(name: str) -> AsdmError:
    known = ", ".join(family.model_class.__name__ for family in _FAMILIES)
    return AsdmError(f"{name}: no denoiser of a known family; known are {known}")
