"""The parts of a pipeline as functions of named tensors, in the names that `optimum` gives them: what is exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConsistencyDecoderVAE, DiffusionPipeline
from torch import Tensor, nn

from asdm.caching.session import cut_of
from asdm.data.calibration import calibration_calls
from asdm.diffusion.conditioning import latent_shape
from asdm.errors import AsdmError
from asdm.families import BlockIO, CacheCut, denoiser_of, family_of
from asdm.measure.hooks import CachedOutput, outputs_of, swapped

CALIBRATION_STEPS = 8  # time steps at which int8's ranges are taken, each with two prompts
CACHED_FEATURES = "cached_features"  # the outer graph's input that the inner graph computes
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class Graph:
    """A part of a pipeline as a function of named tensors."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: Sequence[str]
    config: dict[str, Any]
    calibration: list[dict[str, Tensor]] = field(default_factory=list)  # inputs that int8's ranges are taken from


def names_of_graphs(pipeline: DiffusionPipeline, cache: int | None) -> list[str]:
    """Return the names of what `graphs_of` makes, in order."""
    encoders = [name for name in TOKENIZERS if getattr(pipeline, name, None) is not None]
    return ["unet", "vae_decoder", "vae_encoder", *encoders, *([] if cache is None else ["unet_inner", "unet_outer"])]


def graphs_of(
    pipeline: DiffusionPipeline, size: int, cache: int | None, calibration: list[dict[str, Tensor]]
) -> list[Graph]:
    """Return all parts of a pipeline at an image size in pixels; with `cache`, also the denoiser's two at that
    depth.

    Raises:
        AsdmError: its VAE samples, which is no graph.
    """
    if isinstance(pipeline.vae, ConsistencyDecoderVAE):
        raise AsdmError(
            "vae: a ConsistencyDecoderVAE, which samples its images and is no graph; put a tiny decoder in its place "
            "(with_decoder, --decoder)"
        )
    channels, side = latent_shape(pipeline)[0], size // pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(0)
    denoiser = _denoiser_graph(pipeline, side, generator, calibration)
    latents = torch.randn(2, channels, side, side, generator=generator)
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    vae = dict(pipeline.vae.config)
    graphs = [
        denoiser,
        decoder_graph(pipeline, latents),
        Graph("vae_encoder", _Encoder(pipeline.vae), {"sample": images}, ["latent_parameters"], vae),
    ]
    for name, tokenizer in TOKENIZERS.items():
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            length = getattr(pipeline, tokenizer).model_max_length
            ids = torch.randint(0, encoder.config.vocab_size, (2, length), generator=generator)
            module = _Text(encoder)
            graphs.append(Graph(name, module, {"input_ids": ids}, module.names(ids), encoder.config.to_dict()))
    return graphs if cache is None else [*graphs, *_cached_graphs(denoiser, cut_of(pipeline, cache))]


def decoder_graph(pipeline: DiffusionPipeline, latents: Tensor, calibration: Sequence[dict[str, Tensor]] = ()) -> Graph:
    """Return the VAE's decoder.

    Args:
        latents: an example of its input, (batch, channels, h, w), in the VAE's own scale.
    """
    inputs, config = {"latent_sample": latents}, dict(pipeline.vae.config)
    return Graph("vae_decoder", _Decoder(pipeline.vae), inputs, ["sample"], config, list(calibration))


def _denoiser_graph(
    pipeline: DiffusionPipeline, side: int, generator: torch.Generator, calibration: list[dict[str, Tensor]]
) -> Graph:
    denoiser = denoiser_of(pipeline)
    family = family_of(denoiser)
    inputs = family.random_inputs(denoiser, batch_size=2)
    inputs |= inputs.pop("added_cond_kwargs", {})
    inputs["timestep"] = torch.tensor([499.5])  # some schedulers visit time steps between whole ones
    inputs["sample"] = torch.randn(2, family.sample_shape(denoiser)[0], side, side, generator=generator)
    length = pipeline.tokenizer.model_max_length
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :1].repeat(1, length, 1)
    if calibration:  # torch and the graph are compared on one of these, as values beyond their ranges are clipped
        inputs = calibration[len(calibration) // 2]
    config = {**denoiser.config, "sample_size": side}
    return Graph("unet", _UNet(denoiser), inputs, ["out_sample"], config, calibration)


def _cached_graphs(whole: Graph, cut: CacheCut) -> list[Graph]:
    """Return the denoiser in two: "unet_inner" ends in the features at the cut, "unet_outer" begins with them."""
    denoiser: Any = whole.module.unet
    family = family_of(denoiser)
    with outputs_of(denoiser, cut.cached) as outputs:
        whole.module(**whole.inputs)
    (border,) = cut.read
    inner = _Inner(denoiser, border, family.block_io(denoiser, border))
    outer = _Outer(denoiser, cut, outputs)
    features = inner.io.image_states(outputs[border])
    return [
        replace(whole, name="unet_inner", module=inner, outputs=["features"]),
        replace(
            whole,
            name="unet_outer",
            module=outer,
            inputs={**whole.inputs, CACHED_FEATURES: features},
            calibration=[{**inputs, CACHED_FEATURES: inner(**inputs)[0]} for inputs in whole.calibration],
        ),
    ]


def calibration_inputs(pipeline: DiffusionPipeline, size: int, data: str | Path | None) -> list[dict[str, Tensor]]:
    """Inputs of denoiser calls over the whole schedule, at the size of the graph's latents."""
    calls = []
    for call in calibration_calls(pipeline, data, None, CALIBRATION_STEPS, samples=2, seed=0):
        given = call.arguments
        calls.append(
            {
                "sample": F.interpolate(given["sample"], size // pipeline.vae_scale_factor),
                "timestep": torch.tensor([float(call.timestep)]),
                "encoder_hidden_states": given["encoder_hidden_states"],
                **given.get("added_cond_kwargs", {}),
            }
        )
    return calls


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)


class _Inner(_UNet):
    """The features at the border of a cut."""

    def __init__(self, unet: nn.Module, border: str, io: BlockIO):
        super().__init__(unet)
        self.border, self.io = border, io

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        with outputs_of(self.unet, [self.border]) as outputs:
            super().forward(sample, timestep, encoder_hidden_states, text_embeds, time_ids)
        return (self.io.image_states(outputs[self.border]),)


class _Outer(_UNet):
    """The prediction from given features at the border of a cut."""

    def __init__(self, unet: nn.Module, cut: CacheCut, outputs: dict[str, Any]):
        super().__init__(unet)
        self.cut, self.outputs = cut, outputs  # an example of each module's output

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cached_features: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        def answer(output: Any, is_read: bool) -> Any:
            """Only the shape matters of an output that no computed module reads."""
            if isinstance(output, tuple):
                return tuple(answer(each, is_read) for each in output)
            batch = cached_features.shape[0]  # len() would fix it
            return cached_features if is_read else cached_features.new_zeros(batch, *output.shape[1:])

        answers = {
            name: _CachedBlock(answer(output, name in self.cut.read), self.unet.get_submodule(name))
            for name, output in self.outputs.items()
        }
        with swapped(self.unet, answers):
            return super().forward(sample, timestep, encoder_hidden_states, text_embeds, time_ids)


class _CachedBlock(CachedOutput):
    """Replaces a block, whose attributes the denoiser reads."""

    def __init__(self, output: Any, module: nn.Module):
        super().__init__(output)
        self._module = [module]  # not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._module[0], name)


class _Decoder(nn.Module):
    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        return (self.vae.decode(latent_sample).sample,)


class _Encoder(nn.Module):
    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        encoded = self.vae.encode(sample)
        if hasattr(encoded, "latent_dist"):
            return (encoded.latent_dist.parameters,)
        no_variance = torch.full_like(encoded.latents, -30.0)  # of a tiny one
        return (torch.cat([encoded.latents, no_variance], dim=1),)


class _Text(nn.Module):
    """The text encoder's outputs in the order in which optimum reads them."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._named(input_ids).values())

    def names(self, input_ids: Tensor) -> list[str]:
        return list(self._named(input_ids))

    def _named(self, input_ids: Tensor) -> dict[str, Tensor]:
        output = self.encoder(input_ids=input_ids, output_hidden_states=True)
        first = "text_embeds" if "text_embeds" in output else "last_hidden_state"
        second = "last_hidden_state" if first == "text_embeds" else "pooler_output"
        hidden = {f"hidden_states.{i}": states for i, states in enumerate(output.hidden_states)}
        return {first: output[first], second: output[second], **hidden}
