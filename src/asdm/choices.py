"""Words that options, records and functions choose from. Importing this module imports no torch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

CompensationKind = Literal["none", "bias", "diagonal", "linear"]
Dtype = Literal["float32", "float16", "bfloat16"]
FeatureDtype = Literal["float32", "float16", "int8"]
Label = Literal["style", "concept"]
GraphFormat = Literal["openvino", "onnx"]
ExportFormat = Literal["openvino", "onnx", "checkpoint"]
FileDtype = Literal["fp16", "fp32"]
Numbering = Literal["dense", "two_layers"]  # of layers in the original layout: without gaps, or two layers a level
Program = Literal["comfyui", "sdcpp", "diffusers"]  # that reads a checkpoint in one file
ProtocolName = Literal["coco30k", "demo"]  # of an evaluation
ImageLayout = Literal["geneval", "dpg"]  # of folders of images, as a benchmark's own scorer reads them
PredictionType = Literal["epsilon", "v_prediction", "sample"]
Router = Literal["input", "input+time", "prompt", "prompt+time", "time"]
Sensitivity = Literal["ablation", "taylor"]
# Of an evaluation: how many images of each split start from an image, and how much they may change. At this strength
# there is enough noise to change a drawing's style, and little enough to keep its shape.
IMAGE_TO_IMAGE_SAMPLES, IMAGE_TO_IMAGE_STRENGTH = 16, 0.75
IMAGE_STRENGTH = 0.6  # of image-to-image, by default


class SchedulerChoice(NamedTuple):
    """A scheduler by its short name: the class in diffusers, the fields of its config that the name fixes, and what
    A1111's `parameters` call it."""

    class_name: str
    config: dict[str, Any]
    label: str


_KARRAS, _NOT_KARRAS = {"use_karras_sigmas": True}, {"use_karras_sigmas": False}
_ODE, _SDE = ({"algorithm_type": name, "solver_order": 2} for name in ("dpmsolver++", "sde-dpmsolver++"))
SCHEDULERS = {
    "ddim": SchedulerChoice("DDIMScheduler", {}, "DDIM"),
    "ddpm": SchedulerChoice("DDPMScheduler", {}, "DDPM"),
    "deis": SchedulerChoice("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}, "DEIS"),
    "dpm2": SchedulerChoice("KDPM2DiscreteScheduler", _NOT_KARRAS, "DPM2"),
    "dpm2-karras": SchedulerChoice("KDPM2DiscreteScheduler", _KARRAS, "DPM2 Karras"),
    "dpm2-a": SchedulerChoice("KDPM2AncestralDiscreteScheduler", _NOT_KARRAS, "DPM2 a"),
    "dpmpp-2m": SchedulerChoice("DPMSolverMultistepScheduler", {**_ODE, **_NOT_KARRAS}, "DPM++ 2M"),
    "dpmpp-2m-karras": SchedulerChoice("DPMSolverMultistepScheduler", {**_ODE, **_KARRAS}, "DPM++ 2M Karras"),
    "dpmpp-2m-sde": SchedulerChoice("DPMSolverMultistepScheduler", {**_SDE, **_NOT_KARRAS}, "DPM++ 2M SDE"),
    "dpmpp-2m-sde-karras": SchedulerChoice("DPMSolverMultistepScheduler", {**_SDE, **_KARRAS}, "DPM++ 2M SDE Karras"),
    "dpmpp-2s": SchedulerChoice("DPMSolverSinglestepScheduler", {**_ODE, **_NOT_KARRAS}, "DPM++ 2S"),
    "euler": SchedulerChoice("EulerDiscreteScheduler", _NOT_KARRAS, "Euler"),
    "euler-karras": SchedulerChoice("EulerDiscreteScheduler", _KARRAS, "Euler Karras"),
    "euler-a": SchedulerChoice("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "heun": SchedulerChoice("HeunDiscreteScheduler", _NOT_KARRAS, "Heun"),
    "lcm": SchedulerChoice("LCMScheduler", {}, "LCM"),
    "lms": SchedulerChoice("LMSDiscreteScheduler", _NOT_KARRAS, "LMS"),
    "lms-karras": SchedulerChoice("LMSDiscreteScheduler", _KARRAS, "LMS Karras"),
    "pndm": SchedulerChoice("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    "sa-solver": SchedulerChoice(
        "SASolverScheduler", {"algorithm_type": "data_prediction", **_NOT_KARRAS}, "SA Solver"
    ),
    "tcd": SchedulerChoice("TCDScheduler", {}, "TCD"),
    "unipc": SchedulerChoice("UniPCMultistepScheduler", {"solver_type": "bh2", **_NOT_KARRAS}, "UniPC"),
}
