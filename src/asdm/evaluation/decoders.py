"""A tiny decoder beside the VAE that taught it: the images of the same latents, and the time that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from pydantic import Field
from torch import Tensor

from asdm.data.examples import Example, load_pixels
from asdm.data.prepared import PreparedData, is_prepared
from asdm.data.sources import open_data
from asdm.diffusion.conditioning import decode_latents, encode_images, image_size, latent_shape
from asdm.errors import AsdmError
from asdm.evaluation.metrics import Judge, feature_distance, nearest_of, psnr
from asdm.evaluation.real_images import features_of
from asdm.measure.latency import Ratio, measure_interleaved
from asdm.pipelines.decoders import with_decoder
from asdm.records import Record

SAMPLES = 128
GALLERY = 4096  # other images that the judge looks among


class DecoderComparison(Record):
    """A tiny decoder beside the VAE. PSNR is in dB, the mean over images, of values clamped to [-1, 1]."""

    parameters: int = Field(description="Of the decoder, without the encoder.")
    vae_parameters: int = Field(description="Of the VAE's decoder.")
    vae_ms: float = Field(description="Latency of the VAE's decoder, one image.")
    ms: float = Field(description="Latency of the tiny one.")
    speedup: float = Field(description="How many times faster it is.")
    speedup_interval: tuple[float, float] = Field(description="Holds the true speed-up.")
    images: int = Field(description="How many latents were decoded.")
    psnr: float = Field(description="Of the tiny decoder's images against the VAE's.")
    vae_real_psnr: float | None = Field(None, description="Of the VAE's images against the real ones.")
    real_psnr: float | None = Field(None, description="Of the tiny decoder's images against the real ones.")
    told_apart: float | None = Field(
        None,
        description="Share of the images for which the judge's nearest real image is another one than for the VAE's "
        "image; without real images, whose nearest image of the VAE is another one than of the same latents.",
    )
    distance: float | None = Field(None, description="Mean 1 - cosine of the judge's features of both images.")

    @property
    def ratio(self) -> Ratio:
        """The speed-up with its interval."""
        return Ratio(self.speedup, *self.speedup_interval)


@dataclass(frozen=True)
class DecodedSet:
    """Latents (images, channels, h, w) to decode. `real` (images, 3, height, width) are the images that they were made
    of, and `gallery` has those that the judge looks among; None where there are none."""

    latents: Tensor
    real: Tensor | None = None
    gallery: Sequence[Example] | None = None


def held_out_set(pipeline: DiffusionPipeline, data: str | Path, samples: int = SAMPLES) -> DecodedSet | None:
    """Return the latents of a source's held-out images, or of others where none are held out; None of captions."""
    if is_prepared(data):
        return None
    size = image_size(pipeline)
    examples = open_data(data, "held_out").examples or open_data(data).examples
    if not examples or examples[0].file is None:
        return None
    examples, pixels = load_pixels(examples[:samples], size, {})
    if not pixels:
        return None
    known = set(examples)
    others = [example for example in open_data(data, "all").examples if example not in known][:GALLERY]
    real = torch.stack(pixels)
    return DecodedSet(encode_images(pipeline.vae, real), real, [*examples, *others])


def prepared_set(prepared: PreparedData, samples: int = SAMPLES) -> DecodedSet:
    """Return the first prepared latents."""
    return DecodedSet(prepared.batch(range(min(samples, len(prepared))))[0])


@torch.no_grad()
def compare_decoder(
    pipeline: DiffusionPipeline, decoder: AutoencoderTiny, of: DecodedSet, *, rounds: int = 5
) -> DecoderComparison:
    """Decode latents by the pipeline's VAE and by a tiny decoder, compare the images, and time both in turns."""
    tiny = with_decoder(pipeline, decoder)
    before, after = (decode_latents(each, of.latents).float().cpu().clamp(-1, 1) for each in (pipeline, tiny))
    channels, height, width = latent_shape(pipeline)
    one = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    calls = {name: partial(decode_latents, each, one) for name, each in (("vae", pipeline), ("tiny", tiny))}
    times = measure_interleaved(calls, rounds=rounds, device=pipeline.device)
    ratio = times.speedup("vae", "tiny")
    return DecoderComparison(
        parameters=_count(decoder.decoder),
        vae_parameters=_count(getattr(pipeline.vae, "decoder", pipeline.vae)),
        vae_ms=times["vae"].ms,
        ms=times["tiny"].ms,
        speedup=ratio.value,
        speedup_interval=ratio.interval,
        images=len(of.latents),
        psnr=float(psnr(after, before).mean()),
        **_against_real(before, after, of),
        **_judged(before, after, of, image_size(pipeline)),
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _against_real(before: Tensor, after: Tensor, of: DecodedSet) -> dict[str, float]:
    if of.real is None:
        return {}
    return {"vae_real_psnr": float(psnr(before, of.real).mean()), "real_psnr": float(psnr(after, of.real).mean())}


def _judged(before: Tensor, after: Tensor, of: DecodedSet, size: int) -> dict[str, float]:
    """Return what the judge says, where it is installed."""
    try:
        judge = Judge()
    except AsdmError:
        return {}
    features = judge.features(before), judge.features(after)
    if of.gallery is None:
        expected, found = list(range(len(before))), nearest_of(features[1], features[0])
    else:
        _, gallery = features_of(judge, of.gallery, size)
        expected, found = (nearest_of(each, gallery) for each in features)
    apart = sum(one != other for one, other in zip(expected, found, strict=True))
    return {"told_apart": apart / len(before), "distance": feature_distance(*features)}
