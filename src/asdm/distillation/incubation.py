"""Progressive incubation: which blocks of a student are incubated, each alone inside the teacher; and what moves.

Our reading of the abstract of arXiv 2312.15516, after Deep Incubation (arXiv 2212.04129, Sec. 3) (inferred).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from asdm.edits import CondConv, Remove
from asdm.errors import AsdmError
from asdm.families.unet_structure import block_of, is_covered_by, is_level, layers, unlike_in
from asdm.families.unet_structure import blocks as unet_blocks
from asdm.measure.hooks import swapped
from asdm.student.unet import edits_of


def groups_of(student: UNet2DConditionModel) -> list[list[str]]:
    """The edited blocks of a student, in order of execution, those together that cannot be told apart: with the
    innermost stage go the resampling before it and the up block behind it."""
    edits = edits_of(student)
    touched = {block_of(edit.unit) for edit in edits}
    together: list[str] = []
    innermost = next((edit.unit for edit in edits if is_level(edit.unit)), None)
    if innermost is not None:
        level = int(innermost.rpartition(".")[2])
        together = [f"down_blocks.{level - 1}", innermost, "up_blocks.0"]
    groups = [[block] for block in unet_blocks(student) if block in touched and block not in together]
    return [*groups, together] if together else groups


def incubated_blocks(student: UNet2DConditionModel) -> list[str]:
    """The blocks that can be incubated alone: what enters and leaves them has the teacher's shapes."""
    return [group[0] for group in groups_of(student) if len(group) == 1]


def set_trainable(student: UNet2DConditionModel, trained: str) -> None:
    """Let only a part of the student's parameters move.

    Raises:
        AsdmError: there is nothing of that kind in it.
    """
    if trained == "all":
        student.requires_grad_(True)
        return
    student.requires_grad_(False)
    if trained == "routers":
        chosen = [module for name, module in student.named_modules() if name.endswith(".router")]
    else:
        chosen = [student.get_submodule(name) for name in _beside_cuts(student)]
    for module in chosen:
        module.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise AsdmError(f"trained={trained}: this student has none; use all")


def _beside_cuts(student: UNet2DConditionModel) -> list[str]:
    """The layers before and behind each edit, and what is left of the edited one."""
    edits = edits_of(student)
    removed = [edit.unit for edit in edits if isinstance(edit, Remove)]
    blocks = [unit for unit in removed if unit in unet_blocks(student)]
    order = [name for name in layers(student) if not is_covered_by(name, blocks)]
    near: set[str] = set()
    for edit in edits:
        unit = edit.unit.rpartition(".")[0] if isinstance(edit, CondConv) else edit.unit
        layer = unit.partition(".transformer_blocks.")[0]
        if layer in order:
            index = order.index(layer)
            near |= set(order[max(0, index - 1) : index + 2])
        elif unit in blocks:
            before = [name for name in order if _place(name) < _place(unit)]
            behind = [name for name in order if _place(name) > _place(unit)]
            near |= {unit, *before[-1:], *behind[:1]}
            if is_level(unit):  # which also goes from the way up
                near |= {*[name for name in order if _place(name) > _place("up_blocks.0")][:1]}
    return sorted(near)


def _place(name: str) -> tuple[int, int]:
    """By which blocks are in order of execution."""
    side, _, index = block_of(name).partition(".")
    return ("down_blocks", "mid_block", "up_blocks").index(side), int(index or 0)


@contextmanager
def assembled(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, blocks: Sequence[str] | None
) -> Iterator[None]:
    """Put the teacher's blocks in the place of the student's others, for the length of the block.

    Raises:
        AsdmError: a name that is no block, or one without those that go with it.
    """
    if blocks is None:
        yield
        return
    if unlike_in(student, teacher, "layers_per_block", "block_out_channels", "mid_block_type"):
        raise AsdmError("assembled: this student's blocks are not its teacher's; leave the stage's assembled out")
    known = {*unet_blocks(student), *unet_blocks(teacher)}
    for name in blocks:
        if name not in known:
            raise AsdmError(f"assembled: {name}: no such block; they are {', '.join(sorted(known))}")
    for group in groups_of(student):
        if 0 < len(set(group) & set(blocks)) < len(group):
            raise AsdmError(f"assembled: {', '.join(group)} go together in this student; name all or none")
    others = [name for name in unet_blocks(teacher) if name not in blocks]
    with swapped(student, {name: teacher.get_submodule(name) for name in others}):
        yield


@contextmanager
def calls_of(unet: UNet2DConditionModel, blocks: Sequence[str]) -> Iterator[dict[str, tuple[Any, Any, Any]]]:
    """What the named blocks are called with, and what they answer: (args, kwargs, output)."""
    calls: dict[str, tuple[Any, Any, Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] = (args, kwargs, output)

        return hook

    handles = [unet.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def block_error(output: Any, expected: Any, error: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean error of all that a block hands on: its hidden states and its skip connections."""
    pairs = list(zip(_tensors(output), _tensors(expected), strict=True))
    return torch.stack([error(mine, theirs) for mine, theirs in pairs]).mean()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in _tensors(part)]
