"""Words that options, records and functions choose from. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

CompensationKind = Literal["none", "bias", "diagonal", "linear"]
Label = Literal["style", "concept"]
GraphFormat = Literal["openvino", "onnx"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
Router = Literal["input", "input+time", "prompt", "prompt+time", "time"]
Sensitivity = Literal["ablation", "taylor"]
