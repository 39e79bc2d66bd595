"""An exported folder's OpenVINO graphs in a diffusers pipeline: OpenVINO computes, the pipeline's loop stays as it is.

`optimum.intel` has pipelines of its own for such folders; these modules need neither it nor its versions of the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from asdm import checks
from asdm.caching.session import Cut, Granularity
from asdm.errors import AsdmError, needs_extra, one_line
from asdm.files import read_marker
from asdm.measure.latency import measure_interleaved
from asdm.pipelines.derived import with_unet
from asdm.runtime.export import FILES


@checks.arguments(pipeline=checks.PIPELINE, folder=checks.path)
def with_openvino_graphs(pipeline: DiffusionPipeline, folder: str | Path) -> DiffusionPipeline:
    """A second pipeline whose UNet and VAE decoder are those that `asdm.export` wrote to `folder`, on the CPU.

    The text encoder and the VAE's encoder, which run once for an image, stay torch's; so do the scheduler and the loop.
    `pipeline` is the one that was exported, or for a student's graphs its teacher. The graphs compute in
    bfloat16 where OpenVINO chooses that and it is measured to be faster than float32.

    Raises:
        AsdmError: OpenVINO is not installed, or the folder holds no such graphs.
    """
    folder = Path(folder)
    about = read_marker(folder)
    if about.get("format") != "openvino":
        raise AsdmError(f"{folder}: holds no OpenVINO graphs; write them with `asdm export MODEL --to openvino`")
    try:
        unet, vae = OpenVinoUNet(folder, about), OpenVinoVae(folder / "vae_decoder", pipeline.vae)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, AsdmError):
            raise
        raise AsdmError(f"{folder}: its graphs cannot be read ({one_line(error)}); export them again") from error
    other = with_unet(pipeline, unet)  # type: ignore[arg-type]
    other.register_modules(vae=vae)
    return other


def _config_of(folder: Path) -> FrozenDict:
    return FrozenDict(json.loads((folder / "config.json").read_text("utf-8")))


@cache
def _options(threads: int) -> dict[str, Any]:
    """With how many threads OpenVINO computes, and in float32 where that is faster than what it would choose: there are
    CPUs whose instructions for bfloat16 are slower. Measured on a convolution."""
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
    """A graph, compiled for the shapes that it was last called with: two, as guidance may end within each image."""

    def __init__(self, path: Path):
        super().__init__()
        with needs_extra("openvino", "OpenVINO graphs"):
            import openvino
        self.megabytes = path.with_suffix(".bin").stat().st_size / 1e6
        self._core = openvino.Core()
        self._model = self._core.read_model(path)
        self._read = {name for each in self._model.inputs for name in each.names}
        self._compiled: dict[str, Any] = {}  # by shapes, the last used behind

    def forward(self, **inputs: Tensor) -> Tensor:
        """The first output; of the inputs, those that the graph reads."""
        inputs = {name: torch.as_tensor(value).cpu() for name, value in inputs.items() if name in self._read}
        inputs = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
        compiled = self._for({name: list(value.shape) for name, value in inputs.items()})
        arrays = {
            name: value.numpy().astype(self._model.input(name).element_type.to_dtype(), copy=False)
            for name, value in inputs.items()
        }
        return torch.from_numpy(compiled(arrays, share_inputs=True)[0].copy())

    def _for(self, shapes: dict[str, list[int]]) -> Any:
        """Compiled for these shapes: fixed ones run faster than a free batch."""
        key = str(shapes)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            if len(self._compiled) == 2:
                del self._compiled[next(iter(self._compiled))]
            model = self._model.clone()
            model.reshape(shapes)
            compiled = self._core.compile_model(model, "CPU", _options(torch.get_num_threads()))
        self._compiled[key] = compiled
        return compiled

    @property
    def precision(self) -> str:
        """In what it computes; known once it has been called."""
        return {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[
            next(reversed(self._compiled.values())).get_property("INFERENCE_PRECISION_HINT").get_type_name()
        ]


class OpenVinoUNet(nn.Module):
    """In the place of a UNet2DConditionModel; exported in two graphs, it can inherit the inner one's features."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        super().__init__()
        self.about = about
        self.dtype, self.device = torch.float32, torch.device("cpu")
        # Of the architecture, for a schedule of inheritance that was found for it.
        self.fingerprint: str | None = about.get("fingerprint")
        names = ("unet_inner", "unet_outer") if (folder / "unet_inner").is_dir() else ("unet",)
        *inner, self.outer = (_Graph(folder / name / FILES["openvino"]) for name in names)
        self.inner = inner[0] if inner else None
        self.config = _config_of(folder / names[0])
        # SDXL's pipelines ask it for its width.
        width = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def megabytes(self) -> float:
        return self.outer.megabytes + (self.inner.megabytes if self.inner is not None else 0.0)

    @property
    def precision(self) -> str:
        return "int8" if self.about.get("int8") == "activations" else self.outer.precision

    def cut(self, granularity: Granularity, depth: int) -> Cut:
        """Where features can be inherited: as it was exported.

        Raises:
            AsdmError: it was exported in one graph, or for another cut.
        """
        mine = self.about.get("inherit")
        if self.inner is None:
            raise AsdmError("this UNet is one graph, in which nothing can be inherited; export it with cache=1")
        if (granularity, depth) != ("layer", mine):
            raise AsdmError(
                f"granularity={granularity}, depth={depth}: these graphs were exported for granularity layer and depth "
                f"{mine}; export others with cache={depth}"
            )
        return Cut(["inner"], frozenset(["inner"]))

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
        inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        inputs |= added_cond_kwargs or {}
        if self.inner is not None:
            inputs["inherited"] = self.inner(**inputs)
        predicted = self.outer(**inputs)
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)


class OpenVinoVae(nn.Module):
    """In the place of an AutoencoderKL, which still encodes."""

    def __init__(self, folder: Path, original: Any):
        super().__init__()
        self.encode = original.encode
        self.config = _config_of(folder)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.graph = _Graph(folder / FILES["openvino"])

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (self.graph(latent_sample=latents.float()),)
