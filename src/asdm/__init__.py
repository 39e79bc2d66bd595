"""A-SDM: smaller and faster Stable Diffusion pipelines, with proof of what was gained and lost.

pipeline = asdm.load_pipeline("demo")
redundancy = asdm.analyze(pipeline)
plan = asdm.make_plan(redundancy, speedup=1.5)
student = asdm.build_student(pipeline.unet, plan)
asdm.fit_compensation(pipeline, student)
asdm.distill(pipeline, student, data="demo", folder="training", steps=500)
student = asdm.fold_compensation(student)
asdm.save_pipeline(asdm.with_unet(pipeline, student), "faster")
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from asdm.version import __version__ as __version__

if TYPE_CHECKING:
    from asdm.caching.calibration import calibrate_cache as calibrate_cache
    from asdm.caching.features import cache_features as cache_features
    from asdm.caching.schedule import CacheSchedule as CacheSchedule
    from asdm.compensation.fitting import fit_compensation as fit_compensation
    from asdm.compensation.folding import fold_compensation as fold_compensation
    from asdm.compression.compress import compress as compress
    from asdm.data.preparation import prepare_data as prepare_data
    from asdm.diffusion.generation import generate as generate
    from asdm.diffusion.guidance import CfgCutoff as CfgCutoff
    from asdm.distillation.consistency import lcm_scheduler as lcm_scheduler
    from asdm.distillation.decoder import distill_decoder as distill_decoder
    from asdm.distillation.decoder_recipe import DecoderRecipe as DecoderRecipe
    from asdm.distillation.distill import distill as distill
    from asdm.distillation.recording import record_teacher as record_teacher
    from asdm.distillation.stages import Stage as Stage
    from asdm.edits import CondConv as CondConv
    from asdm.edits import GriAttention as GriAttention
    from asdm.edits import Remove as Remove
    from asdm.errors import AsdmError as AsdmError
    from asdm.errors import AsdmWarning as AsdmWarning
    from asdm.evaluation.comparison import evaluate as evaluate
    from asdm.evaluation.protocol.results import ProtocolResults as ProtocolResults
    from asdm.evaluation.protocol.run import evaluate_by_protocol as evaluate_by_protocol
    from asdm.evaluation.protocol.scorer import generate_for_scorer as generate_for_scorer
    from asdm.evaluation.results import Evaluation as Evaluation
    from asdm.generation.comparison import compare_images as compare_images
    from asdm.generation.generate import generate_images as generate_images
    from asdm.generation.request import GenerationRequest as GenerationRequest
    from asdm.pipelines.decoders import save_decoder as save_decoder
    from asdm.pipelines.decoders import with_decoder as with_decoder
    from asdm.pipelines.derived import with_unet as with_unet
    from asdm.pipelines.loading import load_pipeline as load_pipeline
    from asdm.pipelines.lora_files import convert_lora as convert_lora
    from asdm.pipelines.saving import save_pipeline as save_pipeline
    from asdm.planning.budget import make_plan as make_plan
    from asdm.planning.experts import add_cond_conv as add_cond_conv
    from asdm.planning.refine import refine_plan as refine_plan
    from asdm.planning.speedup import remeasure_plan as remeasure_plan
    from asdm.runtime.checkpoint import export_checkpoint as export_checkpoint
    from asdm.runtime.export import export as export
    from asdm.runtime.openvino import with_openvino_graphs as with_openvino_graphs
    from asdm.runtime.optimize import optimize as optimize
    from asdm.runtime.switching import switch_unets as switch_unets
    from asdm.sensitivity.analysis import analyze as analyze
    from asdm.sensitivity.expert_usage import expert_usage as expert_usage
    from asdm.sensitivity.profile import RedundancyMap as RedundancyMap
    from asdm.student.build import build_student as build_student
    from asdm.student.plan import PruningPlan as PruningPlan
    from asdm.student.unet import AsdmUNet2DConditionModel as AsdmUNet2DConditionModel

# Each name is imported when it is first used: torch and diffusers take seconds, and `asdm --help` needs neither.
_HOME = {
    "AsdmError": "asdm.errors",
    "AsdmUNet2DConditionModel": "asdm.student.unet",
    "AsdmWarning": "asdm.errors",
    "CondConv": "asdm.edits",
    "Evaluation": "asdm.evaluation.comparison",
    "GenerationRequest": "asdm.generation.request",
    "GriAttention": "asdm.edits",
    "CfgCutoff": "asdm.diffusion.guidance",
    "CacheSchedule": "asdm.caching.schedule",
    "DecoderRecipe": "asdm.distillation.decoder_recipe",
    "ProtocolResults": "asdm.evaluation.protocol.results",
    "PruningPlan": "asdm.student.plan",
    "RedundancyMap": "asdm.sensitivity.profile",
    "Remove": "asdm.edits",
    "Stage": "asdm.distillation.stages",
    "add_cond_conv": "asdm.planning.experts",
    "analyze": "asdm.sensitivity.analysis",
    "build_student": "asdm.student.build",
    "calibrate_cache": "asdm.caching.calibration",
    "compare_images": "asdm.generation.comparison",
    "compress": "asdm.compression.compress",
    "convert_lora": "asdm.pipelines.lora_files",
    "distill": "asdm.distillation.distill",
    "distill_decoder": "asdm.distillation.decoder",
    "evaluate": "asdm.evaluation.comparison",
    "evaluate_by_protocol": "asdm.evaluation.protocol.run",
    "expert_usage": "asdm.sensitivity.expert_usage",
    "export": "asdm.runtime.export",
    "export_checkpoint": "asdm.runtime.checkpoint",
    "fit_compensation": "asdm.compensation.fitting",
    "fold_compensation": "asdm.compensation.folding",
    "generate": "asdm.diffusion.generation",
    "generate_for_scorer": "asdm.evaluation.protocol.scorer",
    "generate_images": "asdm.generation.generate",
    "cache_features": "asdm.caching.features",
    "lcm_scheduler": "asdm.distillation.consistency",
    "load_pipeline": "asdm.pipelines.loading",
    "make_plan": "asdm.planning.budget",
    "optimize": "asdm.runtime.optimize",
    "prepare_data": "asdm.data.preparation",
    "record_teacher": "asdm.distillation.recording",
    "remeasure_plan": "asdm.planning.speedup",
    "refine_plan": "asdm.planning.refine",
    "save_decoder": "asdm.pipelines.decoders",
    "save_pipeline": "asdm.pipelines.saving",
    "switch_unets": "asdm.runtime.switching",
    "with_decoder": "asdm.pipelines.decoders",
    "with_openvino_graphs": "asdm.runtime.openvino",
    "with_unet": "asdm.pipelines.derived",
}
__all__ = list(_HOME)

# Log messages of other libraries that a user of this package cannot act on, by logger. Torchvision and kernels are not
# dependencies, and nothing here needs them.
_ADVICE = {
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "torch.onnx._internal.exporter._registration": "torchvision is not installed. Skipping",
}
for _logger, _words in _ADVICE.items():
    logging.getLogger(_logger).addFilter(lambda record, words=_words: words not in record.getMessage())  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'asdm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
