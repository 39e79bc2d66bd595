"""UNet calls on a GPU without the wait for launches: eager, compiled, and as CUDA graphs. Prints and writes one table.

python benchmarks/gpu.py                       # SD 1.5's shape and two students, float16 and bfloat16, 1 and 8 images
python benchmarks/gpu.py --shape sdxl --preset ssd-1b --images 1
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from common import finish, run

from asdm import checks
from asdm.devices import on_device
from asdm.errors import AsdmError, one_line
from asdm.families import family_of, macs_of_call
from asdm.measure.latency import measure_interleaved
from asdm.measure.limits import machine_limits
from asdm.pipelines.random_models import UNETS, random_unet
from asdm.planning.budget import make_plan, require_budget
from asdm.sensitivity.analysis import structure_map
from asdm.student.build import build_student

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ORIGINAL = "original"
WARMUP = 3  # calls before a graph is captured, as torch's documentation has it
Call = Callable[[], Any]


@app.command()
def main(
    shape: str = "sd15",
    preset: Annotated[list[str], typer.Option()] = ["a-sdm-fast", "bk-tiny"],  # noqa: B006
    dtype: Annotated[list[str], typer.Option()] = ["float16", "bfloat16"],  # noqa: B006
    images: Annotated[list[int], typer.Option()] = [1, 8],  # noqa: B006
    rounds: int = 5,
    device: str = "cuda",
) -> None:
    """Measure a shape's UNet and its presets' students, all ways in turns in one process."""
    checks.one_of(*UNETS)("shape", shape)
    for name in preset:
        require_budget(None, None, None, name)
    for name in dtype:
        checks.one_of("float32", "float16", "bfloat16")("dtype", name)
    if device == "cuda" and not torch.cuda.is_available():
        raise AsdmError("device=cuda: torch sees no GPU here; run it on a machine with one")
    on_device(torch.empty(0), device)
    original = random_unet(dict(UNETS[shape]))
    structure = structure_map(original, f"random:{shape}")
    models = {ORIGINAL: original} | {
        name: build_student(original, make_plan(structure, preset=name, compensate="none")) for name in preset
    }
    dtypes = [getattr(torch, name) for name in dtype]
    rows = measured(models, dtypes, images, device, rounds, machine_limits(device, dtypes))
    finish(f"gpu_{shape}", rows, device, rounds=rounds)


@torch.no_grad()
def measured(
    models: Mapping[str, Any],
    dtypes: Sequence[torch.dtype],
    images: Sequence[int],
    device: str,
    rounds: int,
    limits: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Return a row for each model, dtype, number of images (two samples each, for guidance) and way to call it.

    Args:
        limits: the best throughput in GFLOP/s by dtype, as `machine_limits` measures it.
    """
    macs = {name: macs_of_call(model).below() for name, model in models.items()}
    rows = []
    for dtype in dtypes:
        best = max(limits[str(dtype).removeprefix("torch.")].values())
        for count in images:
            calls: dict[tuple[str, str], Call] = {}
            failed: dict[tuple[str, str], str] = {}
            for name, model in models.items():
                for way, make in WAYS.items():
                    try:
                        calls[name, way] = make(copy.deepcopy(model).to(device, dtype), 2 * count)
                    except Exception as error:  # of compilers and drivers, any kind
                        failed[name, way] = one_line(error)
            named = {"|".join(key): call for key, call in calls.items()}
            timing = measure_interleaved(named, rounds=rounds, device=device)
            about = {"dtype": str(dtype).removeprefix("torch."), "images": count}
            for name, way in calls:
                latency = timing[f"{name}|{way}"]
                rate = 2 * macs[name] * 2 * count / latency.ms / 1e6  # GFLOP/s: two operations a MAC
                row = {"model": name, "way": way, **about, "ms": latency.ms, "high_ms": latency.high_ms}
                ratio = timing.speedup(f"{ORIGINAL}|eager", f"{name}|{way}")
                rows.append({**row, "faster": str(ratio), "of_the_best": rate / best})
            rows += [{"model": name, "way": way, **about, "error": why} for (name, way), why in failed.items()]
            calls.clear()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def eager(model: Any, samples: int) -> Call:
    """The model as it is, in channels_last memory."""
    model.to(memory_format=torch.channels_last)
    family = family_of(model)
    arguments = family.random_inputs(model, samples)
    return lambda: family.predict(model, arguments)


def compiled(model: Any, samples: int) -> Call:
    """The repeated blocks compiled, as diffusers does it."""
    model.compile_repeated_blocks()
    return warmed(eager(model, samples))


def graphed(make: Callable[[Any, int], Call]) -> Callable[[Any, int], Call]:
    """The same kernels as another way's, launched at once from a CUDA graph."""

    def made(model: Any, samples: int) -> Call:
        call, graph, stream = make(model, samples), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warmed(call)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            kept = call()  # the graph writes into this tensor
        return lambda: (graph.replay(), kept)[1]

    return made


def warmed(call: Call) -> Call:
    """Make a few calls, in which kernels are compiled and chosen."""
    for _ in range(WARMUP):
        call()
    return call


WAYS: dict[str, Callable[[Any, int], Call]] = {
    "eager": eager,
    "compiled": compiled,
    "CUDA graph": graphed(eager),
    "compiled, CUDA graph": graphed(compiled),
}
"""Ways to call a model. A way that the device or its compiler refuses is a row with the reason."""


if __name__ == "__main__":
    run(app)
