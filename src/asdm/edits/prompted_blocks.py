"""Blocks that pass the pooled prompt to those of their resnets whose expert kernels are mixed by it.

A stock block gives the prompt to its attentions alone. Nothing is kept between calls.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, UNetMidBlock2DCrossAttn
from torch import Tensor, nn

from asdm.edits.recast import Overlay, recast
from asdm.errors import AsdmError


def pooled_prompt(encoder_hidden_states: Any, encoder_attention_mask: Tensor | None = None) -> Tensor:
    """Return the mean (batch, channels) of a prompt's hidden states (batch, tokens, channels) over its tokens.

    A denoiser gets no pooled embedding (SDXL's aside, which is in its time embedding), nor the place of the last word.
    All tokens behind that have read the whole caption, and a mean serves prompts of any number of tokens (inferred).

    Args:
        encoder_hidden_states: or a tuple that begins with them, as an IP-Adapter makes it.
        encoder_attention_mask: the bias (batch, 1, tokens) of the attention's logits, 0 for tokens that count. Where
            none counts, all do, as in the attention's softmax.
    """
    states: Tensor = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
    if encoder_attention_mask is None:
        return states.mean(dim=1)
    weights = encoder_attention_mask.to(states.dtype).softmax(dim=2).transpose(1, 2)
    return (states * weights).sum(dim=1)


def prompted(block: nn.Module) -> nn.Module:
    """Return a block as one that passes the prompt on; its parts are shared."""
    if isinstance(block, PromptedDownBlock2D | PromptedMidBlock2D | PromptedUpBlock2D):
        return block
    if isinstance(block, CrossAttnDownBlock2D):
        return recast(PromptedDownBlock2D, block)
    return recast(PromptedMidBlock2D if isinstance(block, UNetMidBlock2DCrossAttn) else PromptedUpBlock2D, block)


class PromptedDownBlock2D(CrossAttnDownBlock2D):
    """A CrossAttnDownBlock2D that passes the pooled prompt to its resnets."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return CrossAttnDownBlock2D.forward(_with_prompt(self, kwargs), *args, **kwargs)


class PromptedMidBlock2D(UNetMidBlock2DCrossAttn):
    """A UNetMidBlock2DCrossAttn that passes the pooled prompt to its resnets."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return UNetMidBlock2DCrossAttn.forward(_with_prompt(self, kwargs), *args, **kwargs)


class PromptedUpBlock2D(CrossAttnUpBlock2D):
    """A CrossAttnUpBlock2D that passes the pooled prompt to its resnets."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return CrossAttnUpBlock2D.forward(_with_prompt(self, kwargs), *args, **kwargs)


def _with_prompt(block: Any, kwargs: dict[str, Any]) -> Any:
    """Return the block for one call: resnets that read the prompt get it with their other arguments."""
    states = kwargs.get("encoder_hidden_states")
    if states is None:
        raise AsdmError("expert kernels are mixed by the prompt, and the call has no encoder_hidden_states; give them")
    prompt = pooled_prompt(states, kwargs.get("encoder_attention_mask"))
    resnets = [
        partial(resnet, prompt=prompt) if getattr(resnet, "reads_prompt", False) else resnet for resnet in block.resnets
    ]
    return Overlay(block, {"resnets": resnets})
