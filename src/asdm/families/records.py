"""What a family says of a model's parts: units and branches, blocks, layouts and shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from asdm.edits.base import Edit

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
