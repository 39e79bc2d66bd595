"""Progressive incubation: which blocks of a student are trained, each alone inside the teacher; what is trainable.

Our reading of the abstract of arXiv 2312.15516, after Deep Incubation (arXiv 2212.04129, Sec. 3) (inferred).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asdm.distillation.stages import Stage
from asdm.errors import AsdmError
from asdm.families import Denoiser, block_of, family_of
from asdm.measure.hooks import swapped
from asdm.student.edited_model import edits_of


def groups_of(student: Denoiser) -> list[list[str]]:
    """Return the edited blocks of a student, in order of execution; those that an edit couples are one group."""
    family, units = family_of(student), [edit.unit for edit in edits_of(student)]
    coupled = family.coupled_blocks(student, units)
    alone = {block_of(unit) for unit in units}.difference(*coupled)
    return [*([block] for block in family.blocks(student) if block in alone), *coupled]


def incubated_blocks(student: Denoiser) -> list[str]:
    """Return the blocks that can be incubated alone: their inputs and outputs have the teacher's shapes."""
    return [group[0] for group in groups_of(student) if len(group) == 1]


def chosen_blocks(stage: Stage, student: Denoiser) -> list[str]:
    """Return the blocks that a stage incubates.

    Raises:
        AsdmError: it names a block that cannot be incubated.
    """
    blocks = incubated_blocks(student)
    for name in stage.student_blocks or ():
        if name not in blocks:
            raise AsdmError(
                f"student_blocks: {name}: cannot be incubated in this student; those are {', '.join(blocks) or 'none'}"
            )
    return [name for name in blocks if stage.student_blocks is None or name in stage.student_blocks]


def set_trainable(student: Denoiser, trained: str) -> None:
    """Make all of the student's parameters trainable, or only the routers of its expert kernels, or these and the
    low-rank changes that `asdm.distillation.lora` puts around its layers.

    Raises:
        AsdmError: it has no router.
    """
    student.requires_grad_(trained == "all")
    if trained == "all":
        return
    routers = [module for name, module in student.named_modules() if name.endswith(".router")]
    for router in routers:
        router.requires_grad_(True)
    if trained == "lora":
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or is_lora(name))
    elif not routers:
        raise AsdmError(f"trained={trained}: this student has none; use all")


def is_lora(name: str) -> bool:
    """Return whether a parameter's name is that of a low-rank change, as peft names them."""
    return ".lora_A." in name or ".lora_B." in name


def parts_of(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Return a module that has only these of a model's submodules, at their paths; it is not to be called."""
    parts = nn.Module()
    for path in paths:
        inside = parts
        *parents, last = path.split(".")
        for name in parents:
            if name not in inside._modules:
                inside.add_module(name, nn.Module())
            inside = inside.get_submodule(name)
        inside.add_module(last, model.get_submodule(path))
    return parts


def require_blocks(names: Sequence[str], teacher: Denoiser) -> None:
    """Raise an AsdmError for a name that is no block of the teacher's, and so of no student."""
    known = sorted(family_of(teacher).blocks(teacher))
    for name in names:
        if name not in known:
            raise AsdmError(f"student_blocks: {name}: no such block; they are {', '.join(known)}")


@contextmanager
def blocks_in_teacher(student: Denoiser, teacher: Denoiser, blocks: Sequence[str] | None) -> Iterator[None]:
    """Use the teacher's blocks in place of all but these blocks of the student, for the length of the block.

    Raises:
        AsdmError: a name that is no block, or one without those that are coupled to it.
    """
    if blocks is None:
        yield
        return
    family = family_of(teacher)
    if not family.has_blocks_of(student, teacher):
        raise AsdmError("student_blocks: this student's blocks are not its teacher's; leave the field out")
    require_blocks(blocks, teacher)
    for group in groups_of(student):
        if 0 < len(set(group) & set(blocks)) < len(group):
            raise AsdmError(f"student_blocks: {', '.join(group)} go together in this student; name all or none")
    others = [name for name in family.blocks(teacher) if name not in blocks]
    with swapped(student, {name: teacher.get_submodule(name) for name in others}):
        yield


@contextmanager
def calls_of(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, tuple[Any, Any, Any]]]:
    """Record the last call of each named block: (args, kwargs, output)."""
    calls: dict[str, tuple[Any, Any, Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] = (args, kwargs, output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in blocks]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def block_error(output: Any, expected: Any, error: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the mean error of all outputs of a block: its hidden states and its skip connections."""
    pairs = list(zip(_tensors(output), _tensors(expected), strict=True))
    return torch.stack([error(mine, theirs) for mine, theirs in pairs]).mean()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in _tensors(part)]
