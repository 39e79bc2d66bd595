"""What a denoiser's tensors show: its fingerprint, and whether its weights are its own alone and in memory."""

from __future__ import annotations

import json
from typing import Any

from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import Tensor, nn

from asdm.digests import short_digest
from asdm.errors import AsdmError

# In the names of tensors of fused projections, which hold copies of those that are fused.
FUSED_PROJECTIONS = (".to_qkv.", ".to_kv.")
# In the names of tensors that adapters (LoRA, IP-Adapter) and fused projections add to a denoiser.
ADDED_LATER = ("lora_", *FUSED_PROJECTIONS, "_ip.", "encoder_hid_proj.")


def fingerprint(model: Any) -> str:
    """Return a digest of the architecture (tensor names and shapes).

    It is equal for fine-tunes of one model, whatever adapters are loaded or projections fused. An exported denoiser has
    it as an attribute.
    """
    known = getattr(model, "fingerprint", None)
    if isinstance(known, str):
        return known
    shapes = {
        name.replace(".base_layer", ""): _digested_shape(name, tensor)
        for name, tensor in model.state_dict().items()
        if not any(added in name for added in ADDED_LATER)
    }
    return short_digest(json.dumps(shapes, sort_keys=True))


def _digested_shape(name: str, tensor: Tensor) -> list[int]:
    """Return a shape as the fingerprint has it: of a projection in a removed branch's place without a kernel's sides,
    which it did not have in version 0.1."""
    shape = list(tensor.shape)
    while name.endswith(".compensation.weight") and shape[-1] == 1:
        shape.pop()
    return shape


def has_ip_adapter(model: nn.Module) -> bool:
    """Return whether an IP-Adapter is loaded, whose images a model reads then. Its config's entries do not say it."""
    return any(isinstance(module, MultiIPAdapterImageProjection) for module in model.modules())


def require_torch(model: Any) -> None:
    """Raise an AsdmError where exported graphs stand in for a denoiser: they have neither layers nor weights."""
    if isinstance(model, nn.Module) and next(model.parameters(), None) is None:
        raise AsdmError(
            f"{type(model).__name__}: exported graphs, and this needs the torch denoiser; give the pipeline, or its "
            "UNet, before with_openvino_graphs"
        )


def require_plain(model: Any) -> None:
    """Raise an AsdmError where a denoiser's weights are not its own alone, or not in memory."""
    require_torch(model)
    names = model.state_dict().keys()
    if any(".base_layer." in name for name in names):
        raise AsdmError("a LoRA is loaded; keep it with fuse_lora(), then unload_lora_weights()")
    if has_ip_adapter(model):
        raise AsdmError("an IP-Adapter is loaded; unload it first, with unload_ip_adapter()")
    if any(name.startswith("_orig_mod.") for name in names):
        raise AsdmError("the model is compiled; give the original of it, its attribute _orig_mod")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AsdmError("the model's weights are offloaded, one module at a time; load it without that")
