"""Expert kernels (CLME-CondConv) for a plan: which convolutions inherit those of removed units."""

from __future__ import annotations

from typing import Literal

from asdm import checks
from asdm.choices import Router
from asdm.edits import CondConv, removed_units
from asdm.errors import AsdmError
from asdm.families import Denoiser, family_of
from asdm.student.edited_model import edits_of
from asdm.student.plan import PruningPlan
from asdm.student.surgery import model_without_weights

Pair = tuple[str, str]  # a kept convolution, and the removed one that it inherits


@checks.arguments(
    plan=checks.a(PruningPlan, "asdm.make_plan makes one"),
    unet=checks.UNET,
    params=checks.share_or_count,
    router=checks.literal(Router),
    activation=checks.one_of("softmax", "sigmoid"),
)
def add_cond_conv(
    plan: PruningPlan,
    unet: Denoiser,
    *,
    params: float = 0.05,
    router: Router = "input",
    activation: Literal["softmax", "sigmoid"] = "softmax",
) -> PruningPlan:
    """Add expert kernels to a plan: convolutions that stay inherit those of removed layers.

    Each removed convolution goes to the nearest kept one, in order of execution, of its name (`conv1`, `conv2`) and
    output channels, and with a router that reads the prompt, in a block that does. The smallest come first, as mixing
    a kernel costs its size, then the nearest, until the budget is used (inferred). Convolutions with
    experts are left as they are.

    Args:
        plan: with removals, whose kernels become experts.
        params: what the experts may add, as a fraction of the original's parameters or as a number of them, at least
            10,000.
        router, activation: of each, as in `CondConv`.

    Raises:
        AsdmError: the plan is for another model or drops whole layers, or no expert fits into the budget.
    """
    plan.require_for(unet)
    exclusive = next((edit.edit for edit in plan.edits if edit.is_exclusive), None)
    if exclusive is not None:
        raise AsdmError(f"{exclusive}: goes with no other edit, so with no expert kernels; leave these out")
    total = sum(p.numel() for p in unet.parameters())
    budget = params * total if params <= 1 else params
    pairs = _pairs(plan, unet, needs_prompt="prompt" in router)
    experts: dict[str, list[str]] = {}
    for size, (kept, removed) in pairs:
        if size <= budget:
            experts.setdefault(kept, []).append(removed)
            budget -= size
    if not experts:
        raise AsdmError(
            f"params={params:g}: no expert fits; {len(pairs)} of the plan's removed convolutions could be inherited by "
            "a kept one; allow more, or leave out the experts"
        )
    edits = [
        CondConv(unit=kept, experts=sources, router=router, activation=activation) for kept, sources in experts.items()
    ]
    model_without_weights(unet, [*plan.edits, *edits])
    return plan.model_copy(update={"edits": [*plan.edits, *edits]})


def _pairs(plan: PruningPlan, unet: Denoiser, needs_prompt: bool) -> list[tuple[int, Pair]]:
    """Return, for each removed convolution, the nearest kept one that can inherit it, with its size, by preference."""
    family = family_of(unet)
    order = {name: index for index, name in enumerate(family.layers(unet))}
    mixed = {edit.unit for edit in [*edits_of(unet), *plan.edits] if isinstance(edit, CondConv)}
    convs = {name: unet.get_submodule(name) for name in family.conv_channels(unet) if name not in mixed}
    units = removed_units(plan.edits, [unit.name for unit in family.units(unet)], family)
    removed = [name for name in convs if family.is_covered_by(name, units)]
    kept = [
        name for name in convs if name not in removed and (not needs_prompt or family.prompt_channels(unet, name) > 0)
    ]

    def position(conv: str) -> int:
        return order[conv.rpartition(".")[0]]

    pairs = []
    for source in removed:
        fitting = [
            (abs(position(name) - position(source)), name)
            for name in kept
            if name.rpartition(".")[2] == source.rpartition(".")[2]
            and len(convs[name].weight) == len(convs[source].weight)
        ]
        if fitting:
            distance, name = min(fitting)
            size = convs[name].weight.numel() + len(convs[name].weight)
            pairs.append((size, distance, position(source), name, source))
    return [(size, (name, source)) for size, _, _, name, source in sorted(pairs)]
