"""Multi-UNet switching: a small UNet where the noise is high, the original where details are made (named in the
abstract of arXiv 2406.00210; the rest is inferred)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from asdm import checks
from asdm.errors import AsdmError
from asdm.families.unet_calls import unet_call
from asdm.families.unet_structure import unlike
from asdm.measure.latency import measure_interleaved
from asdm.pipelines.derived import with_unet

_UNETS = checks.each(checks.UNET, least=1)
_PARTS = checks.each(checks.number())


class SwitchedUNet2DConditionModel(UNet2DConditionModel):
    """Several UNets in the place of one; the time step says which of them answers.

    Args:
        unets: from high noise to low.
        below: for each but the first, the part of the schedule, in (0, 1) and falling, below which it takes over.

    It stands in any pipeline as long as that lives; what is saved are the UNets it was made of.

    Raises:
        AsdmError: the numbers do not fit, or the UNets read and write other things, or have other dtypes or devices.
    """

    @checks.arguments(unets=_UNETS, below=_PARTS, timesteps=checks.whole())
    def __init__(self, unets: Sequence[UNet2DConditionModel], below: Sequence[float], timesteps: int = 1000):
        falling = [1.0, *below, 0.0]
        if len(below) != len(unets) - 1 or any(a <= b for a, b in itertools.pairwise(falling)):
            raise AsdmError(
                f"below={list(below)}: for {len(unets)} UNets give {len(unets) - 1} falling parts of the schedule "
                "between 1 and 0"
            )
        first = unets[0]
        for unet in unets[1:]:
            name = unlike(first, unet)
            if name is not None:
                raise AsdmError(
                    f"{name}: {first.config[name]} and {unet.config[name]}; switch between UNets of one kind"
                )
            for name in ("dtype", "device"):
                one, other = getattr(first, name), getattr(unet, name)
                if one != other:
                    raise AsdmError(f"{name}: {one} and {other}; bring the UNets to one by .to({other})")
        config = {name: value for name, value in unets[-1].config.items() if name != "edits" and name[0] != "_"}
        with torch.device("meta"):
            super().__init__(**config)
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        self.unets = nn.ModuleList(unets)
        self.boundaries = [part * timesteps for part in below]
        self.eval()

    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the UNet's that the (first) time step belongs to."""
        now = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        place = sum(now < boundary for boundary in self.boundaries)
        return self.unets[place](sample, timestep, *args, **kwargs)

    @property
    def add_embedding(self) -> Any:
        """SDXL's pipelines ask it for its width."""
        return self.unets[-1].add_embedding

    @property
    def megabytes(self) -> float:
        """Memory of the weights of all UNets; tensors that they share count once."""
        tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in self.parameters()}
        return sum(tensors.values()) / 1e6

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise AsdmError("several UNets in one pipeline are not saved together; save the pipeline of each")


@checks.arguments(pipeline=checks.PIPELINE, unets=_UNETS, below=_PARTS, speedup=checks.SPEEDUP)
def switch_unets(
    pipeline: DiffusionPipeline,
    unets: Sequence[UNet2DConditionModel],
    *,
    below: Sequence[float] | None = None,
    speedup: float | None = None,
) -> DiffusionPipeline:
    """A pipeline that shares everything with `pipeline` and switches between UNets.

    Args:
        unets: from high noise to low, mostly a student and then the original.
        below: where each but the first takes over, as parts of the schedule; or
        speedup: for two UNets, of all calls together over the second UNet alone, by a timed call of each.

    Raises:
        AsdmError: not one of both, or a speed-up that even the first UNet alone does not reach.
    """
    if (below is None) == (speedup is None):
        raise AsdmError("give either below or speedup")
    if speedup is not None:
        if len(unets) != 2:
            raise AsdmError(f"speedup={speedup:g}: is for two UNets, not {len(unets)}; give below")
        calls = {str(index): unet_call(unet) for index, unet in enumerate(unets)}
        times = measure_interleaved(calls, rounds=5, device=pipeline.device)
        first, last = times["0"].ms, times["1"].ms
        part = (1 - 1 / speedup) / (1 - first / last) if first < last else 2.0
        if not 0 < part < 1:
            raise AsdmError(
                f"speedup={speedup:g}: out of reach; the first UNet alone is {last / first:.2f} times as fast as the "
                "second; give between 1 and that"
            )
        below = [1 - part]
    assert below is not None
    timesteps = pipeline.scheduler.config.num_train_timesteps
    return with_unet(pipeline, SwitchedUNet2DConditionModel(unets, below, timesteps))
