"""Where projections in a PixArt transformer fold. No linear projection folds into a layer of it.

All blocks are one chain. But `attn1` and `ff` read and write through scales, shifts and gates of the time step. A
position embedding without tensors stands behind the first layer, and a norm before the last one. So the projections of
neighbouring removed blocks become one. A projection in the place of `attn2` joins them where nothing computes between
them. A constant folds into the last layer of an `attn2` before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from asdm.choices import CompensationKind
from asdm.edits.remove import RemovedUnit
from asdm.families.folding import Kept, Removed, fold_chain
from asdm.families.transformer_architecture import BRANCHES, RemovedBlock


def fold_projections(model: Any, within_blocks: bool) -> dict[str, CompensationKind]:
    """Fold in place what folds; return the kinds of projections that are then left, for units where that changes."""
    blocks = [list(_steps(f"transformer_blocks.{i}", block)) for i, block in enumerate(model.transformer_blocks)]
    kinds: dict[str, CompensationKind] = {}
    for steps in blocks if within_blocks else [list(chain.from_iterable(blocks))]:
        kinds |= fold_chain(steps)
    return kinds


def _steps(name: str, block: Any) -> Iterator[Kept | Removed]:
    if isinstance(block, RemovedBlock):
        yield from _removed(name, block)
        return
    for branch in BRANCHES:
        module = getattr(block, branch)
        if branch != "attn2":
            if not isinstance(module, RemovedUnit) or module.compensation is not None:
                yield Kept()  # behind a gate
        elif isinstance(module, RemovedUnit):
            yield from _removed(f"{name}.{branch}", module)
        else:
            yield Kept(constant=module.to_out[0])


def _removed(name: str, module: RemovedUnit) -> Iterator[Removed]:
    if module.compensation is not None:
        yield Removed(name, module)
