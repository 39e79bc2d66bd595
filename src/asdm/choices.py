"""Words that options, records and functions choose from. Importing this module imports no torch."""

from __future__ import annotations

from typing import Literal

CompensationKind = Literal["none", "bias", "diagonal", "linear"]
GraphFormat = Literal["openvino", "onnx"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
Router = Literal["input", "input+time", "time"]
Sensitivity = Literal["ablation", "taylor"]
# Of an evaluation: how many images of each split start from an image, and how much they may change. At this strength
# there is enough noise to change a drawing's style, and little enough to keep its shape.
IMAGE_TO_IMAGE_SAMPLES, IMAGE_TO_IMAGE_STRENGTH = 16, 0.75
