"""Guidance that ends before the sampling does: at low noise it costs as much as anywhere and helps least (arXiv
2404.07724, whose interval this is the lower end of)."""

from __future__ import annotations

import math
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from asdm import checks
from asdm.errors import AsdmError

PART = checks.number(above=0, high=1, remedy="for no guidance at all give guidance_scale=1")
# What the Stable Diffusion pipelines hold twice, without the prompt and with it, and let a callback change.
_BRANCHED = (
    "prompt_embeds",
    "add_text_embeds",
    "add_time_ids",
    "mask",
    "masked_image_latents",
    "image",
    "control_image",
)


class GuidanceEnd(PipelineCallback):
    """Ends a pipeline's classifier-free guidance after a part of its steps: the others take one branch, half the work.

        pipeline(prompts, callback_on_step_end=asdm.GuidanceEnd(pipeline, 0.8))

    As `SDCFGCutoffCallback` of diffusers, but for any number of prompts and for all of its Stable Diffusion pipelines:
    XL, image-to-image, inpainting, ControlNet.

    Args:
        pipeline: which is going to call it.
        guidance_end: part of the steps, in (0, 1], that are guided; at least one is.

    Raises:
        AsdmError: `guidance_end` is out of range, or the pipeline has guidance that a callback cannot end.
    """

    @checks.arguments(guidance_end=PART)
    def __init__(self, pipeline: DiffusionPipeline, guidance_end: float):
        super().__init__(cutoff_step_ratio=float(guidance_end))
        offered = getattr(pipeline, "_callback_tensor_inputs", [])
        if "prompt_embeds" not in offered:
            raise AsdmError(f"{type(pipeline).__name__}: has no guidance that can end early; leave guidance_end out")
        if pipeline.unet.config.get("encoder_hid_dim_type") == "ip_image_proj":
            raise AsdmError(
                "guidance_end does not go with an IP-Adapter, whose images no callback can change; unload it"
            )
        self._branched = [name for name in _BRANCHED if name in offered]

    @property
    def tensor_inputs(self) -> list[str]:
        return self._branched

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        guided = math.ceil(self.config.cutoff_step_ratio * pipeline.num_timesteps)
        if step_index + 1 != guided or not pipeline.do_classifier_free_guidance:
            return callback_kwargs
        pipeline._guidance_scale = 1.0  # set anew by each call of the pipeline
        both = len(callback_kwargs["prompt_embeds"])
        return {name: _conditional(value, both) for name, value in callback_kwargs.items()}


def _conditional(value: Any, both: int) -> Any:
    """The second half of what has both branches; a ControlNet's image in guess mode has one."""
    if isinstance(value, list):
        return [_conditional(each, both) for each in value]
    return value.chunk(2)[1] if isinstance(value, Tensor) and len(value) == both else value
