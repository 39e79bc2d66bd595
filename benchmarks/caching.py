"""Compare calibrated feature caching with DeepCache, PAB and ToMe: how far the final latents move at equal
speed. Prints a table and writes its results.

    python benchmarks/caching.py                                  # embedded pipeline
    python benchmarks/caching.py --model MODEL --data DATA    # any other

The speed counts the UNet calls of a sampling, each step's the fastest of some rounds, so that a busy machine matters
little. The peers come from their own packages: pip install -e '.[benchmark]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import typer
from common import finish, run
from diffusers import DiffusionPipeline
from torch import Tensor

import asdm
from asdm.benchmark.baselines import attention_broadcast, deep_cache, tome
from asdm.benchmark.method import Method
from asdm.benchmark.techniques import caching
from asdm.caching.calibration import observe_sampling
from asdm.data.sources import open_data
from asdm.diffusion.generation import default_guidance
from asdm.measure.modules import timing_modules

LEAST_GAIN = 1.03  # of a peer that ours is to be compared with

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@torch.no_grad()
def main(
    model: str = "demo", data: str = "demo", steps: int = 25, samples: int = 16, rounds: int = 3, target: float = 2.3
) -> None:
    """Distance of the final latents, on prompts that no calibration saw, against the counted speed-up."""
    pipeline = asdm.load_pipeline(model)
    prompts = [example.caption for example in open_data(data).sample(samples, seed=1)]
    original = Method("original", "original", steps=steps)
    peers = [
        *(deep_cache(steps, interval) for interval in (2, 3, 5)),
        *(attention_broadcast(steps, skip) for skip in (2, 4)),
        *(tome(steps, ratio) for ratio in (0.25, 0.5, 0.75)),
    ]
    even = [
        Method(f"even steps, every {every}, order {order}", "ours", caching(every=every, order=order), steps)
        for every in (2, 3, 5)
        for order in (0, 1, 2)
    ]
    times = counted(pipeline, [original, *peers, *even], steps, rounds)
    speedups = {name: times["original"] / time for name, time in times.items()}
    targets = {peer.name: speedups[peer.name] for peer in peers if speedups[peer.name] >= LEAST_GAIN}
    observed = observe_sampling(pipeline, steps=steps, data=data)
    limit = observed.costs[1][0] / observed.costs[1][1]
    schedules = {
        f"calibrated, as fast as {name}": observed.schedule(speedup)
        for name, speedup in {f"{target:g}x": target, **targets}.items()
        if speedup < limit
    }
    ours = [Method(name, "ours", caching(schedule=schedule), steps) for name, schedule in schedules.items()]
    again = counted(pipeline, [original, *ours], steps, rounds)
    speedups |= {name: again["original"] / time for name, time in again.items()}
    whole = final_latents(pipeline, original, prompts, steps)
    rows: list[dict[str, Any]] = []
    for entry in [*peers, *even, *ours]:
        moved = final_latents(pipeline, entry, prompts, steps) - whole
        schedule = schedules.get(entry.name)
        rows.append(
            {
                "name": entry.name,
                "speedup": speedups[entry.name],
                "distance": float(moved.square().mean() / whole.square().mean()),
                "computed": " ".join(map(str, schedule.full_steps)) if schedule else "",
                "depth": schedule.depth if schedule else "",
                "order": schedule.order if schedule else "",
                "damping": schedule.damping if schedule else "",
            }
        )
    finish("inheritance", rows)


def counted(pipeline: DiffusionPipeline, entries: Sequence[Method], steps: int, rounds: int) -> dict[str, float]:
    """Seconds of all UNet calls of one image, each step's the fastest of the rounds."""
    fastest: dict[str, list[float]] = {}
    for _ in range(rounds + 1):  # the first warms up, and counts too: what is slow is not the fastest
        for entry in entries:
            with entry.prepared(pipeline) as ready, timing_modules(ready.unet, [""], ready.device) as times:
                draw(ready, ["a photograph"], steps)
            seconds = times[""]
            fastest[entry.name] = [min(pair) for pair in zip(seconds, fastest.get(entry.name, seconds), strict=True)]
    return {name: sum(seconds) for name, seconds in fastest.items()}


def final_latents(pipeline: DiffusionPipeline, entry: Method, prompts: list[str], steps: int) -> Tensor:
    at_once = 16 if pipeline.unet.config.sample_size <= 32 else 1
    with entry.prepared(pipeline) as ready:
        batches = [draw(ready, prompts[i : i + at_once], steps, i) for i in range(0, len(prompts), at_once)]
    return torch.cat(batches).float()


def draw(pipeline: DiffusionPipeline, prompts: list[str], steps: int, seed: int = 0) -> Tensor:
    latents: Tensor = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=default_guidance(pipeline),
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        output_type="latent",
    ).images
    return latents


if __name__ == "__main__":
    run(app)
