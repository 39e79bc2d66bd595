"""Prompts for a pipeline's call: what a prompt loses, CLIP skip, and weights in parentheses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from asdm.diffusion.kinds import is_sdxl
from asdm.errors import AsdmError, AsdmWarning, needs_extra, one_line
from asdm.families import family_of

STRONGER = 1.1  # of a pair of parentheses without a number; brackets divide by it
_WEIGHT_LIMIT = 10.0
# An escaped character, an opening one, a closing one with or without a weight, or text between them.
_TOKENS = re.compile(r"\\[()\[\]\\]|[(\[]|:\s*([+-]?\d*\.?\d+)\s*\)|[)\]]|[^\\()\[\]:]+|[\\:]")
_LOOKS_WEIGHTED = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)")
_UNESCAPED = re.compile(r"\\([()\[\]\\])")


def lost_text(pipeline: DiffusionPipeline, prompt: str) -> str:
    """Return the end of a prompt that the text encoder does not read; empty where it reads all."""
    tokenizer, most = pipeline.tokenizer, family_of(pipeline).prompt_tokens(pipeline)
    tokens = tokenizer(prompt, verbose=False).input_ids
    return "" if len(tokens) <= most else str(tokenizer.decode(tokens[most - 1 : -1]))


def warn_of_lost_text(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> None:
    """Issue an `AsdmWarning` for each prompt that is too long, with what is lost of it."""
    most = family_of(pipeline).prompt_tokens(pipeline)
    for prompt in dict.fromkeys(prompts):
        lost = lost_text(pipeline, prompt)
        if lost:
            warnings.warn(
                f'prompt "{one_line(prompt, 40)}...": the model reads {most} tokens; it does not see '
                f'"{one_line(lost, 200)}"',
                AsdmWarning,
                stacklevel=3,
            )


def warn_of_unread_weights(prompts: Sequence[str]) -> None:
    """Issue an `AsdmWarning` where weights stand in a prompt that is read as plain text."""
    found = next((match for prompt in prompts if (match := _LOOKS_WEIGHTED.search(prompt))), None)
    if found:
        warnings.warn(
            f"{one_line(found[0], 60)}: read as text, not as a weight; set weighted (--weighted) to read weights",
            AsdmWarning,
            stacklevel=3,
        )


@torch.no_grad()
def prompt_arguments(
    pipeline: DiffusionPipeline, prompts: list[str], negative: str, clip_skip: int | None, weighted: bool
) -> dict[str, Any]:
    """Return the arguments of a pipeline's call that hold prompts: texts, or where CLIP layers are skipped or weights
    are read, embeddings.

    Raises:
        AsdmError: `clip_skip` leaves no layer, or does not go with weights.
    """
    if weighted:
        return _weighted_arguments(pipeline, prompts, negative, clip_skip)
    texts: dict[str, Any] = {"prompt": prompts}
    if negative:
        texts["negative_prompt"] = [negative] * len(prompts)
    if clip_skip is None:
        return texts
    _require_layers(pipeline.text_encoder, clip_skip)
    if is_sdxl(pipeline):
        return {**texts, "clip_skip": clip_skip}
    target: Any = pipeline
    with without_last_layers(pipeline.text_encoder, clip_skip):
        hidden, unguided = target.encode_prompt(prompts, pipeline.device, 1, True, [negative] * len(prompts))
    return {"prompt_embeds": hidden, "negative_prompt_embeds": unguided}


@contextmanager
def without_last_layers(text_encoder: nn.Module, count: int) -> Iterator[None]:
    """Leave out the last layers of a CLIP text encoder within the block. The final norm stays, so its output is that of
    "CLIP skip".

    diffusers' own `clip_skip` of Stable Diffusion 1.x and 2.x reads a module that transformers 5 has elsewhere.
    """
    encoder: Any = text_encoder.get_submodule(_layers_path(text_encoder).removesuffix(".layers"))
    layers = encoder.layers
    encoder.layers = layers[:-count]
    try:
        yield
    finally:
        encoder.layers = layers


def _layers_path(text_encoder: nn.Module) -> str:
    return next(name for name, _ in text_encoder.named_modules() if name.endswith("encoder.layers"))


def _require_layers(text_encoder: nn.Module, clip_skip: int) -> None:
    layers: Any = text_encoder.get_submodule(_layers_path(text_encoder))
    if clip_skip >= len(layers):
        raise AsdmError(
            f"clip_skip={clip_skip}: the text encoder has {len(layers)} layers; must be from 1 to {len(layers) - 1}"
        )


# -- weights in parentheses ------------------------------------------------------------------------------------


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into texts and their weights, in A1111's notation.

    `(text)` is `STRONGER`, `[text]` as much weaker, `(text:1.3)` has the given weight; they multiply when nested. A
    backslash makes the next parenthesis plain text.

    Raises:
        AsdmError: a parenthesis is not closed or not opened, or a weight is out of range.
    """
    parts: list[tuple[str, float]] = []
    open_at: list[tuple[str, int]] = []  # the characters that are open, and the part behind each
    for token in _TOKENS.finditer(prompt):
        text, given = token[0], token[1]
        if text in "([":
            open_at.append((text, len(parts)))
        elif text in ")]" or given is not None:
            opener = "[" if text == "]" else "("
            if not open_at or open_at[-1][0] != opener:
                raise AsdmError(f'prompt "{one_line(prompt, 60)}": {text} closes nothing; write \\{text[-1]} for text')
            factor = float(given) if given is not None else STRONGER if opener == "(" else 1 / STRONGER
            start = open_at.pop()[1]
            parts[start:] = [(part, weight * factor) for part, weight in parts[start:]]
        else:
            parts.append((_UNESCAPED.sub(r"\1", text), 1.0))
    if open_at:
        raise AsdmError(
            f'prompt "{one_line(prompt, 60)}": {open_at[0][0]} is not closed; write \\{open_at[0][0]} for text'
        )
    if any(not 0 <= weight <= _WEIGHT_LIMIT for _, weight in parts):
        raise AsdmError(f'prompt "{one_line(prompt, 60)}": weights must be from 0 to {_WEIGHT_LIMIT:g}')
    return _joined(parts)


def _joined(parts: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Join neighbours of one weight, and drop those without text."""
    joined: list[tuple[str, float]] = []
    for text, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        elif text.strip():
            joined.append((text, weight))
    return joined or [("", 1.0)]


def _weighted_arguments(
    pipeline: DiffusionPipeline, prompts: list[str], negative: str, clip_skip: int | None
) -> dict[str, Any]:
    """Return the embeddings of weighted prompts of any length."""
    with needs_extra("weighting", "weights in prompts"):
        from compel import Compel, ReturnedEmbeddingsType
    texts = [parse_weights(text) for text in (*prompts, negative)]
    if is_sdxl(pipeline):
        if clip_skip is not None:
            raise AsdmError(f"clip_skip={clip_skip}: with weights, only for SD 1.x and 2.x; leave one of them out")
        kind = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        encoders = [
            Compel(tokenizer, text_encoder, truncate_long_prompts=False, returned_embeddings_type=kind)
            for tokenizer, text_encoder in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        ]
        hidden = torch.cat([_padded(encoder, texts) for encoder in encoders], dim=-1)
        plain = ["".join(text for text, _ in parts) for parts in texts]
        tensors = {"prompt_embeds": hidden, "pooled_prompt_embeds": _pooled(pipeline, plain)}
        if not negative and pipeline.config.get("force_zeros_for_empty_prompt"):
            for tensor in tensors.values():
                tensor[len(prompts) :] = 0
        return _split(tensors, len(prompts))
    if clip_skip is not None:
        _require_layers(pipeline.text_encoder, clip_skip)
    with nullcontext() if clip_skip is None else without_last_layers(pipeline.text_encoder, clip_skip):
        encoder = Compel(pipeline.tokenizer, pipeline.text_encoder, truncate_long_prompts=False)
        return _split({"prompt_embeds": _padded(encoder, texts)}, len(prompts))


def _padded(encoder: Any, texts: Sequence[list[tuple[str, float]]]) -> Tensor:
    """Return the embeddings (texts, tokens, channels) of weighted texts, the shorter ones continued with empty ones."""
    from compel.prompt_parser import FlattenedPrompt

    each = [encoder.build_conditioning_tensor_for_prompt_object(FlattenedPrompt(parts))[0][0] for parts in texts]
    return torch.cat(encoder.pad_conditioning_tensors_to_same_length(each))


def _pooled(pipeline: Any, texts: list[str]) -> Tensor:
    """Return SDXL's pooled embeddings (texts, channels), which have no weights."""
    pooled: Tensor = pipeline.encode_prompt(texts, device=pipeline.device, do_classifier_free_guidance=False)[2]
    return pooled


def _split(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Give the last row of each tensor, the negative prompt's, to each of the `count` prompts."""
    positive = {name: tensor[:count] for name, tensor in tensors.items()}
    negative = {f"negative_{name}": tensor[count:].expand(count, *tensor.shape[1:]) for name, tensor in tensors.items()}
    return positive | negative
