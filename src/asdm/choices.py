"""Words that options, records and functions choose from. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

CompensationKind = Literal["none", "bias", "diagonal", "linear"]
GraphFormat = Literal["openvino", "onnx"]
ExportFormat = Literal["openvino", "onnx", "checkpoint"]
FileDtype = Literal["fp16", "fp32"]
Numbering = Literal["dense", "two_layers"]  # of layers in the original layout: without gaps, or two layers a level
Program = Literal["comfyui", "sdcpp", "diffusers"]  # that reads a checkpoint in one file
PredictionType = Literal["epsilon", "v_prediction", "sample"]
Router = Literal["input", "input+time", "time"]
Sensitivity = Literal["ablation", "taylor"]
