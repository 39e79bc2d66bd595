"""Exported OpenVINO graphs as modules of a diffusers pipeline. The pipeline's loop stays as it is.

`optimum.intel` has its own pipelines for such folders; these modules do not need it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from asdm import checks
from asdm.diffusion.conditioning import encode_images
from asdm.digests import short_digest
from asdm.errors import AsdmError, NoSuchPartError, needs_extra
from asdm.families import CacheCut, UNetFamily
from asdm.files import read_marker
from asdm.measure.latency import measure_interleaved
from asdm.old_names import OLD_EXPORT_SETTINGS, OLD_OUTER_GRAPH_INPUT, renamed
from asdm.pipelines.damaged import refuse_damaged
from asdm.pipelines.derived import with_unet
from asdm.reading import read_json
from asdm.runtime.graphs import CACHED_FEATURES
from asdm.runtime.writers import FILES


@checks.arguments(pipeline=checks.PIPELINE, folder=checks.path)
def with_openvino_graphs(pipeline: DiffusionPipeline, folder: str | Path) -> DiffusionPipeline:
    """Make a second pipeline whose UNet and VAE decoder are the graphs that `asdm.export` wrote to `folder`.

    They run on the CPU. The text encoder, the VAE's encoder, the scheduler and the loop stay torch's. `pipeline` is the
    one that was exported, or a student's teacher. The graphs compute in bfloat16 if OpenVINO chooses it and it is
    measured to be faster than float32.

    Raises:
        AsdmError: OpenVINO is not installed, or the folder holds no such graphs.
    """
    folder = Path(folder)
    about = renamed(read_marker(folder), OLD_EXPORT_SETTINGS)
    if about.get("format") != "openvino":
        raise AsdmError(f"{folder}: holds no OpenVINO graphs; write them with `asdm export MODEL --to openvino`")
    with refuse_damaged(folder, "export them again"):
        unet = OpenVinoUNet(folder, about, pipeline.vae_scale_factor)
        vae = OpenVinoVae(folder / "vae_decoder", pipeline.vae)
        other = with_unet(pipeline, unet)  # type: ignore[arg-type]
        other.register_modules(vae=vae)
    return other


def _config_of(folder: Path) -> FrozenDict:
    return FrozenDict(read_json(folder / "config.json"))


PRECISIONS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # by OpenVINO's names


@cache
def compile_options(threads: int) -> dict[str, Any]:
    """Return OpenVINO's options for a number of threads. They ask for float32 if a convolution is measured to be faster
    in it than in OpenVINO's own choice: some CPUs' bfloat16 instructions are slower."""
    import openvino
    from openvino import opset13 as ops

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    in_float32 = options | {"INFERENCE_PRECISION_HINT": "f32"}
    image = np.ones((2, 320, 32, 32), np.float32)
    given = ops.parameter(image.shape, np.float32)
    kernel = ops.constant(np.ones((320, 320, 3, 3), np.float32))
    model = openvino.Model([ops.convolution(given, kernel, *[[1, 1]] * 4)], [given])

    def call(chosen: dict[str, Any]) -> Callable[[], Any]:
        compiled = openvino.Core().compile_model(model, "CPU", chosen)
        return lambda: compiled([image])

    times = measure_interleaved({"own": call(options), "float32": call(in_float32)})
    return in_float32 if times["float32"].ms < times["own"].ms else options


class _Graph(nn.Module):
    """A graph, compiled for the last two sets of input shapes: guidance may end within each image."""

    def __init__(self, path: Path):
        super().__init__()
        with needs_extra("openvino", "OpenVINO graphs"):
            import openvino
        self._files = (path, path.with_suffix(".bin"))
        self.megabytes = self._files[1].stat().st_size / 1e6
        self._core = openvino.Core()
        self._model = self._core.read_model(path)
        self._read = {name for each in self._model.inputs for name in each.names}
        self._compiled: dict[str, Any] = {}  # by shapes, the last used at the end

    def weights_digest(self) -> str:
        """Return a digest of the graph's files, but for the names of layers, which each export numbers afresh."""
        structure, values = self._files
        with values.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return short_digest(re.sub(r' name="[^"]*"', "", structure.read_text("utf-8")), digest)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Compute the first output. Inputs that the graph does not have are ignored."""
        inputs = {name: torch.as_tensor(value).cpu() for name, value in inputs.items() if name in self._read}
        if "timestep" in inputs:  # a number in graphs of version 0.1, else of shape (1,)
            rank = self._model.input("timestep").partial_shape.rank.get_length()
            inputs["timestep"] = inputs["timestep"].reshape([1] * rank)
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        compiled = self._for({name: list(value.shape) for name, value in inputs.items()})
        arrays = {
            name: value.numpy().astype(self._model.input(name).element_type.to_dtype(), copy=False)
            for name, value in inputs.items()
        }
        return torch.from_numpy(compiled(arrays, share_inputs=True)[0].copy())

    def _for(self, shapes: dict[str, list[int]]) -> Any:
        """Compiled for these shapes: fixed ones run faster than a free batch.

        Raises:
            AsdmError: the graph was exported for others.
        """
        key = str(shapes)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            if len(self._compiled) == 2:
                del self._compiled[next(iter(self._compiled))]
            model = self._model.clone()
            try:
                model.reshape(shapes)
            except RuntimeError:
                given = ", ".join(f"{name} of {'x'.join(map(str, shape))}" for name, shape in shapes.items())
                raise AsdmError(
                    f"{given}: the graph was exported for other shapes; export the model again for this --size"
                ) from None
            compiled = self._core.compile_model(model, "CPU", compile_options(torch.get_num_threads()))
        self._compiled[key] = compiled
        return compiled

    @property
    def precision(self) -> str:
        """The dtype of its computation, known after the first call."""
        compiled = next(reversed(self._compiled.values()))
        return PRECISIONS[compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()]


class OpenVinoUNet(nn.Module):
    """Stands in for a pipeline's UNet. The features of the inner one of two graphs can be cached."""

    family = UNetFamily()

    def __init__(self, folder: Path, about: dict[str, Any], vae_scale_factor: int):
        super().__init__()
        self.about, self.vae_scale_factor = about, vae_scale_factor
        self.dtype, self.device = torch.float32, torch.device("cpu")
        # Of the architecture, which cache schedules are compared with.
        self.fingerprint: str | None = about.get("fingerprint")
        names = ("unet_inner", "unet_outer") if (folder / "unet_inner").is_dir() else ("unet",)
        *inner, self.outer = (_Graph(folder / name / FILES["openvino"]) for name in names)
        self.inner = inner[0] if inner else None
        self.config = _config_of(folder / names[0])
        # SDXL's pipelines read its width.
        width = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise NoSuchPartError(
                f"{name}: exported graphs have no such part; use the pipeline before with_openvino_graphs"
            ) from error

    def __reduce__(self) -> NoReturn:
        raise AsdmError("exported graphs are not copied; use the pipeline before with_openvino_graphs")

    @property
    def megabytes(self) -> float:
        return self.outer.megabytes + (self.inner.megabytes if self.inner is not None else 0.0)

    @property
    def precision(self) -> str:
        return "int8" if self.about.get("int8") == "activations" else self.outer.precision

    def weights_digest(self) -> str:
        """Return a digest of its graphs."""
        graphs = [self.outer] if self.inner is None else [self.inner, self.outer]
        return short_digest(*(graph.weights_digest() for graph in graphs))

    def cache_cut(self, depth: int) -> CacheCut:
        """Return where features can be cached: at the exported cut.

        Raises:
            AsdmError: it was exported as one graph, or at another depth.
        """
        exported = self.about.get("cache")
        if self.inner is None:
            raise AsdmError("this UNet is one graph, in which nothing can be cached; export it with cache=1")
        if depth != exported:
            raise AsdmError(
                f"depth={depth}: these graphs were exported for depth {exported}; export others with cache={depth}"
            )
        return CacheCut(["inner"], frozenset(["inner"]))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        unknown = [name for name, value in others.items() if value is not None]
        if unknown:
            raise AsdmError(f"{', '.join(unknown)}: not part of the exported graph; use the torch pipeline for that")
        self._require_size(sample)
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        inputs |= added_cond_kwargs or {}
        if self.inner is not None:
            inputs |= dict.fromkeys((CACHED_FEATURES, OLD_OUTER_GRAPH_INPUT), self.inner(**inputs))
        predicted = self.outer(**inputs)
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)

    def _require_size(self, sample: Tensor) -> None:
        height, width = (side * self.vae_scale_factor for side in sample.shape[-2:])
        exported = self.config["sample_size"] * self.vae_scale_factor
        if (width, height) != (exported, exported):
            remedy = f"export others with --size {width}" if width == height else "use the torch pipeline for that"
            raise AsdmError(
                f"{width}x{height} pixels: these graphs were exported for {exported}x{exported}; generate at that "
                f"size, or {remedy}"
            )


class OpenVinoVae(nn.Module):
    """Stands in for a pipeline's VAE. It decodes by a graph; the original still encodes.

    The graph may be of a tiny decoder, whose latents have another scale than the original VAE's.
    """

    def __init__(self, folder: Path, original: Any):
        super().__init__()
        self.config = _config_of(folder)
        scale = self.config["scaling_factor"]
        if not (isinstance(scale, int | float) and 0 < scale < math.inf):
            raise ValueError(f"scaling_factor={scale}: must be a number above 0")
        same_scale = scale == original.config.scaling_factor
        self.encode = partial(_encode, original) if same_scale else partial(_encode_rescaled, original, self.config)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.graph = _Graph(folder / FILES["openvino"])

    def __deepcopy__(self, _: Any) -> OpenVinoVae:
        return self  # a graph is never changed, and cannot be copied

    def weights_digest(self) -> str:
        """Return a digest of its graph; the encoder makes no images."""
        return self.graph.weights_digest()

    def decode(self, latents: Tensor, return_dict: bool = True, **_: Any) -> Any:
        sample = self.graph(latent_sample=latents.float())
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def _encode(vae: Any, images: Tensor, **_: Any) -> AutoencoderKLOutput | AutoencoderTinyOutput:
    """Return what a VAE makes of images, in their dtype: a pipeline's may be another than the VAE's."""
    encoded = vae.encode(images.to(vae.dtype))
    if hasattr(encoded, "latents"):
        return AutoencoderTinyOutput(latents=encoded.latents.to(images.dtype))
    parameters = encoded.latent_dist.parameters.to(images.dtype)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))


def _encode_rescaled(vae: Any, config: Any, images: Tensor, **_: Any) -> AutoencoderTinyOutput:
    """Return a VAE's latents of images, in their dtype, in the scale that a `config` names."""
    latents = encode_images(vae, images) / config["scaling_factor"]
    return AutoencoderTinyOutput(latents=latents.to(images.dtype))
