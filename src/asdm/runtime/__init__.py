"""Other runtimes for a pipeline, and other ways to run it."""

import sys

# OpenVINO and NNCF report each import and conversion to their makers where they can import this; asdm uses no network
# unless it is asked to.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
