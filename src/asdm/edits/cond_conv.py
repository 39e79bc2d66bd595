"""The edit `cond_conv` (CLME-CondConv): a kept convolution inherits the kernels of removed ones as experts.

Cross-layer multi-expert conditional convolution (named in the abstract of arXiv 2312.15516; the mixing of
kernels before one convolution is CondConv's, arXiv 1904.04971, Sec. 3; the rest is inferred): y = conv(x, sum_i
a_i W_i), W_0 the convolution's own kernel, W_1.. those of convolutions elsewhere in the teacher.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from asdm.choices import Router
from asdm.edits.base import EditedFamily, UnitEdit, register_edit
from asdm.edits.expert_adapters import require_followed
from asdm.edits.expert_kernels import Activation, Channels, CondConv2d, OneTimestepEmbedding
from asdm.edits.prompted_blocks import prompted
from asdm.edits.recast import Overlay, recast
from asdm.errors import AsdmError

_RESNETS = ".resnets."  # between the path of a block and its resnets'


@register_edit
@dataclass(frozen=True)
class CondConv(UnitEdit):
    """Give a convolution expert kernels, mixed with its own (CLME-CondConv).

    `unit` names a resnet's `conv1` or `conv2` that stays, `experts` the teacher's convolutions, mostly of removed
    units, whose kernels join the own one. `router`: what the mixture depends on: "input", the input's average;
    "prompt", the prompt's; "time", the time embedding, in which SDXL has the pooled prompt and the sizes, too;
    "input+time" or "prompt+time". `activation`: "softmax", or "sigmoid" for weights that do not compete.
    """

    edit = "cond_conv"
    no_split_modules: ClassVar = ("CondResnetBlock2D",)
    experts: list[str]
    router: Router = "input"
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.experts:
            raise AsdmError("experts is empty; name the convolutions to inherit from")

    def replacements(self, model: Any, family: EditedFamily) -> dict[str, nn.Module]:
        resnet_name = self.unit.rpartition(".")[0]
        self._require_known(family.conv_channels(model))
        resnet, conv = model.get_submodule(resnet_name), model.get_submodule(self.unit)
        for name in self.experts:
            expert = model.get_submodule(name)
            if not (isinstance(conv, nn.Conv2d) and isinstance(expert, nn.Conv2d)):
                raise AsdmError(f"{self.unit}: has expert kernels already, or {name} has; drop the edit")
            if name == self.unit or expert.weight.shape[0] != conv.weight.shape[0]:
                raise AsdmError(
                    f"{self.unit}: cannot inherit from {name}: an expert is another convolution with as many output "
                    f"channels, here {conv.out_channels} and not {expert.out_channels}"
                )
        read = self._read_channels(model, family, resnet)
        around = recast(CondResnetBlock2D, resnet)
        around.expert_convs = (*around.expert_convs, self.unit.rpartition(".")[2])
        assert isinstance(conv, nn.Conv2d)
        found: dict[str, nn.Module] = {
            resnet_name: around,
            self.unit: CondConv2d.around(conv, self.experts, self.router, self.activation, read),
        }
        if "prompt" in read:
            block_name = self.unit.partition(_RESNETS)[0]
            found = {block_name: prompted(model.get_submodule(block_name)), **found}
        if self.router == "time":
            found["time_embedding"] = recast(OneTimestepEmbedding, model.time_embedding)
        return found

    def changed_paths(self, model: Any, family: EditedFamily) -> list[str]:
        """Return the convolution: the modules around it only pass on what it reads."""
        return [self.unit]

    @classmethod
    def adapted(cls, path: str, module: nn.Module, student: Any) -> nn.Module:
        """Return a convolution without experts as one of the class that a `CondResnetBlock2D` expects there."""
        return recast(CondConv2d, module) if type(module) is nn.Conv2d else module

    def _read_channels(self, model: Any, family: EditedFamily, resnet: Any) -> dict[str, int]:
        """Return the channels of each part of what the router reads.

        Raises:
            AsdmError: there is no time embedding or prompt at this convolution.
        """
        time = 0 if resnet.time_emb_proj is None else resnet.time_emb_proj.in_features
        channels = {
            "input": model.get_submodule(self.unit).in_channels,
            "prompt": family.prompt_channels(model, self.unit),
            "time": time,
        }
        read = {name: channels[name] for name in self.router.split("+")}
        missing = next((name for name, width in read.items() if not width), None)
        if missing is not None:
            what = "time embedding" if missing == "time" else "cross-attention in its block, hence no prompt"
            others = [name for name in ("input", "time") if channels[name]]
            raise AsdmError(f"{self.unit}: has no {what} to route by; use router {' or '.join(others)}")
        return read

    def _require_known(self, channels: Mapping[str, Channels]) -> None:
        for name in (self.unit, *self.experts):
            if name not in channels:
                near = difflib.get_close_matches(name, channels, n=1, cutoff=0.0)
                raise AsdmError(
                    f"{name}: no convolution for expert kernels in this model; those are conv1 and conv2 of its "
                    f"resnets, the nearest is {near[0] if near else 'none'}"
                )

    def covers(self, units: Sequence[str], family: EditedFamily) -> list[str]:
        """None: the resnet around the convolution stays as removable as it is."""
        return []

    def gives_way_to(self, units: Collection[str], family: EditedFamily) -> bool:
        """Return False for an edit of the same convolution, which is an error."""
        return family.is_covered_by(self.unit, [unit for unit in units if unit != self.unit])


class CondResnetBlock2D(ResnetBlock2D):
    """A ResnetBlock2D that passes the time embedding, and the pooled prompt (batch, channels) where its block gives it
    one, to its convolutions with expert kernels, `expert_convs`."""

    expert_convs: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        # As peft and diffusers do when they unload adapters, whether these were merged or not.
        if name in self.expert_convs and name in self._modules and _has_experts(self._modules[name]):
            require_followed(self._modules[name])
        super().__setattr__(name, value)

    @property
    def reads_prompt(self) -> bool:
        """Whether the mixture of a convolution's kernels depends on the prompt."""
        parts = [part for conv in (self.conv1, self.conv2) for part in conv.modules()]
        return any(isinstance(part, CondConv2d) and part.sources and "prompt" in part.router_kind for part in parts)

    def forward(
        self, input_tensor: Tensor, temb: Tensor, *args: Any, prompt: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        conditional = {}
        for name in self.expert_convs:
            conv = self.get_submodule(name)
            _require_kept(name, conv)
            require_followed(conv)
            if _has_experts(conv):
                conditional[name] = partial(conv, temb=temb, prompt=prompt)
        # The stock forward; in this call, `self.conv1` and `self.conv2` get two more arguments.
        return ResnetBlock2D.forward(Overlay(self, conditional), input_tensor, temb, *args, **kwargs)  # type: ignore[arg-type]


def _has_experts(conv: nn.Module) -> bool:
    """Return whether a convolution has expert kernels, or is peft's layer around one that has."""
    return any(isinstance(module, CondConv2d) and module.sources for module in conv.modules())


def _require_kept(name: str, conv: nn.Module) -> None:
    """Raise an AsdmError where a tool has put another layer, without experts, in the place of a `CondConv2d`."""
    if not any(isinstance(module, CondConv2d) for module in conv.modules()):
        raise AsdmError(
            f"{name}: a {type(conv).__name__} is in the place of a CondConv2d, and has no expert kernels; leave layers "
            "of this class out where a tool replaces layers (quanto: quantize(.., exclude=[..]))"
        )
