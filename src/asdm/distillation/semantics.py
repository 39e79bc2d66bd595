"""What images mean, for semantic-aware supervision (SAS; our reading of the abstract of arXiv 2312.15516, inferred).

A frozen encoder maps x_0 estimates to features; teacher and student are compared there. Three encoders have one small
interface: the teacher's own denoiser, the pipeline's CLIP, and any vision model of transformers. Others are registered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm.diffusion.conditioning import Conditioning, predict, unscaled
from asdm.diffusion.parameterization import Parameterization, parameterization_of
from asdm.errors import AsdmError, one_line
from asdm.families import Denoiser, denoiser_of, family_of
from asdm.pipelines.clip import clip_statistics, load_clip, load_clip_tokenizer, load_tokenizer
from asdm.pipelines.decoders import load_decoder
from asdm.pipelines.transformers_models import load_transformers_model, local_folder
from asdm.pipelines.untrusted import without_network

TIMESTEP = 0.2  # part of the schedule at which the denoiser reads latents: little noise, so that meaning shows


class SemanticEncoder(Protocol):
    """Frozen; gradients pass through to the latents."""

    def __call__(self, latents: Tensor, captions: Conditioning) -> Tensor:
        """Latents (batch, channels, h, w) of clean images to features (batch, channels)."""
        ...

    def text_features(self, prompts: list[str]) -> Tensor | None:
        """Features (prompts, channels) of captions in the same space; None where the encoder has no text tower."""
        ...


EncoderMaker = TypeVar("EncoderMaker", bound=Callable[[DiffusionPipeline], SemanticEncoder])
_ENCODERS: dict[str, Callable[[DiffusionPipeline], SemanticEncoder]] = {}


def register_encoder(name: str) -> Callable[[EncoderMaker], EncoderMaker]:
    """Make an encoder known by a name (a decorator of its class, or of a function, that gets the teacher's
    pipeline)."""

    def register(make: EncoderMaker) -> EncoderMaker:
        _ENCODERS[name] = make
        return make

    return register


class DenoiserEncoder:
    """Features of re-noised latents in the middle of the teacher: no decoding, and no model beside the teacher.

    The noise is always the same, so that equal latents have equal features.

    Raises:
        AsdmError: the teacher has no module whose output says what an image means.
    """

    def __init__(self, denoiser: Denoiser, parameterization: Parameterization):
        path = family_of(denoiser).semantic_module(denoiser)
        if path is None:
            raise AsdmError("semantics: the teacher has no mid block; choose the encoder clip, or the recipe joint")
        self.denoiser, self.parameterization, self.path = denoiser, parameterization, path
        self.timestep = int(TIMESTEP * parameterization.num_timesteps)

    def __call__(self, latents: Tensor, captions: Conditioning) -> Tensor:
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
        timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
        noisy = self.parameterization.add_noise(latents, noise.expand_as(latents), timesteps)
        dtype = self.denoiser.dtype
        found: list[Any] = []

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output)
            raise _Seen

        handle = self.denoiser.get_submodule(self.path).register_forward_hook(stop)
        try:
            predict(self.denoiser, noisy.to(dtype), timesteps, captions.to(dtype))
        except _Seen:
            pass
        finally:
            handle.remove()
        return family_of(self.denoiser).block_io(self.denoiser, self.path).image_states(found[0]).flatten(1)

    def text_features(self, prompts: list[str]) -> None:
        return None


@register_encoder("unet")
def _denoiser_encoder(pipeline: DiffusionPipeline) -> DenoiserEncoder:
    return DenoiserEncoder(denoiser_of(pipeline), parameterization_of(pipeline.scheduler))


class _Seen(Exception):
    """The module has answered; the rest of the denoiser is not needed."""


class VisionEncoder:
    """A vision model of transformers on decoded images: CLIP's image features, else the mean of the last hidden
    states, over tokens or over a feature map.

    Args:
        decoder: a VAE with `decode`; a tiny one (AutoencoderTiny) is enough.
        tokenizer: of the model's text tower, where it has one.
        mean, deviation: by which the model wants pixels in [0, 1] to be normalised.
        size: the side of the images that it reads, where its config does not say.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Any,
        tokenizer: Any = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        deviation: Sequence[float] = (0.5, 0.5, 0.5),
        size: int | None = None,
    ):
        self.model, self.decoder, self.tokenizer = model.eval().requires_grad_(False), decoder, tokenizer
        config: Any = model.config
        own = getattr(getattr(config, "vision_config", config), "image_size", None) or size
        if own is None:
            raise AsdmError(
                f"semantics: {config.model_type}: does not say what size of images it reads; choose another"
            )
        self.size: int = own
        self.is_clip = hasattr(model, "get_image_features")
        self.mean, self.deviation = (torch.tensor(values).view(3, 1, 1) for values in (mean, deviation))

    def __call__(self, latents: Tensor, captions: Conditioning) -> Tensor:
        images = self.decoder.decode(unscaled(self.decoder, latents.to(self.decoder.dtype))).sample.float()
        images = F.interpolate(images / 2 + 0.5, size=(self.size, self.size), mode="bilinear", antialias=True)
        pixels = (images - self.mean.to(images)) / self.deviation.to(images)
        if self.is_clip:
            return _tensor(self.model.get_image_features(pixel_values=pixels))  # type: ignore[operator]
        states = self.model(pixel_values=pixels).last_hidden_state
        return states.mean(dim=(2, 3)) if states.ndim == 4 else states.mean(dim=1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor | None:
        if not self.is_clip or self.tokenizer is None:
            return None
        config: Any = self.model.config
        longest = min(self.tokenizer.model_max_length, config.text_config.max_position_embeddings)
        tokens = self.tokenizer(prompts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        device = next(self.model.parameters()).device
        parts = tokens.input_ids.split(256)
        features = [_tensor(self.model.get_text_features(input_ids=part.to(device))) for part in parts]  # type: ignore[operator]
        return torch.cat(features)


def _side(processor: Any) -> int | None:
    """Return the side of the images that a processor makes."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or processor.size
    return size.get("height") or size.get("shortest_edge")


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def make_encoder(
    name: str, pipeline: DiffusionPipeline, decoder: str | None = None, *, reads_captions: bool = True
) -> SemanticEncoder:
    """Make an encoder by name.

    Args:
        name: "unet", the pipeline's denoiser; another registered name; "clip", the CLIPModel beside the pipeline; or
            a vision model of transformers, by Hub id or folder.
        decoder: Hub id or folder of a tiny decoder; the pipeline's VAE by default.
        reads_captions: whether its text tower is needed; "clip" then needs a tokenizer of CLIP's.

    Raises:
        AsdmError: there is no such model, no CLIPModel beside the pipeline, or no tokenizer for it.
    """
    if name in _ENCODERS:
        return _ENCODERS[name](pipeline)
    from transformers import AutoImageProcessor, AutoModel

    try:
        vae = pipeline.vae if decoder is None else load_decoder(decoder, pipeline).eval()
        vae = vae.requires_grad_(False).to(pipeline.device)
        if name == "clip":
            clip = load_clip(pipeline)
            if clip is None:
                raise AsdmError(
                    "semantics: no clip folder beside this pipeline; choose the encoder unet, or name a vision model"
                )
            tokenizer = load_clip_tokenizer(clip.name_or_path, pipeline) if reads_captions else None
            return VisionEncoder(clip.to(pipeline.device), vae, tokenizer, *clip_statistics(clip))
        place = local_folder(name)
        model = load_transformers_model(AutoModel, place, whole=False).to(pipeline.device)
        tokenizer = load_tokenizer(place) if hasattr(model, "get_text_features") else None
        with without_network():
            processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
        return VisionEncoder(model, vae, tokenizer, processor.image_mean, processor.image_std, _side(processor))
    except (OSError, ValueError) as error:
        if isinstance(error, AsdmError):
            raise
        raise AsdmError(f"semantics: {name}: no such encoder ({one_line(error)})") from None
