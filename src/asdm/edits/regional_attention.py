"""The edit `gri_attention`: global-regional interactive attention (the abstract of arXiv 2312.15516, inferred).

The map of tokens is split into regions. A region's queries attend, in one softmax, to the keys and values of
their own region and to global ones, pooled from the whole map. There are no new parameters: the pretrained
projections are inherited, so it works before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from asdm.edits.base import EditedFamily, UnitEdit, register_edit, require_at_least
from asdm.edits.recast import recast
from asdm.errors import AsdmError

MANY_TOKENS = 256  # from here on global-regional attention can pay
EVEN_MORE_TOKENS = 4096  # from here on with smaller regions and coarser global tokens
MAP_SIDES = "map_sides"  # among the cross_attention_kwargs
_INSIDE = ".transformer_blocks."  # between the path of a Transformer2DModel and its blocks'


@register_edit
@dataclass(frozen=True)
class GriAttention(UnitEdit):
    """Replace a self-attention by global-regional attention.

    `unit` names an `attn1`; `regions` along each side of the map of tokens; `pool`, the side of the squares of
    tokens that are averaged to a global one, 0 for none; `weighted`, whether a global token counts for as many
    of those as the region does not see itself.
    """

    edit = "gri_attention"
    has_first_order_estimate = True
    regions: int = 4
    pool: int = 2
    weighted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("regions", self.regions, 1)
        require_at_least("pool", self.pool, 0)

    def replacements(self, model: Any, family: EditedFamily) -> dict[str, nn.Module]:
        layer_name = self.unit.partition(_INSIDE)[0]
        try:
            layer, attention = model.get_submodule(layer_name), model.get_submodule(self.unit)
        except AttributeError:
            raise family.no_such_unit(model, self.unit) from None
        if not isinstance(layer, Transformer2DModel) or not self.unit.endswith(".attn1"):
            raise AsdmError(f"{self.unit}: not a self-attention; gri_attention is for units that end in .attn1")
        block = model.get_submodule(self.unit.rpartition(".")[0])
        if getattr(block, "only_cross_attention", False) or not _is_plain(attention):
            raise AsdmError(f"{self.unit}: not a plain self-attention, and gri_attention knows no other; drop the edit")
        around = layer if isinstance(layer, GriTransformer2DModel) else GriTransformer2DModel.around(layer)
        attentions = {
            f"{layer_name}.{name}": recast(AttentionOnMap, module)
            for name, module in layer.named_modules()
            if isinstance(module, Attention)
        }
        attentions[self.unit].set_processor(self._processor())
        return {layer_name: around, **attentions}

    def _processor(self) -> GriAttnProcessor:
        return GriAttnProcessor(self.regions, self.pool, self.weighted)

    @classmethod
    def candidates(cls, model: Any, family: EditedFamily, positions: Mapping[str, int]) -> Sequence[UnitEdit]:
        """Return a more exact and a faster kind for each self-attention over many tokens that allows the edit."""
        found = []
        for unit in family.units(model):
            tokens = positions[unit.layer]
            if unit.kind == "self_attention" and tokens >= MANY_TOKENS:
                for regions, pool in gri_kinds(tokens):
                    with suppress(AsdmError):
                        edit = cls(unit=unit.name, regions=regions, pool=pool, weighted=True)
                        edit.replacements(model, family)
                        found.append(edit)
        return found

    @property
    def measured_with(self) -> Hashable:
        """All attentions of one kind: each changes its own unit's cost alone."""
        return self.edit, self.regions, self.pool

    def changed_paths(self, model: Any, family: EditedFamily) -> list[str]:
        return [self.unit]

    def estimated_output(self, module: Any, args: tuple[Any, ...], layer_input: Tensor) -> Tensor:
        height, width = layer_input.shape[2:]
        return self._processor()(module, args[0], map_sides=(height, width))

    @classmethod
    def adapted(cls, path: str, module: nn.Module, student: Any) -> nn.Module:
        """Return an attention that accepts the sides of the map, which a `GriTransformer2DModel` gives to all of its
        own."""
        return recast(AttentionOnMap, module) if isinstance(module, Attention) else module


def gri_kinds(tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return regions and pooling for a map of so many tokens: of a more exact and of a faster kind."""
    return ((4, 4), (8, 8)) if tokens >= EVEN_MORE_TOKENS else ((4, 2), (4, 4))


def _is_plain(attention: nn.Module) -> bool:
    """Return whether an attention is what a Stable Diffusion transformer has: projections and nothing else."""
    extras = ("spatial_norm", "group_norm", "norm_q", "norm_k", "add_k_proj")
    return (
        isinstance(attention, Attention)
        and not attention.residual_connection
        and all(getattr(attention, name, None) is None for name in extras)
    )


class GriAttnProcessor(nn.Module):
    """A diffusers attention processor for self-attention over a map of tokens.

    Args:
        regions: how many regions along each side; 1 is the whole map. With 0, the value when diffusers constructs
            processors itself, it cannot attend, and a student's `set_attn_processor` keeps the one it had.
        pool: side of the squares of tokens whose keys and values are averaged to a global one; 0 for none.
        weighted: a global token counts for as many of those it was averaged from as the region does not see itself, by
            a term on its logit (as merged tokens do in ToMe, arXiv 2210.09461, Eq. 1).

    With one region and no pooling it is full attention, exactly.
    """

    def __init__(self, regions: int = 0, pool: int = 0, weighted: bool = False):
        super().__init__()
        self.regions, self.pool, self.weighted = regions, pool, weighted

    def __call__(
        self, attn: Attention, hidden_states: Tensor, *_: Any, map_sides: tuple[int, int] | None = None, **__: Any
    ) -> Tensor:
        """Attend over hidden states (batch, height * width, channels); `map_sides` are height and width.

        Raises:
            AsdmError: there are more or fewer tokens than the map has.
        """
        if map_sides is None or map_sides[0] * map_sides[1] != hidden_states.shape[1]:
            sides = "unknown sides" if map_sides is None else "x".join(str(side) for side in map_sides)
            raise AsdmError(
                f"gri_attention: {hidden_states.shape[1]} tokens of a map of {sides}; it does not work with "
                "methods that merge or drop tokens (tomesd): use those with the original, or a student without "
                "gri_attention"
            )
        query, key, value = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        where, back = _places(*map_sides, self.regions, str(query.device))
        batch, count, channels = query.shape[0], where.shape[0], query.shape[2]

        def by_region(states: Tensor) -> Tensor:
            return states[:, None] if count == 1 else states.index_select(1, where.flatten()).unflatten(1, where.shape)

        query, local_key, local_value, mask = by_region(query), by_region(key), by_region(value), None
        if self.pool:
            keys, values = (
                self._pooled(states, map_sides)[:, None].expand(-1, count, -1, -1) for states in (key, value)
            )
            local_key, local_value = torch.cat([local_key, keys], dim=2), torch.cat([local_value, values], dim=2)
            if self.weighted:
                weights = _weights(*map_sides, self.regions, self.pool, str(query.device))
                mask = weights.to(query.dtype).repeat(batch, 1, 1, 1)

        def by_head(states: Tensor) -> Tensor:
            return states.flatten(0, 1).unflatten(2, (attn.heads, channels // attn.heads)).transpose(1, 2)

        # As the stock processor does: other backends, which diffusers' dispatch can be set to, may take no mask.
        mixed = F.scaled_dot_product_attention(by_head(query), by_head(local_key), by_head(local_value), mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        if count > 1:
            mixed = mixed.unflatten(0, (-1, count)).flatten(1, 2).index_select(1, back)
        return attn.to_out[1](attn.to_out[0](mixed.to(query.dtype))) / attn.rescale_output_factor

    def keys_per_query(self, height: int, width: int) -> int:
        """Return how many keys each query meets in a map of tokens."""
        global_keys = ceil(height / self.pool) * ceil(width / self.pool) if self.pool else 0
        return _places(height, width, self.regions, "cpu")[0].shape[1] + global_keys

    def _pooled(self, states: Tensor, sides: tuple[int, int]) -> Tensor:
        """Return the averages (batch, squares, channels) of the squares of a map of tokens."""
        as_map = states.mT.unflatten(2, sides)
        pooled = F.avg_pool2d(as_map, self.pool, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).mT


def _memoized(computed: Callable[..., Any]) -> Callable[..., Any]:
    """Memoize a function of tensors, but not while a graph is exported, whose tensors are symbolic, and not while
    shapes stand for tensors, as in an estimate of a training.

    Tensors are computed outside inference mode, so that a later training can use them.
    """
    known = lru_cache(maxsize=64)(computed)

    def found(*args: Any) -> Any:
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
            return computed(*args)
        with torch.inference_mode(False):
            return known(*args)

    return found


@_memoized
def _places(height: int, width: int, regions: int, device: str) -> tuple[Tensor, Tensor]:
    """Return the token at each place of each region (regions, size), and the place of each token (height * width,).

    All regions have one size, so no key has to be masked. Where `regions` does not divide a side, neighbours overlap.
    """
    axes = []
    for side in (height, width):
        count = min(regions, side)
        length = ceil(side / count)
        starts = torch.tensor([min(region * length, side - length) for region in range(count)])
        region_of = torch.arange(side) // length
        axes.append((starts[:, None] + torch.arange(length), region_of, torch.arange(side) - starts[region_of]))
    (rows, row_region, row_offset), (columns, column_region, column_offset) = axes
    where = rows[:, None, :, None] * width + columns[None, :, None, :]
    size = rows.shape[1] * columns.shape[1]
    region = row_region[:, None] * len(columns) + column_region
    back = region * size + row_offset[:, None] * columns.shape[1] + column_offset
    return where.reshape(-1, size).to(device), back.flatten().to(device)


@_memoized
def _weights(height: int, width: int, regions: int, pool: int, device: str) -> Tensor:
    """Return the bias of each region's logits (regions, 1, 1, keys).

    It is zero for the region's own tokens, and for a global token the logarithm of how many of its tokens the region
    does not see.
    """
    where, _ = _places(height, width, regions, device)
    unseen = torch.ones(len(where), height * width, device=device).scatter(1, where, 0)
    as_map = unseen.view(-1, 1, height, width)
    whole = F.pad(as_map, (0, -width % pool, 0, -height % pool))
    # Sums by squares, not by pooling, for which OpenVINO has no kernel in half precision.
    counts = whole.unflatten(3, (-1, pool)).unflatten(2, (-1, pool)).sum((3, 5)).flatten(1)
    return torch.cat([torch.zeros(where.shape, device=device), counts.log()], dim=1)[:, None, None]


class AttentionOnMap(Attention):
    """An Attention that accepts the sides of the map of tokens; only regional attention uses them."""

    def __setattr__(self, name: str, value: Any) -> None:
        # PAG sets processors as attributes, and torch lets no other object replace a module.
        if name == "processor" and not isinstance(value, nn.Module):
            vars(self).get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)

    def forward(
        self, hidden_states: Tensor, *args: Any, map_sides: tuple[int, int] | None = None, **kwargs: Any
    ) -> Any:
        if isinstance(self.processor, GriAttnProcessor):
            kwargs[MAP_SIDES] = map_sides
        return super().forward(hidden_states, *args, **kwargs)


class GriTransformer2DModel(Transformer2DModel):
    """A Transformer2DModel that passes the sides of the map of tokens to its attentions."""

    @classmethod
    def around(cls, transformer: Transformer2DModel) -> GriTransformer2DModel:
        """Return the same transformer; its modules are shared."""
        with torch.device("meta"):
            same = cls(**{key: value for key, value in transformer.config.items() if not key.startswith("_")})
        for name, child in transformer.named_children():
            setattr(same, name, child)
        return same.train(transformer.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        with_sides = {**(cross_attention_kwargs or {}), MAP_SIDES: tuple(hidden_states.shape[2:])}
        return super().forward(
            hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels, with_sides, *args, **kwargs
        )
