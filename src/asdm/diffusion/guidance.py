"""Classifier-free guidance that ends before the sampling does. At low noise it helps least and costs as much as at high
noise (arXiv 2404.07724; this is the lower end of its interval)."""

from __future__ import annotations

import math
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from asdm import checks
from asdm.errors import AsdmError
from asdm.families import denoiser_of
from asdm.families.tensors import has_ip_adapter

CFG_CUTOFF = checks.number(above=0, high=1, remedy="for no guidance at all give guidance_scale=1")
# Pipelines whose loop hands a callback the tensors that it requests, takes back those that have a row for each branch,
# and checks at every step whether there is guidance. Others do not: those with perturbed attention or a union of
# ControlNets, and inpainting by a ControlNet.
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
# The number of branches, and the index of the one with both the prompt and the image.
_BRANCHES = {"StableDiffusionInstructPix2PixPipeline": (3, 0)}
_TWO_BRANCHES = (2, 1)  # without the prompt, and with it
# Tensors with rows for each branch that a callback may change.
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


def guided_steps(cfg_cutoff: float, steps: int) -> int:
    """Return how many of so many steps are guided: at least this fraction of them, and one. 7 of 100 are 0.07, whose
    product with 100 is a little more than 7."""
    return max(1, math.ceil(round(cfg_cutoff * steps, 6)))


class CfgCutoff(PipelineCallback):
    """End a pipeline's classifier-free guidance after a fraction of its steps. The other steps take half the work.

        pipeline(prompts, callback_on_step_end=asdm.CfgCutoff(pipeline, 0.8))

    It works like `SDCFGCutoffCallback` of diffusers, but for any number of prompts and for the pipelines of SD, SDXL
    and Kolors: text-to-image, image-to-image, inpainting, InstructPix2Pix, ControlNet.

    Args:
        pipeline: the one that will call it.
        cfg_cutoff: fraction of the steps, in (0, 1], that are guided; at least one is.

    Raises:
        AsdmError: `cfg_cutoff` is out of range, or the pipeline's guidance cannot be ended by a callback.
    """

    @checks.arguments(cfg_cutoff=CFG_CUTOFF)
    def __init__(self, pipeline: DiffusionPipeline, cfg_cutoff: float):
        super().__init__(cutoff_step_ratio=float(cfg_cutoff))
        self._branched, self._branches = _branches_of(pipeline)
        if has_ip_adapter(denoiser_of(pipeline)):
            raise AsdmError("cfg_cutoff does not go with an IP-Adapter, whose images no callback can change; unload it")

    @property
    def tensor_inputs(self) -> list[str]:
        return self._branched

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        guided = guided_steps(self.config.cutoff_step_ratio, pipeline.num_timesteps)
        if step_index + 1 != guided or not pipeline.do_classifier_free_guidance:
            return callback_kwargs
        if _branches_of(pipeline) != (self._branched, self._branches):
            raise AsdmError(f"this CfgCutoff was made for another kind of pipeline than {type(pipeline).__name__}")
        pipeline._guidance_scale = 1.0  # each call of the pipeline sets it
        size = len(callback_kwargs["prompt_embeds"])
        return {name: self._conditional(value, size) for name, value in callback_kwargs.items()}

    def _conditional(self, value: Any, size: int) -> Any:
        """Take the branch with the prompt from what has all branches. A ControlNet's image in guess mode has one."""
        if isinstance(value, list):
            return [self._conditional(each, size) for each in value]
        count, which = self._branches
        return value.chunk(count)[which] if isinstance(value, Tensor) and len(value) == size else value


def _branches_of(pipeline: DiffusionPipeline) -> tuple[list[str], tuple[int, int]]:
    """Return names of a pipeline's tensors with rows for each branch; the number of branches, and the index of the
    one that stays."""
    owner = next((kind for kind in type(pipeline).__mro__ if "__call__" in vars(kind)), type(pipeline))
    if owner.__name__ not in _LOOPS or not owner.__module__.startswith("diffusers."):
        raise AsdmError(
            f"{type(pipeline).__name__}: its guidance cannot end early; leave cfg_cutoff out, or take a pipeline of "
            "Stable Diffusion without other kinds of guidance"
        )
    branched = [name for name in _BRANCHED if name in pipeline._callback_tensor_inputs]
    return branched, _BRANCHES.get(owner.__name__, _TWO_BRANCHES)
