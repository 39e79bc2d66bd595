"""Tiny decoders: an AutoencoderTiny in the place of a pipeline's VAE.

The class is diffusers' own, with an encoder and a decoder. Its latents are the denoiser's, without a scaling factor. So
a pipeline with such a VAE, for text-to-image, image-to-image or inpainting, is a stock one, and saves and loads as one.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from huggingface_hub import hf_hub_download

from asdm import checks
from asdm.devices import on_device
from asdm.diffusion.kinds import RANDOM, is_random
from asdm.errors import AsdmError, one_line
from asdm.files import MARKER, replacing_folder, require_ours, write_text
from asdm.pipelines.damaged import refuse_damaged, require_finite, require_readable
from asdm.pipelines.derived import with_vae
from asdm.pipelines.names import looks_like_path
from asdm.pipelines.quiet import quiet
from asdm.pipelines.random_models import randomly_filled
from asdm.pipelines.tensor_faults import require_loaded
from asdm.pipelines.untrusted import (
    bounded_modules,
    require_no_more_than_its_files,
    require_plain_files,
    require_safe_config,
)
from asdm.reading import read_json
from asdm.registry import PIPELINES, registered_folder

KIND = "decoder"  # of a folder, in its marker
FOLDER = "decoder"  # within a registered pipeline's folder
ENCODER_BLOCKS = 3  # of a level, at most
RANDOM_DECODER = f"{RANDOM}taesd"
_CARD = """---
library_name: diffusers
tags: [asdm]
---

# {title}

An `AutoencoderTiny` of {parameters:.2f}M parameters{made_of}. It takes the place of the pipeline's VAE.

```python
from diffusers import AutoencoderTiny

pipeline.vae = AutoencoderTiny.from_pretrained("{title}").to(pipeline.device, pipeline.dtype)
```
"""


@checks.arguments(pipeline=checks.PIPELINE, decoder=checks.any_of(checks.a(AutoencoderTiny), checks.path))
def with_decoder(pipeline: DiffusionPipeline, decoder: str | Path | AutoencoderTiny) -> DiffusionPipeline:
    """Make a second pipeline that shares everything with `pipeline` but the VAE, which is a tiny one.

    Image-to-image and inpainting encode by the tiny one's encoder.

    Args:
        decoder: what `distill_decoder` trained, as a folder or as it is; a Hub id of another AutoencoderTiny; the name
            of a registered pipeline that has a folder `decoder`; or for random weights "random:taesd".

    Raises:
        AsdmError: there is none of that name, it is damaged or a pickle, or it is for other latents.
    """
    tiny = decoder if isinstance(decoder, AutoencoderTiny) else load_decoder(decoder, pipeline)
    name = str(tiny.config.get("_name_or_path") or "decoder") if isinstance(decoder, AutoencoderTiny) else str(decoder)
    require_decoder(pipeline, tiny, name)
    # diffusers takes any for one of factor 8, as TAESD is, and decodes in tiles by this factor.
    tiny.spatial_scale_factor = size_factor(tiny)
    tiny.tile_latent_min_size = tiny.tile_sample_min_size // tiny.spatial_scale_factor
    vae: Any = pipeline.vae
    with quiet():  # diffusers warns of modules that it would keep in float32, of which there are none
        return with_vae(pipeline, on_device(tiny.eval().requires_grad_(False).to(vae.dtype), vae.device))


def load_decoder(name: str | Path, pipeline: DiffusionPipeline) -> AutoencoderTiny:
    """Load a tiny decoder by its name, in float32.

    Args:
        pipeline: that it is for; only one of random weights takes a random decoder.

    Raises:
        AsdmError: there is none of that name, or it is damaged or a pickle.
    """
    name = os.fspath(name)
    if name.startswith(RANDOM):
        return _random(name, pipeline)
    place = _place_of(name)
    is_here = os.path.isdir(place)
    remedy = "train or download it again" if is_here else "name a folder of a decoder, or a Hub id"
    with refuse_damaged(name, remedy), quiet(), bounded_modules(name):
        if is_here:
            require_no_more_than_its_files(AutoencoderTiny, Path(place))
        else:
            require_safe_config(Path(hf_hub_download(place, "config.json")))
        tiny = AutoencoderTiny.from_pretrained(place, torch_dtype=torch.float32, use_safetensors=True)
    require_loaded(tiny, name, "decoder", sorted(Path(place).glob("*.safetensors")))
    require_finite(tiny, name, remedy)
    with refuse_damaged(name, remedy), torch.no_grad():  # some fields of a config count no sooner than it decodes
        tiny.decode(torch.zeros(1, tiny.config.latent_channels, 2, 2))
    tiny.register_to_config(_name_or_path=name)
    return tiny


def require_decoder_named(name: str) -> None:
    """Raise an AsdmError, before a pipeline is loaded, for a name that is a path and holds no tiny decoder. A Hub id
    passes."""
    if not name.startswith(RANDOM):
        _place_of(name)
    elif name != RANDOM_DECODER:
        raise _no_such_random(name)


def require_decoder(pipeline: DiffusionPipeline, tiny: AutoencoderTiny, name: str) -> None:
    """
    Raises:
        AsdmError: the decoder is for latents of other channels, or makes images of another size of them.
    """
    remedy = "train one for this model: asdm distill-decoder MODEL"
    wanted, found = pipeline.vae.config.latent_channels, tiny.config.latent_channels
    if found != wanted:
        raise AsdmError(f"{name}: decodes latents of {found} channels, and this model's have {wanted}; {remedy}")
    factor = size_factor(tiny)
    if factor != pipeline.vae_scale_factor:
        raise AsdmError(
            f"{name}: an image has {factor} times the latents' side, and with this model's VAE "
            f"{pipeline.vae_scale_factor} times; {remedy}"
        )
    if (tiny.config.in_channels, tiny.config.out_channels) != (3, 3):
        raise AsdmError(f"{name}: makes images of {tiny.config.out_channels} channels, not 3; {remedy}")


def size_factor(tiny: AutoencoderTiny) -> int:
    """Return how many times larger an image's side is than that of its latents."""
    factor: int = tiny.config.upsampling_scaling_factor ** (len(tiny.config.decoder_block_out_channels) - 1)
    return factor


def is_tiny(vae: Any) -> bool:
    """Return whether a VAE is a tiny one."""
    return isinstance(vae, AutoencoderTiny)


def make_tiny(latent_channels: int, width: int, blocks: Sequence[int]) -> AutoencoderTiny:
    """Make a tiny decoder of random weights, with an encoder of the same width.

    Args:
        width: channels of all layers.
        blocks: residual blocks of each level of the decoder, from the latents to the pixels. Each level has twice the
            side of the one before. The encoder has as many, but three of a level at most, as TAESD's.
    """
    widths = (width,) * len(blocks)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=tuple(min(count, ENCODER_BLOCKS) for count in reversed(blocks)),
        num_decoder_blocks=tuple(blocks),
    )


@checks.arguments(tiny=checks.a(AutoencoderTiny), folder=checks.path, about=checks.a(dict))
def save_decoder(tiny: AutoencoderTiny, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Save a tiny decoder in float16 as a folder that `with_decoder` and `AutoencoderTiny.from_pretrained` load.

    Args:
        about: goes into the folder's marker; its `teacher` is named in the card.

    Raises:
        AsdmError: `folder` exists and is no decoder that this tool wrote.
    """
    folder = Path(folder)
    require_ours(folder, KIND)
    about = about or {}
    parameters = sum(parameter.numel() for parameter in tiny.parameters()) / 1e6
    made_of = f", taught by the VAE of `{about['teacher']}`" if about.get("teacher") else ""
    with replacing_folder(folder) as partial, quiet():
        copy.deepcopy(tiny).half().save_pretrained(partial)
        write_text(partial / "README.md", _CARD.format(title=folder.name, parameters=parameters, made_of=made_of))
        (partial / MARKER).write_text(json.dumps({"kind": KIND, **about}, indent=1) + "\n", "utf-8")
    return folder


def _place_of(name: str) -> str:
    """Return the folder, or the Hub id, that a decoder's name stands for.

    Raises:
        AsdmError: a path that is no folder of a tiny decoder, or a registered pipeline that has none.
    """
    registered = registered_folder(name, PIPELINES)
    folder = Path(name) if registered is None else registered / FOLDER
    if registered is not None and not folder.is_dir():
        raise AsdmError(f"{name}: this pipeline has no decoder beside it; train one: asdm distill-decoder {name}")
    if not folder.is_dir():
        if folder.exists() or looks_like_path(name):
            raise AsdmError(f"{name}: no such folder of a decoder; name one, or a Hub id of an AutoencoderTiny")
        return name
    require_plain_files(folder)
    try:
        found = read_json(folder / "config.json")["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AsdmError(f"{name}: not a decoder in diffusers' format ({one_line(error)})") from None
    if found != AutoencoderTiny.__name__:
        raise AsdmError(f"{name}: a {found}; must be an {AutoencoderTiny.__name__}")
    require_safe_config(folder / "config.json")
    if not require_readable(folder):
        raise AsdmError(f"{name}: no .safetensors weights; pickles are not loaded, convert them first")
    return str(folder)


def _random(name: str, pipeline: DiffusionPipeline) -> AutoencoderTiny:
    """Make a decoder of TAESD's size with random weights, for as many channels and levels as the pipeline's VAE has."""
    if name != RANDOM_DECODER:
        raise _no_such_random(name)
    if not is_random(pipeline):
        raise AsdmError(f"{name}: only a model of random weights takes it, for its speed; name a trained decoder")
    levels = len(pipeline.vae.config.block_out_channels)
    blocks = (*(3,) * (levels - 1), 1)
    tiny = randomly_filled(lambda: make_tiny(pipeline.vae.config.latent_channels, 64, blocks), torch.float32)
    tiny.register_to_config(_name_or_path=name)
    return tiny  # type: ignore[no-any-return]


def _no_such_random(name: str) -> AsdmError:
    return AsdmError(f"{name}: no such decoder of random weights; allowed: {RANDOM_DECODER}")
