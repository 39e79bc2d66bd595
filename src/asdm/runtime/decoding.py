"""The best way to decode on the machine at hand: a tiny decoder, or the VAE in another memory format, in tiles or in
OpenVINO. All ways are timed in turns, and the fastest one that keeps the images is taken."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from asdm.data.calibration import DEFAULT_PROMPTS
from asdm.diffusion.conditioning import decode_latents, image_size, latent_shape, unscaled
from asdm.diffusion.generation import default_guidance, most_steps, pipeline_arguments
from asdm.diffusion.kinds import is_random
from asdm.errors import one_line
from asdm.measure.latency import measure_interleaved
from asdm.pipelines.decoders import is_tiny, with_decoder
from asdm.pipelines.derived import with_vae
from asdm.pipelines.quiet import quiet
from asdm.runtime.graphs import decoder_graph
from asdm.runtime.measures import Measure, is_worth_it, relative_error
from asdm.runtime.openvino import OpenVinoVae
from asdm.runtime.writers import FILES, Int8, writer

AUTO = "auto"  # the VAE's own decoder
SAMPLED = 2  # latents on which images are compared, and on which 8 bits take their ranges
SAMPLING_STEPS = 8
Make = Callable[[], Any]
"""Makes a VAE."""


@torch.no_grad()
def optimize_decoder(
    pipeline: DiffusionPipeline,
    *,
    decoder: str | Path,
    max_error: float,
    rounds: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[Any, list[Measure]]:
    """Try ways to decode, and return the VAE of the best one, None where the pipeline's own is that, and all measures.

    Args:
        pipeline: with the VAE whose images count as right. It is not changed.
        decoder: a tiny decoder, as for `with_decoder`, which is taken whatever it gains; or "auto", for the VAE's own
            decoder in channels-last memory, in tiles, and in OpenVINO, in float and with convolutions in 8 bits.
        max_error: relative squared error of the images, up to which a way of "auto" is taken.

    Raises:
        AsdmError: the tiny decoder does not fit.
    """
    latents = _latents(pipeline)
    is_own = str(decoder) == AUTO
    ways = _ways(pipeline, latents) if is_own else _tiny_ways(pipeline, decoder)
    made: dict[str, Any] = {}
    errors: dict[str, float] = {}
    faults: dict[str, str] = {}
    reference = decode_latents(pipeline, latents).cpu()
    for name, make in ways.items():
        if progress is not None:
            progress(name)
        try:
            vae = make()
            errors[name] = relative_error(decode_latents(with_vae(pipeline, vae), latents).cpu(), reference)
            made[name] = vae
        except (RuntimeError, ValueError, NotImplementedError, OSError) as problem:
            faults[name] = one_line(problem, 100)
    decoders = {"now": pipeline} | {name: with_vae(pipeline, vae) for name, vae in made.items()}
    calls = {name: partial(decode_latents, each, latents[:1]) for name, each in decoders.items()}
    times = measure_interleaved(calls, rounds=rounds, device=pipeline.device)
    gains = {name: times.speedup("now", name) for name in made}
    good = [name for name in made if not is_own or (is_worth_it(gains[name]) and errors[name] <= max_error)]
    best = max(good, key=lambda name: gains[name].value, default=None)
    measures = [Measure(name, gains.get(name), errors.get(name), name == best, faults.get(name, "")) for name in ways]
    return None if best is None else made[best], measures


def _ways(pipeline: DiffusionPipeline, latents: Tensor) -> dict[str, Make]:
    """Return the ways to run the VAE's own decoder, by name; none where that is a graph already."""
    vae: Any = pipeline.vae
    if isinstance(vae, OpenVinoVae):
        return {}
    ways: dict[str, Make] = {"decoder: channels last": lambda: _in_channels_last(copy.deepcopy(vae))}
    # A tiny decoder's tiles are for a factor of eight alone. Others are half a side, and a quarter of each overlaps:
    # where that is no whole latent, diffusers crops the tiles to another size than their distance.
    if not is_tiny(vae) and latent_shape(pipeline)[1] % 8 == 0:
        ways["decoder: tiles"] = lambda: _in_tiles(copy.deepcopy(vae), image_size(pipeline), latent_shape(pipeline)[1])
    if pipeline.device.type == "cpu" and vae.dtype == torch.float32:
        ways |= {
            "decoder: OpenVINO": lambda: _in_openvino(pipeline, latents, None),
            "decoder: OpenVINO int8": lambda: _in_openvino(pipeline, latents, "activations"),
        }
    return ways


def _tiny_ways(pipeline: DiffusionPipeline, decoder: str | Path) -> dict[str, Make]:
    tiny = with_decoder(pipeline, decoder).vae
    return {
        "tiny decoder": lambda: tiny,
        "tiny decoder, channels last": lambda: _in_channels_last(copy.deepcopy(tiny)),
    }


def _in_channels_last(vae: Any) -> Any:
    return vae.to(memory_format=torch.channels_last)


def _in_tiles(vae: Any, size: int, latent_side: int) -> Any:
    """Decode in overlapping tiles of half the side."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = size // 2, latent_side // 2
    return vae


def _in_openvino(pipeline: DiffusionPipeline, latents: Tensor, int8: Int8 | None) -> OpenVinoVae:
    """Export the decoder and load its graph. The files live as long as the module."""
    write = writer("openvino", int8)
    folder = tempfile.TemporaryDirectory(prefix="asdm-decoder-")
    scaled = unscaled(pipeline.vae, latents.cpu())
    calibration = [] if int8 is None else [{"latent_sample": each[None]} for each in scaled]
    graph = decoder_graph(pipeline, scaled, calibration)
    place = Path(folder.name)
    with quiet():
        write(graph, place / FILES["openvino"])
    (place / "config.json").write_text(json.dumps(graph.config, default=str), "utf-8")
    vae = OpenVinoVae(place, pipeline.vae)
    vae.files = folder  # type: ignore[assignment]
    return vae


def _latents(pipeline: DiffusionPipeline) -> Tensor:
    """Return latents (SAMPLED, channels, h, w) that the pipeline samples from general prompts; noise where its weights
    are random."""
    generator = torch.Generator().manual_seed(0)
    if is_random(pipeline):
        return torch.randn(SAMPLED, *latent_shape(pipeline), generator=generator)
    call: Any = pipeline
    with quiet():  # a tokenizer may cut these prompts, which does not matter here
        found: Tensor = call(
            list(DEFAULT_PROMPTS[:SAMPLED]),
            num_inference_steps=min(SAMPLING_STEPS, most_steps(pipeline)),
            guidance_scale=default_guidance(pipeline),
            generator=generator,
            output_type="latent",
            **pipeline_arguments(pipeline),
        ).images
    return found.float()
