"""A-SDM: smaller and faster Stable Diffusion pipelines, with proof of what was gained and lost.

pipeline = asdm.load_pipeline("demo")
redundancy = asdm.analyze(pipeline)
plan = asdm.make_plan(redundancy, speedup=1.5)
student = asdm.build_student(pipeline.unet, plan)
asdm.fit_compensation(pipeline, student)
asdm.distill(pipeline, student, data="demo", folder="training", steps=500)
asdm.save_pipeline(asdm.with_unet(pipeline, student), "faster")
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asdm.compensation import fit_compensation as fit_compensation
    from asdm.compression import compress as compress
    from asdm.errors import AsdmError as AsdmError
    from asdm.errors import AsdmWarning as AsdmWarning
    from asdm.evaluation.comparison import Evaluation as Evaluation
    from asdm.evaluation.comparison import evaluate as evaluate
    from asdm.generation import generate as generate
    from asdm.incubation.consistency import lcm_scheduler as lcm_scheduler
    from asdm.incubation.distillation import distill as distill
    from asdm.incubation.prepared import prepare_data as prepare_data
    from asdm.incubation.stages import Stage as Stage
    from asdm.inference.export import export as export
    from asdm.inference.feature_inheritance import InheritanceSchedule as InheritanceSchedule
    from asdm.inference.feature_inheritance import inherit_features as inherit_features
    from asdm.inference.guidance_end import GuidanceEnd as GuidanceEnd
    from asdm.inference.inheritance_calibration import calibrate_inheritance as calibrate_inheritance
    from asdm.inference.openvino_graphs import with_openvino_graphs as with_openvino_graphs
    from asdm.inference.optimization import optimize as optimize
    from asdm.inference.unet_switching import switch_unets as switch_unets
    from asdm.pipelines import load_pipeline as load_pipeline
    from asdm.pipelines import save_pipeline as save_pipeline
    from asdm.pipelines import with_unet as with_unet
    from asdm.planning import add_banks as add_banks
    from asdm.planning import make_plan as make_plan
    from asdm.planning import remeasure_plan as remeasure_plan
    from asdm.redundancy import RedundancyMap as RedundancyMap
    from asdm.redundancy import analyze as analyze
    from asdm.repair import repair_plan as repair_plan
    from asdm.student.edits import CondConv as CondConv
    from asdm.student.edits import GriAttention as GriAttention
    from asdm.student.edits import Remove as Remove
    from asdm.student.plan import PruningPlan as PruningPlan
    from asdm.student.plan import build_student as build_student
    from asdm.student.unet import AsdmUNet2DConditionModel as AsdmUNet2DConditionModel

# Imported when first used: torch and diffusers take seconds, and `asdm --help` needs neither.
_HOME = {
    "AsdmError": "asdm.errors",
    "AsdmUNet2DConditionModel": "asdm.student.unet",
    "AsdmWarning": "asdm.errors",
    "CondConv": "asdm.student.edits",
    "Evaluation": "asdm.evaluation.comparison",
    "GriAttention": "asdm.student.edits",
    "GuidanceEnd": "asdm.inference.guidance_end",
    "InheritanceSchedule": "asdm.inference.feature_inheritance",
    "PruningPlan": "asdm.student.plan",
    "RedundancyMap": "asdm.redundancy",
    "Remove": "asdm.student.edits",
    "Stage": "asdm.incubation.stages",
    "add_banks": "asdm.planning",
    "analyze": "asdm.redundancy",
    "build_student": "asdm.student.plan",
    "calibrate_inheritance": "asdm.inference.inheritance_calibration",
    "compress": "asdm.compression",
    "distill": "asdm.incubation.distillation",
    "evaluate": "asdm.evaluation.comparison",
    "export": "asdm.inference.export",
    "fit_compensation": "asdm.compensation",
    "generate": "asdm.generation",
    "inherit_features": "asdm.inference.feature_inheritance",
    "lcm_scheduler": "asdm.incubation.consistency",
    "load_pipeline": "asdm.pipelines",
    "make_plan": "asdm.planning",
    "optimize": "asdm.inference.optimization",
    "prepare_data": "asdm.incubation.prepared",
    "remeasure_plan": "asdm.planning",
    "repair_plan": "asdm.repair",
    "save_pipeline": "asdm.pipelines",
    "switch_unets": "asdm.inference.unet_switching",
    "with_openvino_graphs": "asdm.inference.openvino_graphs",
    "with_unet": "asdm.pipelines",
}
__all__ = list(_HOME)

# What other libraries say when they are imported or used, and a user of this package cannot act on: torchvision and
# kernels are no dependencies of ours, and nothing here needs what they bring. Each by its logger and its words.
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
