"""Adapter files that number layers by position: their numbers translated to the student's.

An IP-Adapter numbers the cross-attentions, and the LoRA of a FaceID one all attentions, in order of execution. A
student has fewer attentions, so each number is resolved to a name in the UNet that the file was made for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from asdm.errors import AsdmError

Numbers = Mapping[int, str]  # of a file -> the attention's module path
_KEY = re.compile(r"(\d+)\.to_(q|k|v|out)_(ip|lora)\.(down\.|up\.)?weight")


def attentions_of(unet: UNet2DConditionModel) -> list[str]:
    """Return the module paths of all attentions, in the order in which files number them.

    Attentions of a loaded IP-Adapter, which project its images, do not count.
    """
    own = (name for name in unet.attn_processors if not name.startswith("encoder_hid_proj."))
    return [name.removesuffix(".processor") for name in own]


def renumber(
    state_dict: Mapping[str, Any], original: UNet2DConditionModel, student: UNet2DConditionModel
) -> dict[str, Any]:
    """Return an IP-Adapter's weights with the student's numbers, without those for attentions that the student lacks.

    A file that fits both UNets counts as one for the original.

    Args:
        state_dict: of one file, `{"image_proj": .., "ip_adapter": ..}`.
        original: without the student's edits; its weights are not read.

    Raises:
        AsdmError: the file fits neither UNet.
    """
    tensors: dict[str, Tensor] = state_dict["ip_adapter"]
    mine = {"ip": _cross_numbers(student), "lora": dict(enumerate(attentions_of(student)))}
    own_number = {kind: {name: number for number, name in numbers.items()} for kind, numbers in mine.items()}
    theirs = _numbers_of(tensors, original, student)
    weights = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            weights[key] = tensor
            continue
        number, rest = key.split(".", 1)
        name = theirs[found[3]].get(int(number))
        if name in own_number[found[3]]:
            weights[f"{own_number[found[3]][name]}.{rest}"] = tensor
    return {**state_dict, "ip_adapter": weights}


def _numbers_of(
    tensors: Mapping[str, Tensor], original: UNet2DConditionModel, student: UNet2DConditionModel
) -> dict[str, Numbers]:
    """Return what the numbers in a file mean, by kind of weight."""
    used = {int(found[1]) for key in tensors if (found := _KEY.fullmatch(key)) and found[3] == "ip"}
    for unet in (original, student):
        everywhere = dict(enumerate(attentions_of(unet)))
        # As diffusers counts, 1, 3, 5 and so on; and by place among all attentions, as in a list of processors.
        by_place = {number: name for number, name in everywhere.items() if not name.endswith("attn1")}
        for crossing in (_cross_numbers(unet), by_place):
            meaning: dict[str, Numbers] = {"ip": crossing, "lora": everywhere}
            if (not used or used == crossing.keys()) and _fit(tensors, unet, meaning):
                return meaning
    # Of the original, with more or fewer numbers than it has, but all that are needed.
    crossing = _cross_numbers(original)
    meaning = {"ip": crossing, "lora": dict(enumerate(attentions_of(original)))}
    needed = set(_cross_numbers(student).values())
    if needed <= {crossing.get(number) for number in used} and _fit(tensors, original, meaning):
        return meaning
    counts = [len(_cross_numbers(each)) for each in (original, student)]
    raise AsdmError(
        f"ip_adapter: a file for {len(used)} cross-attentions does not fit; the original UNet has {counts[0]} and this "
        f"student {counts[1]}, of widths of their own: load a file that was made for one of them"
    )


def _cross_numbers(unet: UNet2DConditionModel) -> dict[int, str]:
    """Return the cross-attentions as diffusers numbers them."""
    crossing = [name for name in attentions_of(unet) if not name.endswith("attn1")]
    return {2 * index + 1: name for index, name in enumerate(crossing)}


def _fit(tensors: Mapping[str, Tensor], unet: UNet2DConditionModel, numbers: Mapping[str, Numbers]) -> bool:
    """Return whether the weights have the shapes of the attentions with these numbers."""
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            continue
        number, side, kind, half = found.groups()
        name = numbers[kind].get(int(number))
        if name is None:
            if kind == "lora":
                return False
            continue
        attention: Any = unet.get_submodule(name)
        width_in, width_out = {
            "q": (attention.query_dim, attention.inner_dim),
            "k": (attention.cross_attention_dim, attention.inner_kv_dim),
            "v": (attention.cross_attention_dim, attention.inner_kv_dim),
            "out": (attention.inner_dim, attention.out_dim),
        }[side]
        if (half != "up." and tensor.shape[1] != width_in) or (half != "down." and tensor.shape[0] != width_out):
            return False
    return True
