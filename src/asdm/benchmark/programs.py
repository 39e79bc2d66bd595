"""Programs of other authors that load a model's file and sample in loops of their own, on the CPU.

They are timed alone. Their images are not judged: their noise is not torch's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from asdm.benchmark.baselines import GROUP
from asdm.benchmark.engine import Engine
from asdm.benchmark.method import Loaded, Method, memoized
from asdm.diffusion.conditioning import image_size
from asdm.diffusion.generation import default_guidance
from asdm.errors import needs_extra
from asdm.files import write_text
from asdm.runtime.checkpoint import export_checkpoint
from asdm.runtime.export import export

PROMPT = "a photograph"


def programs(steps: int) -> list[Method]:
    """Return a method for each program and precision."""
    loaded: dict[str, Loaded] = {
        "stable-diffusion.cpp, f16": stable_diffusion_cpp("f16"),
        "stable-diffusion.cpp, q8_0": stable_diffusion_cpp("q8_0"),
        "OpenVINO GenAI": openvino_genai,
        "optimum-intel": optimum_intel,
    }
    return [Method(name, GROUP, steps=steps, engine=engine) for name, engine in loaded.items()]


def stable_diffusion_cpp(weights: str) -> Loaded:
    """stable-diffusion.cpp by its package for Python, with weights as it names their types."""

    @contextmanager
    def loaded(pipeline: DiffusionPipeline) -> Iterator[Engine]:
        with needs_extra("benchmark", "stable-diffusion.cpp"):
            from stable_diffusion_cpp import StableDiffusion

        model = StableDiffusion(
            model_path=str(_checkpoint(pipeline)), wtype=weights, n_threads=torch.get_num_threads(), verbose=False
        )

        def draw(steps: int, on_step: Callable[[], None]) -> Any:
            return model.generate_image(
                prompt=PROMPT,
                width=image_size(pipeline),
                height=image_size(pipeline),
                cfg_scale=default_guidance(pipeline),
                sample_method="dpm++2m",
                sample_steps=steps,
                # It reports the loading of a model in the same way, with its number of tensors.
                progress_callback=lambda done, of, _: on_step() if of == steps and done else None,
            )

        yield Engine(draw, weights)

    return loaded


@contextmanager
def openvino_genai(pipeline: DiffusionPipeline) -> Iterator[Engine]:
    """OpenVINO GenAI, in the precision that it chooses for this processor."""
    with needs_extra("benchmark", "OpenVINO GenAI"):
        import openvino_genai
    text_to_image = openvino_genai.Text2ImagePipeline(
        str(_graphs(pipeline)), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads()
    )

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

    yield Engine(draw, _openvino_precision())


@contextmanager
def optimum_intel(pipeline: DiffusionPipeline) -> Iterator[Engine]:
    """optimum-intel, which needs earlier versions of transformers than the newest."""
    with needs_extra("benchmark", "optimum-intel"):
        from optimum.intel import OVDiffusionPipeline
    text_to_image = OVDiffusionPipeline.from_pretrained(
        _graphs(pipeline), ov_config={"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
    )
    text_to_image.set_progress_bar_config(disable=True)

    def draw(steps: int, on_step: Callable[[], None]) -> Any:
        def callback(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors

        return text_to_image(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=default_guidance(pipeline),
            callback_on_step_end=callback,
        )

    yield Engine(draw, _openvino_precision())


@memoized
def _folder(_pipeline: DiffusionPipeline) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="asdm-engines-")


@memoized
def _checkpoint(pipeline: DiffusionPipeline) -> Path:
    """Write the pipeline as one file in half precision."""
    return export_checkpoint(pipeline, Path(_folder(pipeline).name) / "model.safetensors", "sdcpp").file


@memoized
def _graphs(pipeline: DiffusionPipeline) -> Path:
    """Write the pipeline as OpenVINO graphs, as GenAI reads them: with the pipeline's own index, its tokenizer as a
    graph, and a scheduler that GenAI knows."""
    with needs_extra("benchmark", "OpenVINO's tokenizers"):
        import openvino
        from openvino_tokenizers import convert_tokenizer
    folder = Path(_folder(pipeline).name) / "graphs"
    export(pipeline, folder, "openvino")
    openvino.save_model(convert_tokenizer(pipeline.tokenizer), folder / "tokenizer" / "openvino_tokenizer.xml")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index |= {name: pipeline.config[name] for name in ("text_encoder", "unet", "vae")}
    write_text(folder / "model_index.json", json.dumps(index))
    fields, _, _ = DDIMScheduler.extract_init_dict(pipeline.scheduler.config)  # others may have infinite values
    DDIMScheduler(**fields).save_pretrained(folder / "scheduler")
    return folder


def _openvino_precision() -> str:
    """Return what OpenVINO computes in on this CPU by its own choice."""
    import openvino

    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if "BF16" in capabilities else "float32"
