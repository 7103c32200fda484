"""Decoder layers of transformers that compute a prompt, or what is added to one, in one kernel call each. Own.

Unlike a token, a prompt is not computed ahead: a layer's call costs nothing beside its products. What is saved is everything
between them, which a framework does with one pass over memory for each operation, and attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import kernels
from .faster_cache import buffers, past_of, show, with_room


class _Mask(NamedTuple):
    """A mask that was looked at.

    Attributes:
        version: the number of changes in place by then.
    """

    mask: weakref.ref[Tensor]
    version: int
    causal: bool


_last: _Mask | None = None


def attending(module: Any) -> str | None:
    """The way to attend that a layer's config names, read where the property of transformers keeps it, which costs less."""
    config = getattr(module._modules["self_attn"], "config", None)
    return "sdpa" if config is None else config.__dict__.get("_attn_implementation_internal", "sdpa")


def is_causal(module: Any, given: Mapping[str, Any]) -> bool:
    """Whether the layer, called without a mask and with `given` besides, lets each token see itself and what is before it."""
    fused = attending(module) in (None, "sdpa")  # without a mask only torch's fused attention is causal of itself
    causal = getattr(module._modules["self_attn"], "is_causal", True) is True
    return fused and causal and all(map(_says_nothing, given.values()))


def _says_nothing(value: Any) -> bool:
    return value is None or value is False


def shows_all_before(mask: Tensor | None, batch: int, tokens: int) -> bool:
    """Whether a mask (B or 1, 1, T, S) of bool lets the last T of S positions see all up to themselves; or there is no mask."""
    global _last
    if mask is None:
        return True
    if mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu or mask.shape[-1] < tokens:
        return False
    if mask.shape[0] not in (1, batch) or mask.shape[1:3] != (1, tokens):
        return False
    version = -1 if mask.is_inference() else mask._version  # inference tensors have no version, and are looked at each time
    known = _last  # all layers of a model are given one mask
    if known is not None and known.mask() is mask and known.version == version >= 0:
        return known.causal
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril(mask.shape[-1] - tokens)
    found = all(torch.equal(each[0], causal) for each in mask)
    _last = _Mask(weakref.ref(mask), version, found)
    return found


def compute(
    module: Any,
    described: kernels.DescribedLayer,
    x: Tensor,
    mask: Tensor | None,
    cache: DynamicCache | None,
    angles: tuple[Tensor, Tensor],
) -> Tensor | None:
    """float (B, T, hidden) -> the layer's result, of the same shape; None where the call or the cache is of another kind.

    The cache holds the tokens afterwards, with room for more.
    """
    batch, tokens, hidden = x.shape
    layer, index = described.layer, module.self_attn.layer_idx
    fitting = all(
        angle.is_cpu and angle.shape[:-1] in ((1, tokens), (batch, tokens)) and angle.shape[-1] == layer.head_dim
        for angle in angles
    )
    if not fitting or hidden != described.hidden or not x.dtype == angles[0].dtype == angles[1].dtype == described.dtype:
        return None
    length = 0 if mask is None else mask.shape[-1] - tokens
    if length:
        return None if cache is None else _behind(described, x, past_of(cache, index), length, angles)
    if cache is not None and not _is_empty(cache, index):
        return None
    place = buffers(x, layer.kv_heads, layer.head_dim, tokens, grows=cache is not None)
    (y,) = kernels.decode_layers([(described, place, 0)], x, *angles)
    if cache is not None:
        cache.update(place.keys[:, :, :tokens], place.values[:, :, :tokens], index)
        show(cache.layers[index], place, tokens)  # type: ignore[arg-type]
    return y


def _behind(
    described: kernels.DescribedLayer, x: Tensor, past: DynamicLayer | None, length: int, angles: tuple[Tensor, Tensor]
) -> Tensor | None:
    """The result for tokens that follow `length` others in the cache."""
    layer = described.layer
    if past is None or past.keys is None or past.dtype != described.dtype:
        return None
    if past.keys.shape != (x.shape[0], layer.kv_heads, length, layer.head_dim):
        return None
    place = with_room(past, x.shape[1])
    (y,) = kernels.decode_layers([(described, place, length)], x, *angles)
    show(past, place, length + x.shape[1])
    return y


def _is_empty(cache: DynamicCache, index: int) -> bool:
    """Whether a layer's part of the cache is of the plain kind, and has no tokens yet."""
    if index >= len(cache.layers):
        return getattr(cache, "layer_class_to_replicate", None) is DynamicLayer
    layer = cache.layers[index]
    return type(layer) is DynamicLayer and (layer.keys is None or not layer.keys.numel())
