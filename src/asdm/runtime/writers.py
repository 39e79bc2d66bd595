"""Writing one graph as OpenVINO's or ONNX's file, also in 8 bits, and running what was written."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from asdm.choices import GraphFormat
from asdm.errors import AsdmError, needs_extra, one_line
from asdm.files import require_space
from asdm.runtime.graphs import Graph

Int8 = Literal["weights", "activations"]
FILES = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
Run = Callable[[], list[np.ndarray]]
"""Runs a written graph on its example inputs."""
Write = Callable[[Graph, Path], Run]
"""Writes a graph to a file."""


def writer(to: GraphFormat, int8: Int8 | None) -> Write:
    """Return the function that writes graphs in a format.

    Raises:
        AsdmError: the format's packages are not installed.
    """
    return _openvino_writer(int8) if to == "openvino" else _onnx_writer()


def program_of(graph: Graph) -> torch.export.ExportedProgram:
    """Return the graph, for any batch. An input with one element, the time step, is the whole batch's.

    Raises:
        AsdmError: something in it depends on the batch of the examples.
    """
    batched = {name for name, value in graph.inputs.items() if value.numel() > 1}
    shapes = {name: {0: torch.export.Dim.AUTO} if name in batched else {} for name in graph.inputs}
    # Torch 2.6 is strict by default and then cannot export students with GRI attention.
    program = torch.export.export(graph.module.eval(), (), kwargs=graph.inputs, dynamic_shapes=shapes, strict=False)
    examples = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    if any(is_concrete_int(examples[name].shape[0]) for name in batched):
        raise AsdmError(
            f"export: {graph.name}: its graph takes no other batch than the examples'; this part cannot be exported"
        )
    return program


def _openvino_writer(int8: Int8 | None) -> Write:
    with needs_extra("openvino", "export to OpenVINO"):
        import openvino
    quantised = _quantiser() if int8 is not None else lambda model, _: model

    def write(graph: Graph, path: Path) -> Run:
        model = openvino.convert_model(program_of(graph))
        for output, name in zip(model.outputs, graph.outputs, strict=True):
            output.get_tensor().set_names({name})
        save_openvino(quantised(model, graph.calibration), path)

        def run() -> list[np.ndarray]:
            try:
                compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            except RuntimeError as error:
                raise AsdmError(
                    f"export: {graph.name}: OpenVINO cannot compile its graph on this machine ({one_line(error)}); "
                    "export another size, or without int8"
                ) from error
            read = {name for each in compiled.inputs for name in each.names}
            found = compiled({name: value.numpy() for name, value in graph.inputs.items() if name in read})
            return [found[name] for name in graph.outputs]

        return run

    return write


def save_openvino(model: Any, path: Path) -> None:
    """Write an OpenVINO model.

    Raises:
        OSError: the disk is full, or refuses it; OpenVINO's own error does not say so.
    """
    import openvino

    try:
        openvino.save_model(model, path)
    except RuntimeError:
        weights = [each for each in model.get_ops() if each.get_type_name() == "Constant"]
        require_space(path.parent, sum(each.get_byte_size() for each in weights))
        raise


def _quantiser() -> Callable[[Any, list[dict[str, Tensor]]], Any]:
    """Return a function of an OpenVINO model and calibration inputs; without inputs it quantises weights alone."""
    with needs_extra("int8", "export in 8 bits"):
        import nncf
    nncf.set_log_level(logging.ERROR)

    def quantised(model: Any, calibration: list[dict[str, Tensor]]) -> Any:
        with redirect_stdout(io.StringIO()):  # its progress bars would mix with ours
            if not calibration:
                scope = nncf.IgnoredScope(names=_convolutions_of_one_pixel(model))
                return nncf.compress_weights(model, ignored_scope=scope)
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


def _convolutions_of_one_pixel(model: Any) -> list[str]:
    """Return the names of convolutions that see one pixel. OpenVINO 2026.4 makes linear layers of them, and on CPUs
    without AVX-512 it cannot compile those whose weights are in 8 bits."""
    found = []
    for op in model.get_ops():
        if op.get_type_name() == "Convolution" and op.output(0).partial_shape[2:].to_string() == "[1,1]":
            found.append(op.get_friendly_name())
    return found


def _onnx_writer() -> Write:
    with needs_extra("onnx", "export to ONNX"):
        import onnxruntime
        import onnxscript  # noqa: F401

    def write(graph: Graph, path: Path) -> Run:
        names: dict[str, Any] = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
        program = torch.onnx.export(program_of(graph), dynamo=True, verbose=False, **names)
        assert program is not None
        program.save(path)

        def run() -> list[np.ndarray]:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            return session.run(list(graph.outputs), {name: value.numpy() for name, value in graph.inputs.items()})

        return run

    return write


def difference(graph: Graph, run: Run, tolerance: float) -> float:
    """Return the largest difference between the graph's outputs and torch's, relative to each output's largest value.

    Raises:
        AsdmError: it is above the tolerance, or no number.
    """
    worst = 0.0
    for name, found, expected in zip(graph.outputs, run(), graph.module(**graph.inputs), strict=True):
        scale = max(float(expected.abs().max()), 1e-12)
        moved = float((torch.from_numpy(found) - expected).abs().max()) / scale
        if tolerance < math.inf and not moved < tolerance:
            raise AsdmError(
                f"export: {graph.name}: its {name} differs from torch's by {moved:.1%}, more than {tolerance:.0%}; "
                "this part cannot be exported to that format"
            )
        worst = max(worst, moved)
    return worst
