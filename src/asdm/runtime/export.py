"""A pipeline as a folder of OpenVINO or ONNX graphs, in the layout that `optimum` loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline

from asdm import checks
from asdm.caching.session import require_uncached
from asdm.choices import GraphFormat
from asdm.diffusion.conditioning import image_size, require_size
from asdm.diffusion.kinds import is_random
from asdm.errors import AsdmError, shown
from asdm.families import denoiser_of, family_of, require_torch
from asdm.files import MARKER, replacing_folder, require_ours
from asdm.pipelines.quiet import quiet
from asdm.pipelines.saving import write_vocabularies
from asdm.runtime.graphs import TOKENIZERS, calibration_inputs, graphs_of, names_of_graphs
from asdm.runtime.writers import FILES, Int8, difference, writer

# Relative to the largest output. OpenVINO keeps weights in half precision. 8 bits may move single values far, which is
# reported; an output that is off by a third is broken.
TOLERANCE, INT8_TOLERANCE = 0.02, 0.3
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """The folder of an export, and the difference of each graph's outputs from torch's, relative to the largest."""

    folder: Path
    differences: dict[str, float]


@checks.arguments(
    pipeline=checks.PIPELINE,
    folder=checks.path,
    to=checks.literal(GraphFormat),
    size=checks.whole(),
    int8=checks.literal(Int8),
    data=checks.path,
    cache=checks.whole(),
    parts=checks.each(checks.text, least=1),
    progress=checks.function,
)
@torch.no_grad()
def export(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    to: GraphFormat = "openvino",
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
        int8: for OpenVINO: "weights" keeps the weights of all parts in 8 bits, for memory; "activations" also computes
            the UNet's convolutions in 8 bits, for speed (nncf's post-training quantisation). Attention and linear
            layers are not quantised, as this moves the images far.
        data: captioned images that the ranges of int8 are taken from, as for `analyze`; without it, latents that the
            pipeline itself makes from general prompts.
        cache: for `with_openvino_graphs` within `cache_features`, also write the UNet as two graphs: "unet_inner",
            whose features can be cached, and "unet_outer", the last `cache` layers of the decoder path, which are
            computed at every step (`depth` of `cache_features`).
        parts: only the graphs of these names, for `with_openvino_graphs`; optimum needs all but these two.

    Raises:
        AsdmError: the format's packages are not installed, `folder` is not ours, the data cannot be used, there is no
            graph of a name in `parts`, the UNet's features are cached, exported graphs stand in for it, or a graph
            differs from torch or takes only one batch.
    """
    _require_exportable(pipeline, to, int8, data, cache)
    _require_parts(parts, names_of_graphs(pipeline, cache))
    folder = Path(folder)
    require_ours(folder, "export")
    write = writer(to, int8)
    size = image_size(pipeline) if size is None else size
    require_size(pipeline, size)
    calibration = calibration_inputs(pipeline, size, data) if int8 == "activations" else []
    graphs = graphs_of(pipeline, size, cache, calibration)
    graphs = [graph for graph in graphs if parts is None or graph.name in parts]
    tolerance = _tolerance(pipeline, int8)
    differences = {}
    with replacing_folder(folder) as partial, quiet():
        for number, graph in enumerate(graphs, start=1):
            if progress is not None:
                progress(graph.name, number, len(graphs))
            (partial / graph.name).mkdir()
            run = write(graph, partial / graph.name / FILES[to])
            (partial / graph.name / "config.json").write_text(json.dumps(graph.config, indent=1, default=str), "utf-8")
            differences[graph.name] = difference(graph, run, tolerance)
        _write_rest(pipeline, partial, to, [graph.name for graph in graphs if graph.name in _PART_CLASSES[to]])
        _write_marker(pipeline, partial, {"format": to, "int8": int8, "cache": cache})
    return Exported(folder, differences)


def _require_exportable(
    pipeline: DiffusionPipeline, to: GraphFormat, int8: Int8 | None, data: str | Path | None, cache: int | None
) -> None:
    if int8 is not None and to != "openvino":
        raise AsdmError(f"int8={int8}, to={to}: int8 is for openvino, and {' or '.join(get_args(Int8))}")
    if data is not None and int8 != "activations":
        raise AsdmError(f"data={data}, int8={int8}: only int8 activations look at data; leave it out")
    if cache is not None and to != "openvino":
        raise AsdmError(f"cache={cache}, to={to}: two graphs are for openvino")
    denoiser = denoiser_of(pipeline)
    require_torch(denoiser)
    family = family_of(denoiser)
    if family.component != "unet":
        raise AsdmError(f"export: graphs are for UNets; this pipeline has a {type(denoiser).__name__}")
    for name, tokenizer in TOKENIZERS.items():  # the UNet's graph takes prompts of the first one's length
        is_read = name == "text_encoder" or getattr(pipeline, name, None) is not None
        if is_read and getattr(pipeline, tokenizer, None) is None:
            raise AsdmError(f"export: this pipeline has no {tokenizer}; load it with its text encoders and tokenizers")
    if hasattr(denoiser, "denoisers"):
        raise AsdmError("export: several denoisers in one pipeline are no graph; export the pipeline of each")
    if "timestep_cond" in family.random_inputs(denoiser, batch_size=1):
        raise AsdmError("export: this UNet reads its guidance by an embedding, for which the graphs have no input")
    if denoiser.dtype != torch.float32:
        raise AsdmError(f"a pipeline in {denoiser.dtype} is not exported; load it in float32, on the CPU")
    require_uncached(denoiser, "export")


def _require_parts(parts: Sequence[str] | None, names: Sequence[str]) -> None:
    for part in parts or ():
        if part not in names:
            remedy = "; give cache, the depth of these two" if part in ("unet_inner", "unet_outer") else ""
            raise AsdmError(f"parts={shown(part)}: this export's graphs are {', '.join(names)}{remedy}")


def _tolerance(pipeline: DiffusionPipeline, int8: Int8 | None) -> float:
    if int8 is None:
        return TOLERANCE
    return math.inf if is_random(pipeline) else INT8_TOLERANCE  # random weights in 8 bits are for speed alone


def _write_rest(pipeline: DiffusionPipeline, folder: Path, to: GraphFormat, graphs: list[str]) -> None:
    """Write tokenizers, the scheduler, and the index by which optimum finds everything."""
    for name in ("tokenizer", "tokenizer_2", "scheduler", "feature_extractor"):
        part = getattr(pipeline, name, None)
        if part is not None:
            part.save_pretrained(folder / name)
    write_vocabularies(folder)
    package = "intel.openvino" if to == "openvino" else "onnxruntime"
    module = f"optimum.{package}.modeling_diffusion"
    index = {name: value for name, value in pipeline.config.items() if name not in (*graphs, "vae", "safety_checker")}
    index |= {name: [module, _PART_CLASSES[to][name]] for name in graphs}
    kind = {"_class_name": type(pipeline).__name__, "_diffusers_version": index.pop("_diffusers_version", None)}
    (folder / "model_index.json").write_text(json.dumps(kind | index, indent=1, default=str) + "\n", "utf-8")


def _write_marker(pipeline: DiffusionPipeline, folder: Path, settings: dict[str, Any]) -> None:
    """Write what `with_openvino_graphs` reads of the export."""
    denoiser = denoiser_of(pipeline)
    about = {"kind": "export", **settings, "fingerprint": family_of(denoiser).fingerprint(denoiser)}
    (folder / MARKER).write_text(json.dumps(about) + "\n", "utf-8")


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
