"""Whether expert kernels divide the work: the routers' weights by group of prompts and time step (inferred)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn

from asdm import checks
from asdm.choices import Label
from asdm.data.calibration import calibration_calls
from asdm.data.sources import open_data
from asdm.diffusion.conditioning import latent_shape
from asdm.edits.expert_kernels import CondConv2d
from asdm.errors import AsdmError
from asdm.families import denoiser_of, family_of
from asdm.files import write_text
from asdm.records import Record

SHUFFLES = 20  # of the prompts' groups, for what information a division by chance has
AT_ONCE = 16  # samples in a call


class ConvolutionUsage(Record):
    """How a convolution's own kernel and its experts are used."""

    name: str = Field(description="Module path of the convolution.")
    experts: list[str] = Field(description="The convolutions that its expert kernels come from.")
    weights: dict[str, list[list[float]]] = Field(
        description="By group of prompts and time step, the mean weight of each kernel, the own one first."
    )
    information: float = Field(
        description="Mutual information of kernel and group in bits, averaged over the time steps: 0 where all groups "
        "are mixed alike, 1 where two groups share no kernel."
    )
    chance: float = Field(description="The same for random groups of the same sizes.")
    explained: float = Field(
        description="Share of the weights' variance between prompts that the groups explain, 0 to 1, averaged over the "
        "time steps."
    )


class ExpertUsage(Record):
    """How the expert kernels of a student are used, by group of prompts and time step."""

    groups: dict[str, int] = Field(description="The groups, with how many prompts each has.")
    timesteps: list[int] = Field(description="Time steps of the calls.")
    convolutions: list[ConvolutionUsage]

    def save(self, path: str | Path) -> None:
        """Write the file."""
        write_text(Path(path), self.model_dump_json(indent=1) + "\n")


@checks.arguments(
    pipeline=checks.PIPELINE,
    prompts=checks.named(checks.each(checks.text, 1, "a list of texts")),
    timesteps=checks.TIMESTEPS,
    seed=checks.SEED,
)
@torch.no_grad()
def expert_usage(
    pipeline: DiffusionPipeline, prompts: Mapping[str, Sequence[str]], *, timesteps: int = 4, seed: int = 0
) -> ExpertUsage:
    """Observe the routers of a student's expert kernels on prompts in groups, such as styles.

    The calls read latents that the pipeline generates from these prompts, noised at several time steps. A router's
    weights are read as the probability of each kernel: softmax weights as they are before the start's offset, sigmoid
    weights relative to their sum.

    Args:
        pipeline: with the student as its denoiser.
        prompts: at least two groups of prompts, by name.
        timesteps: how many, the middles of equal parts of the schedule.

    Raises:
        AsdmError: the denoiser has no expert kernels, or there is one group alone.
    """
    if len(prompts) < 2:
        raise AsdmError(f"prompts: {', '.join(prompts)}: one group alone is not divided; give two or more")
    denoiser = denoiser_of(pipeline)
    convolutions = {name: module for name, module in denoiser.named_modules() if is_mixed(module)}
    if not convolutions:
        raise AsdmError("the denoiser has no expert kernels; plan some by asdm plan --experts")
    texts = [text for group in prompts.values() for text in group]
    groups = torch.tensor([index for index, group in enumerate(prompts.values()) for _ in group])
    calls = calibration_calls(pipeline, None, texts, timesteps, len(texts), seed)
    routed: dict[str, list[Tensor]] = {name: [] for name in convolutions}
    for call in calls:
        with _routings(convolutions) as rows:
            for start in range(0, len(texts), AT_ONCE):
                family_of(denoiser).predict(denoiser, _samples(call.arguments, start, len(texts)))
        for name, parts in rows.items():
            routed[name].append(torch.cat(parts))
    return ExpertUsage(
        groups={name: len(group) for name, group in prompts.items()},
        timesteps=[call.timestep for call in calls],
        convolutions=[
            _usage(name, convolutions[name], torch.stack(rows), groups, list(prompts)) for name, rows in routed.items()
        ],
    )


def prompts_by_label(data: str | Path, label: Label) -> dict[str, list[str]]:
    """Return the captions of a data source in groups that share a style or a concept, held-out ones too.

    Raises:
        AsdmError: the data cannot be used, or fewer than two values of the label stand in it.
    """
    groups: dict[str, list[str]] = {}
    for example in open_data(data, "all").examples:
        value = getattr(example, label)
        if value is not None:
            groups.setdefault(value, []).append(example.caption)
    if len(groups) < 2:
        raise AsdmError(
            f"{data}: {len(groups)} groups by {label}; rows of its metadata.jsonl need a field {label} with two values "
            "or more"
        )
    return dict(sorted(groups.items()))


def default_samples(pipeline: DiffusionPipeline) -> int:
    """Return how many prompts of a group are looked at: 16 at up to 32x32 latents, else 4."""
    return 16 if latent_shape(pipeline)[1] <= 32 else 4


def is_mixed(module: nn.Module) -> bool:
    """Return whether a module is a convolution with expert kernels."""
    return isinstance(module, CondConv2d) and bool(module.sources)


def mutual_information(probabilities: Tensor, groups: Tensor) -> float:
    """Return the bits that kernel and group share: H(kernel) - H(kernel | group).

    Args:
        probabilities: of each kernel (prompts, kernels).
        groups: the group's number of each prompt (prompts,).
    """
    shares = [float((groups == group).float().mean()) for group in groups.unique()]
    means = [probabilities[groups == group].mean(0) for group in groups.unique()]
    within = sum(share * _entropy(mean) for share, mean in zip(shares, means, strict=True))
    return max(0.0, _entropy(probabilities.mean(0)) - within)


def explained_variance(values: Tensor, groups: Tensor) -> float:
    """Return the share of the variance of `values` (prompts, kernels) that lies between groups; 0 where all are
    equal."""
    centred = values - values.mean(0)
    total = float(centred.square().sum())
    if total <= 1e-12 * float(values.square().sum()):
        return 0.0
    between = sum(
        float((groups == group).sum() * centred[groups == group].mean(0).square().sum()) for group in groups.unique()
    )
    return between / total


def _usage(name: str, conv: Any, routing: Tensor, groups: Tensor, names: list[str]) -> ConvolutionUsage:
    """Return the usage of a convolution whose routing weights (time steps, prompts, kernels) were recorded."""
    routing = routing.double().cpu()
    probabilities = conv.probabilities(routing)
    generator = torch.Generator().manual_seed(0)
    shuffled = [groups[torch.randperm(len(groups), generator=generator)] for _ in range(SHUFFLES)]
    by_chance = [mutual_information(rows, order) for rows in probabilities for order in shuffled]
    return ConvolutionUsage(
        name=name,
        experts=list(conv.sources),
        weights={group: routing[:, groups == index].mean(1).tolist() for index, group in enumerate(names)},
        information=_mean([mutual_information(rows, groups) for rows in probabilities]),
        chance=_mean(by_chance),
        explained=_mean([explained_variance(rows, groups) for rows in routing]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _entropy(probabilities: Tensor) -> float:
    """In bits."""
    return -float(torch.special.xlogy(probabilities, probabilities).sum()) / torch.tensor(2.0).log().item()


@contextmanager
def _routings(convolutions: Mapping[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the routing weights (batch, kernels) of each call of these convolutions."""
    found: dict[str, list[Tensor]] = {name: [] for name in convolutions}

    def hook(name: str) -> Any:
        def record(conv: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            rows = convolutions[name].routing(*args, **kwargs)
            found[name].append(rows.expand(len(args[0]), -1))

        return record

    handles = [conv.register_forward_pre_hook(hook(name), with_kwargs=True) for name, conv in convolutions.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _samples(arguments: Mapping[str, Any], start: int, count: int) -> dict[str, Any]:
    """Return the arguments of a call for `AT_ONCE` of its `count` samples, from `start` on."""

    def part(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: part(each) for name, each in value.items()}
        is_batch = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
        return value[start : start + AT_ONCE] if is_batch else value

    return {name: part(value) for name, value in arguments.items()}
