"""A pipeline as a folder of OpenVINO or ONNX graphs, in the layout that `optimum` loads."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from asdm import checks
from asdm.caching.session import Cut, cut_of, require_whole
from asdm.data.calibration import calibration_calls
from asdm.diffusion.conditioning import image_size, latent_shape, require_size
from asdm.diffusion.kinds import is_random
from asdm.errors import AsdmError, needs_extra
from asdm.families.unet_calls import random_inputs
from asdm.families.unet_structure import fingerprint
from asdm.files import MARKER, replacing_folder, require_ours
from asdm.measure.hooks import CachedOutput, outputs_of, swapped, tensor_of
from asdm.pipelines.quiet import quiet
from asdm.pipelines.saving import write_vocabularies

Format = Literal["openvino", "onnx"]
Int8 = Literal["weights", "activations"]
FILES = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
# Of the largest output. OpenVINO's weights are kept in half precision; 8 bits may move single values far, which is
# told, but what is off by a third is broken.
TOLERANCE, INT8_TOLERANCE = 0.02, 0.3
CALIBRATION_STEPS = 8  # time steps at which int8's ranges are taken, each with two prompts
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What an export made: the folder, and how far each graph's outputs are from torch's, relative to the largest."""

    folder: Path
    differences: dict[str, float]


@dataclass(frozen=True)
class _Graph:
    """A part of a pipeline as a function of named tensors."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: Sequence[str]
    config: dict[str, Any]
    calibration: list[dict[str, Tensor]] = field(default_factory=list)  # inputs that int8's ranges are taken from


@checks.arguments(
    pipeline=checks.PIPELINE,
    folder=checks.path,
    to=checks.literal(Format),
    size=checks.whole(),
    int8=checks.literal(Int8),
    data=checks.path,
    cache=checks.whole(),
    parts=checks.each(checks.text),
    progress=checks.function,
)
@torch.no_grad()
def export(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    to: Format = "openvino",
    *,
    size: int | None = None,
    int8: Int8 | None = None,
    data: str | Path | None = None,
    cache: int | None = None,
    parts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a pipeline, teacher or student, as graphs; OpenVINO's with weights in half precision, or in 8 bits.

    `optimum.intel.OVDiffusionPipeline.from_pretrained(folder)`, or `optimum.onnxruntime.ORTDiffusionPipeline`, loads
    it; neither needs this package. The graphs take any batch.

    Args:
        size: the side of the images in pixels, to which the graphs are fixed; by default the pipeline's own.
        int8: for OpenVINO: "weights" keeps those of all parts in 8 bits, for memory; "activations" also computes the
            UNet's convolutions in 8 bits, for speed (nncf's post-training quantisation); attention and the other linear
            layers in 8 bits move the images far.
        data: captioned images that the ranges of int8 are taken from, as for `analyze`; without it, latents that the
            pipeline itself makes from general prompts.
        cache: for `with_openvino_graphs` within `cache_features`, the UNet also in two graphs that are called one
            after the other: "unet_inner", whose features can be inherited, and "unet_outer", which is computed at
            every step: the last so many layers of the way up (`depth` of `cache_features`).
        parts: only the graphs of these names, for `with_openvino_graphs`; optimum needs all but these two.

    Raises:
        AsdmError: the format's packages are not installed, `folder` is not ours, the data cannot be used, the UNet
            inherits features, or a graph does not give what torch gives, or takes one batch alone.
    """
    if to not in FILES:
        raise AsdmError(f"to={to}: no such format; it is {' or '.join(FILES)}")
    if int8 is not None and (to != "openvino" or int8 not in get_args(Int8)):
        raise AsdmError(f"int8={int8}, to={to}: int8 is for openvino, and {' or '.join(get_args(Int8))}")
    if data is not None and int8 != "activations":
        raise AsdmError(f"data={data}, int8={int8}: only int8 activations look at data; leave it out")
    write = _openvino_writer(int8) if to == "openvino" else _onnx_writer()
    folder = Path(folder)
    require_ours(folder, "export")
    if cache is not None and to != "openvino":
        raise AsdmError(f"cache={cache}, to={to}: two graphs are for openvino")
    if pipeline.unet.config.time_cond_proj_dim is not None:
        raise AsdmError("export: this UNet is told its guidance by an embedding, which the graphs have no input for")
    if pipeline.unet.dtype != torch.float32:
        raise AsdmError(f"a pipeline in {pipeline.unet.dtype} is not exported; load it in float32, on the CPU")
    require_whole(pipeline.unet, "export")
    size = image_size(pipeline) if size is None else size
    require_size(pipeline, size)
    graphs = _graphs(pipeline, size, cache, _calibration(pipeline, size, data) if int8 == "activations" else [])
    graphs = [graph for graph in graphs if parts is None or graph.name in parts]
    tolerance = TOLERANCE if int8 is None else INT8_TOLERANCE
    if int8 is not None and is_random(pipeline):
        tolerance = math.inf  # random weights are not made for 8 bits: for speed alone
    differences = {}
    with replacing_folder(folder) as partial, quiet():
        for number, graph in enumerate(graphs, start=1):
            if progress is not None:
                progress(graph.name, number, len(graphs))
            (partial / graph.name).mkdir()
            run = write(graph, partial / graph.name / FILES[to])
            (partial / graph.name / "config.json").write_text(json.dumps(graph.config, indent=1, default=str), "utf-8")
            differences[graph.name] = _difference(graph, run, tolerance)
        about = {"format": to, "int8": int8, "inherit": cache, "fingerprint": fingerprint(pipeline.unet)}
        _write_rest(pipeline, partial, [graph.name for graph in graphs if graph.name in _PART_CLASSES[to]], about)
    return Exported(folder, differences)


def _graphs(
    pipeline: DiffusionPipeline, size: int, cache: int | None, calibration: list[dict[str, Tensor]]
) -> list[_Graph]:
    channels, side = latent_shape(pipeline)[0], size // pipeline.vae_scale_factor
    generator = torch.Generator().manual_seed(0)
    arguments = random_inputs(pipeline.unet, batch_size=2)
    arguments |= arguments.pop("added_cond_kwargs", {})
    arguments["timestep"] = torch.tensor(499.5)  # some schedulers ask between two steps
    arguments["sample"] = torch.randn(2, pipeline.unet.config.in_channels, side, side, generator=generator)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :1].repeat(
        1, pipeline.tokenizer.model_max_length, 1
    )
    latents = torch.randn(2, channels, side, side, generator=generator)
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    vae = dict(pipeline.vae.config)
    if calibration:  # compared with torch on one of these, too: what lies beyond their ranges is cut off
        arguments = calibration[len(calibration) // 2]
    config = {**pipeline.unet.config, "sample_size": side}
    unet = _Graph("unet", _UNet(pipeline.unet), arguments, ["out_sample"], config, calibration)
    graphs = [
        unet,
        _Graph("vae_decoder", _Decoder(pipeline.vae), {"latent_sample": latents}, ["sample"], vae),
        _Graph("vae_encoder", _Encoder(pipeline.vae), {"sample": images}, ["latent_parameters"], vae),
    ]
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            length = getattr(pipeline, tokenizer).model_max_length
            ids = torch.randint(0, encoder.config.vocab_size, (2, length), generator=generator)
            module = _Text(encoder)
            graphs.append(_Graph(name, module, {"input_ids": ids}, module.names(ids), encoder.config.to_dict()))
    return graphs if cache is None else [*graphs, *_inheriting_graphs(unet, cache)]


def _inheriting_graphs(whole: _Graph, depth: int) -> list[_Graph]:
    unet: Any = whole.module.unet
    cut = cut_of(unet, "layer", depth)
    with outputs_of(unet, cut.inheriting) as outputs:
        whole.module(**whole.inputs)
    (border,) = cut.read
    inner = _Inner(unet, border)
    return [
        replace(whole, name="unet_inner", module=inner, outputs=["features"]),
        replace(
            whole,
            name="unet_outer",
            module=_Outer(unet, cut, outputs),
            inputs={**whole.inputs, "inherited": tensor_of(outputs[border])},
            calibration=[{**inputs, "inherited": inner(**inputs)[0]} for inputs in whole.calibration],
        ),
    ]


def _calibration(pipeline: DiffusionPipeline, size: int, data: str | Path | None) -> list[dict[str, Tensor]]:
    """Inputs of UNet calls over the whole schedule, brought to the size of the graph's latents."""
    calls = []
    for call in calibration_calls(pipeline, data, None, CALIBRATION_STEPS, samples=2, seed=0):
        given = call.arguments
        calls.append(
            {
                "sample": F.interpolate(given["sample"], size // pipeline.vae_scale_factor),
                "timestep": torch.tensor(float(call.timestep)),
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

    def __init__(self, unet: nn.Module, border: str):
        super().__init__(unet)
        self.border = border

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
        return (tensor_of(outputs[self.border]),)


class _Outer(_UNet):
    """The prediction, where the features at the border of a cut are given."""

    def __init__(self, unet: nn.Module, cut: Cut, outputs: dict[str, Any]):
        super().__init__(unet)
        self.cut, self.outputs = cut, outputs  # an example of what each module puts out

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        inherited: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        def answer(output: Any, read: bool) -> Any:
            """Of what no computed module reads, only the shape matters."""
            if isinstance(output, tuple):
                return tuple(answer(each, read) for each in output)
            return inherited if read else inherited.new_zeros(inherited.shape[0], *output.shape[1:])

        answers = {
            name: _Answer(answer(output, name in self.cut.read), self.unet.get_submodule(name))
            for name, output in self.outputs.items()
        }
        with swapped(self.unet, answers):
            return super().forward(sample, timestep, encoder_hidden_states, text_embeds, time_ids)


class _Answer(CachedOutput):
    """In the place of a block, whose attributes the UNet asks for."""

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


def _program(graph: _Graph) -> torch.export.ExportedProgram:
    """The graph, for any batch.

    Raises:
        AsdmError: something in it is computed for the batch of the examples alone.
    """
    shapes = {name: {0: torch.export.Dim.AUTO} if value.ndim else {} for name, value in graph.inputs.items()}
    program = torch.export.export(graph.module.eval(), (), kwargs=graph.inputs, dynamic_shapes=shapes)
    examples = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    if any(value.ndim and is_concrete_int(examples[name].shape[0]) for name, value in graph.inputs.items()):
        raise AsdmError(
            f"export: {graph.name}: its graph takes no other batch than the examples'; this part cannot be exported"
        )
    return program


def _openvino_writer(int8: Int8 | None) -> Callable[[_Graph, Path], Callable[[], list[np.ndarray]]]:
    with needs_extra("openvino", "export to OpenVINO"):
        import openvino
    quantised = _quantiser() if int8 is not None else lambda model, _: model

    def write(graph: _Graph, path: Path) -> Callable[[], list[np.ndarray]]:
        model = openvino.convert_model(_program(graph))
        for output, name in zip(model.outputs, graph.outputs, strict=True):
            output.get_tensor().set_names({name})
        openvino.save_model(quantised(model, graph.calibration), path)

        def run() -> list[np.ndarray]:
            compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            read = {name for each in compiled.inputs for name in each.names}
            found = compiled({name: value.numpy() for name, value in graph.inputs.items() if name in read})
            return [found[name] for name in graph.outputs]

        return run

    return write


def _quantiser() -> Callable[[Any, list[dict[str, Tensor]]], Any]:
    """A function of an OpenVINO model and calibration inputs; without those it quantises weights alone."""
    with needs_extra("int8", "export in 8 bits"):
        import nncf
    nncf.set_log_level(logging.ERROR)

    def quantised(model: Any, calibration: list[dict[str, Tensor]]) -> Any:
        with redirect_stdout(io.StringIO()):  # its bars would break into ours
            if not calibration:
                return nncf.compress_weights(model)
            # Bias correction would run the model once more for each of its hundreds of layers.
            without = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
            convolutions, products = (
                nncf.IgnoredScope(types=[kind], validate=False) for kind in ("Convolution", "MatMul")
            )
            return nncf.quantize(
                nncf.compress_weights(model, ignored_scope=convolutions),
                nncf.Dataset(calibration, lambda call: {name: value.numpy() for name, value in call.items()}),
                subset_size=len(calibration),
                model_type=nncf.ModelType.TRANSFORMER,
                ignored_scope=products,
                advanced_parameters=without,
            )

    return quantised


def _onnx_writer() -> Callable[[_Graph, Path], Callable[[], list[np.ndarray]]]:
    with needs_extra("onnx", "export to ONNX"):
        import onnxruntime
        import onnxscript  # noqa: F401

    def write(graph: _Graph, path: Path) -> Callable[[], list[np.ndarray]]:
        names: dict[str, Any] = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
        program = torch.onnx.export(_program(graph), dynamo=True, verbose=False, **names)
        assert program is not None
        program.save(path)

        def run() -> list[np.ndarray]:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            return session.run(list(graph.outputs), {name: value.numpy() for name, value in graph.inputs.items()})

        return run

    return write


def _difference(graph: _Graph, run: Callable[[], list[np.ndarray]], tolerance: float) -> float:
    """How far the graph's outputs are from torch's, relative to the largest."""
    worst = 0.0
    for name, found, expected in zip(graph.outputs, run(), graph.module(**graph.inputs), strict=True):
        scale = max(float(expected.abs().max()), 1e-12)
        worst = max(worst, float((torch.from_numpy(found) - expected).abs().max()) / scale)
        if not worst < tolerance:
            raise AsdmError(
                f"export: {graph.name}: its {name} is {worst:.1%} off what torch gives, more than {tolerance:.0%}; "
                "this part cannot be exported to that format"
            )
    return worst


def _write_rest(pipeline: DiffusionPipeline, folder: Path, graphs: list[str], about: dict[str, Any]) -> None:
    """Tokenizers, the scheduler, and the index by which optimum finds everything."""
    for name in ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor"):
        part = getattr(pipeline, name, None)
        if part is not None:
            part.save_pretrained(folder / name)
    write_vocabularies(folder)
    to = about["format"]
    package = "intel.openvino" if to == "openvino" else "onnxruntime"
    module = f"optimum.{package}.modeling_diffusion"
    index = {name: value for name, value in pipeline.config.items() if name not in (*graphs, "vae", "safety_checker")}
    index |= {name: [module, _PART_CLASSES[to][name]] for name in graphs}
    kind = {"_class_name": type(pipeline).__name__, "_diffusers_version": index.pop("_diffusers_version", None)}
    (folder / "model_index.json").write_text(json.dumps(kind | index, indent=1, default=str) + "\n", "utf-8")
    (folder / MARKER).write_text(json.dumps({"kind": "export", **about}) + "\n", "utf-8")


_PART_CLASSES = {
    "openvino": {
        "unet": "OVModelUnet",
        "vae_decoder": "OVModelVaeDecoder",
        "vae_encoder": "OVModelVaeEncoder",
        "text_encoder": "OVModelTextEncoder",
        "text_encoder_2": "OVModelTextEncoder",
    },
    "onnx": {
        "unet": "ORTUnet",
        "vae_decoder": "ORTVaeDecoder",
        "vae_encoder": "ORTVaeEncoder",
        "text_encoder": "ORTTextEncoder",
        "text_encoder_2": "ORTTextEncoder",
    },
}
