"""Guidance that ends before the sampling does: at low noise it helps least and costs the same.

After arXiv 2404.07724; this is the lower end of its interval.
"""

from __future__ import annotations

import math
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from asdm import checks
from asdm.errors import AsdmError
from asdm.families import denoiser_of

PART = checks.number(above=0, high=1, remedy="for no guidance at all give guidance_scale=1")
# Pipelines whose loop passes a callback the tensors that it names, reads back all that it holds for each branch, and
# checks at every step whether there is guidance. Others, as those with perturbed attention, with a union of
# ControlNets, or that inpaint by a ControlNet, do not.
_LOOPS = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "KolorsPipeline",
        "KolorsImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    }
)
# The number of branches, and which of them has both the prompt and the image.
_BRANCHES = {"StableDiffusionInstructPix2PixPipeline": (3, 0)}
_TWO_BRANCHES = (2, 1)  # without the prompt, and with it
# The tensors that they hold for each branch, and that a callback may change.
_BRANCHED = (
    "prompt_embeds",
    "add_text_embeds",
    "add_time_ids",
    "mask",
    "masked_image_latents",
    "image",
    "image_latents",
    "control_image",
)


class CfgCutoff(PipelineCallback):
    """Ends a pipeline's classifier-free guidance after a part of its steps: the others take one branch, half the work.

        pipeline(prompts, callback_on_step_end=asdm.CfgCutoff(pipeline, 0.8))

    As `SDCFGCutoffCallback` of diffusers, but for any number of prompts and for its Stable Diffusion pipelines: XL,
    Kolors, image-to-image, inpainting, InstructPix2Pix, ControlNet.

    Args:
        pipeline: the one that will call it.
        cfg_cutoff: part of the steps, in (0, 1], that are guided; at least one is.

    Raises:
        AsdmError: `cfg_cutoff` is out of range, or the pipeline's guidance cannot be ended by a callback.
    """

    @checks.arguments(cfg_cutoff=PART)
    def __init__(self, pipeline: DiffusionPipeline, cfg_cutoff: float):
        super().__init__(cutoff_step_ratio=float(cfg_cutoff))
        self._branched, self._branches = _held_by(pipeline)
        if denoiser_of(pipeline).config.get("encoder_hid_dim_type") == "ip_image_proj":
            raise AsdmError("cfg_cutoff does not go with an IP-Adapter, whose images no callback can change; unload it")

    @property
    def tensor_inputs(self) -> list[str]:
        return self._branched

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        guided = math.ceil(self.config.cutoff_step_ratio * pipeline.num_timesteps)
        if step_index + 1 != guided or not pipeline.do_classifier_free_guidance:
            return callback_kwargs
        if _held_by(pipeline) != (self._branched, self._branches):
            raise AsdmError(f"this CfgCutoff was made for another kind of pipeline than {type(pipeline).__name__}")
        pipeline._guidance_scale = 1.0  # set again by each call of the pipeline
        size = len(callback_kwargs["prompt_embeds"])
        return {name: self._conditional(value, size) for name, value in callback_kwargs.items()}

    def _conditional(self, value: Any, size: int) -> Any:
        """The branch with the prompt of a tensor that has all; a ControlNet's image in guess mode has one."""
        if isinstance(value, list):
            return [self._conditional(each, size) for each in value]
        count, which = self._branches
        return value.chunk(count)[which] if isinstance(value, Tensor) and len(value) == size else value


def _held_by(pipeline: DiffusionPipeline) -> tuple[list[str], tuple[int, int]]:
    """The tensors that a pipeline holds for each branch and a callback may change; the number of branches, and which
    one stays."""
    owner = next((kind for kind in type(pipeline).__mro__ if "__call__" in vars(kind)), type(pipeline))
    if owner.__name__ not in _LOOPS or not owner.__module__.startswith("diffusers."):
        raise AsdmError(
            f"{type(pipeline).__name__}: its guidance cannot end early; leave cfg_cutoff out, or take a pipeline of "
            "Stable Diffusion without more kinds of guidance"
        )
    held = [name for name in _BRANCHED if name in pipeline._callback_tensor_inputs]
    return held, _BRANCHES.get(owner.__name__, _TWO_BRANCHES)
