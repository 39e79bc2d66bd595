"""Programs of other authors that load a model's file and sample in loops of their own, on the CPU.

They are timed alone. Their images are not judged: their noise is not torch's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from asdm.benchmark.baselines import GROUP
from asdm.benchmark.engine import Engine
from asdm.benchmark.method import Loaded, Method, memoized
from asdm.diffusion.conditioning import image_size
from asdm.diffusion.generation import default_guidance
from asdm.errors import AsdmError, needs_extra
from asdm.files import write_text
from asdm.runtime.checkpoint import export_checkpoint
from asdm.runtime.export import export
from asdm.runtime.openvino import PRECISIONS, compile_options

PROMPT = "a photograph"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")


def programs(steps: int) -> list[Method]:
    """Return a method for each program and precision."""
    loaded: dict[str, Loaded] = {
        "stable-diffusion.cpp, f16": stable_diffusion_cpp("f16"),
        "stable-diffusion.cpp, q8_0": stable_diffusion_cpp("q8_0"),
        "OpenVINO GenAI": openvino_genai,
        "optimum-intel": optimum_intel,
    }
    return [Method(name, GROUP, steps=steps, engine=engine) for name, engine in loaded.items()]


# -- stable-diffusion.cpp ----------------------------------------------------------------------------------


def stable_diffusion_cpp(weights: str) -> Loaded:
    """stable-diffusion.cpp by its package for Python, with weights as it names their types."""

    @contextmanager
    def loaded(pipeline: DiffusionPipeline) -> Iterator[Engine]:
        with needs_extra("benchmark", "stable-diffusion.cpp"):
            from stable_diffusion_cpp import StableDiffusion
        checkpoint = _checkpoint(pipeline)
        _report_nothing()
        model = StableDiffusion(
            model_path=str(checkpoint), wtype=weights, n_threads=torch.get_num_threads(), verbose=False
        )

        def draw(steps: int, on_step: Callable[[], None]) -> Any:
            try:
                return model.generate_image(
                    prompt=PROMPT,
                    width=image_size(pipeline),
                    height=image_size(pipeline),
                    cfg_scale=default_guidance(pipeline),
                    sample_method="dpm++2m",
                    sample_steps=steps,
                    # It reports other work in the same way, with another total.
                    progress_callback=lambda done, total, _: on_step() if total == steps and done else None,
                )
            finally:
                _report_nothing()

        yield Engine(draw, weights)

    return loaded


def _report_nothing() -> None:
    """Replace the library's callback: it keeps a pointer to an image's own, which Python frees after the image."""
    from stable_diffusion_cpp import stable_diffusion_cpp as library

    library.sd_set_progress_callback(_silence(), None)


@cache
def _silence() -> Any:
    from stable_diffusion_cpp import stable_diffusion_cpp as library

    return library.sd_progress_callback(lambda *_: None)


@memoized
def _folder(_pipeline: DiffusionPipeline) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="asdm-engines-")


@memoized
def _checkpoint(pipeline: DiffusionPipeline) -> Path:
    """Write the pipeline as one file in half precision."""
    return export_checkpoint(pipeline, Path(_folder(pipeline).name) / "model.safetensors", "sdcpp").file


# -- OpenVINO ----------------------------------------------------------------------------------------------


@contextmanager
def openvino_genai(pipeline: DiffusionPipeline) -> Iterator[Engine]:
    """OpenVINO GenAI, with the options that our own graphs get: the faster of float32 and OpenVINO's choice."""
    with needs_extra("benchmark", "OpenVINO GenAI"):
        import openvino_genai as genai
    options = compile_options(torch.get_num_threads())
    text_to_image = genai.Text2ImagePipeline(str(_genai_folder(pipeline)), "CPU", **options)

    def draw(steps: int, on_step: Callable[[], None]) -> Any:
        def callback(_step: int, _steps: int, _latents: Any) -> bool:
            on_step()
            return False  # do not stop

        return text_to_image.generate(
            PROMPT,
            width=image_size(pipeline),
            height=image_size(pipeline),
            guidance_scale=default_guidance(pipeline),
            num_inference_steps=steps,
            callback=callback,
        )

    yield Engine(draw, _precision(options))


@memoized
def _genai_folder(pipeline: DiffusionPipeline) -> Path:
    """Write the pipeline as OpenVINO graphs, and change what GenAI reads otherwise than optimum.

    GenAI gives the UNet integers as time steps, finds the kinds of the parts in the pipeline's own index, needs each
    tokenizer as a graph, and knows few schedulers, whose files may have no infinite values.
    """
    with needs_extra("benchmark", "OpenVINO's tokenizers"):
        import openvino
        from openvino_tokenizers import convert_tokenizer
    folder = Path(_folder(pipeline).name) / "graphs"
    components = pipeline.components
    text_encoders = [name for name in _TEXT_ENCODERS if components.get(name) is not None]
    export(pipeline, folder, "openvino", parts=["unet", "vae_decoder", *text_encoders])
    _take_integer_steps(folder / "unet")
    for name in _TOKENIZERS:
        if components.get(name) is not None:
            graph = convert_tokenizer(components[name])
            openvino.save_model(graph, folder / name / "openvino_tokenizer.xml")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index |= {name: pipeline.config[name] for name in ("unet", "vae", *text_encoders)}
    write_text(folder / "model_index.json", json.dumps(index))
    fields, _, _ = DDIMScheduler.extract_init_dict(pipeline.scheduler.config)  # type: ignore[attr-defined]
    DDIMScheduler(**fields | {"clip_sample": False}).save_pretrained(folder / "scheduler")  # GenAI cannot clip
    return folder


def _take_integer_steps(folder: Path) -> None:
    """Let a written UNet take its time step as an integer."""
    import openvino
    from openvino.preprocess import PrePostProcessor

    graph, changed = folder / "openvino_model.xml", folder / "changed.xml"
    conversion = PrePostProcessor(openvino.Core().read_model(graph))
    conversion.input("timestep").tensor().set_element_type(openvino.Type.i64)
    openvino.save_model(conversion.build(), changed, compress_to_fp16=False)  # it reads its weights from the first file
    for suffix in (".xml", ".bin"):
        changed.with_suffix(suffix).replace(graph.with_suffix(suffix))


def _precision(options: dict[str, Any]) -> str:
    """Return the dtype in which OpenVINO computes with these options."""
    import openvino

    own = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    return PRECISIONS[options.get("INFERENCE_PRECISION_HINT", own)]


def optimum_intel(_pipeline: DiffusionPipeline) -> NoReturn:
    """optimum-intel, which cannot be installed beside this package: a row that says so."""
    raise AsdmError(
        "optimum-intel: needs transformers < 5.6 and huggingface_hub < 1.22, diffusers 0.42 needs later ones; load "
        "exported graphs with it in another environment"
    )
