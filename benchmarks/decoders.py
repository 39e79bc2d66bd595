"""How fast latents can be decoded: a tiny decoder, and the ways to run the VAE's own, beside the VAE as it comes.

    python benchmarks/decoders.py                         # SD 1.5's shape with random weights, 256 pixels
    python benchmarks/decoders.py MODEL --decoder FOLDER  # any model, with a tiny decoder made for it

The ways are those that `asdm.optimize` tries. With random weights the speed alone means something.
"""

from __future__ import annotations

import torch
import typer
from common import finish, run

import asdm
from asdm.families import denoiser_of
from asdm.runtime.decoding import AUTO, optimize_decoder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@torch.no_grad()
def main(model: str = "random:sd15", decoder: str = "random:taesd", size: int = 256, rounds: int = 5) -> None:
    """Time each way to decode one image in turns with the VAE."""
    pipeline = asdm.load_pipeline(model)
    denoiser_of(pipeline).register_to_config(sample_size=size // pipeline.vae_scale_factor)
    rows = []
    for tried in (decoder, AUTO):
        _, measures = optimize_decoder(pipeline, decoder=tried, max_error=1e-3, rounds=rounds)
        rows += [
            {
                "decoder": measure.name.removeprefix("decoder: "),
                "speedup": measure.reason if measure.speedup is None else str(measure.speedup),
                "error": measure.error,
            }
            for measure in measures
        ]
    finish("decoders", rows, model=model, size=size, dtype="float32")


if __name__ == "__main__":
    run(app)
