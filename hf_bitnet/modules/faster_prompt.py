"""Decoder layers of transformers that compute a whole prompt in one kernel call each. Own.

Unlike a token, a prompt is not computed ahead: a layer's call costs nothing beside its products. What is saved is everything
between them, which a framework does with one pass over memory for each operation, and attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import kernels
from .faster_cache import buffers, show


def is_causal(module: Any, given: Mapping[str, Any]) -> bool:
    """Whether the layer, called without a mask and with `given` besides, lets each token see itself and what is before it."""
    attention = module._modules["self_attn"]
    config = getattr(attention, "config", None)
    # without a mask only torch's fused attention is causal of itself
    fused = config is None or config.__dict__.get("_attn_implementation_internal", "sdpa") in (None, "sdpa")
    return fused and getattr(attention, "is_causal", True) is True and all(map(_says_nothing, given.values()))


def _says_nothing(value: Any) -> bool:
    return value is None or value is False


def compute(
    module: Any, described: kernels.DescribedLayer, x: Tensor, cache: DynamicCache | None, angles: tuple[Tensor, Tensor]
) -> Tensor | None:
    """float (B, T, hidden) -> the layer's result, of the same shape; None where the call or the cache is of another kind.

    The cache has to be empty so far, and holds the tokens afterwards, with room for more.
    """
    batch, tokens, hidden = x.shape
    layer, index = described.layer, module.self_attn.layer_idx
    if cache is not None and not _is_empty(cache, index):
        return None
    fitting = all(
        angle.is_cpu and angle.shape[:-1] in ((1, tokens), (batch, tokens)) and angle.shape[-1] == layer.head_dim
        for angle in angles
    )
    if not fitting or hidden != described.hidden or not x.dtype == angles[0].dtype == angles[1].dtype == described.dtype:
        return None
    place = buffers(x, layer.kv_heads, layer.head_dim, tokens, grows=cache is not None)
    (y,) = kernels.decode_layers([(described, place, 0)], x, *angles)
    if cache is not None:
        cache.update(place.keys[:, :, :tokens], place.values[:, :, :tokens], index)
        show(cache.layers[index], place, tokens)  # type: ignore[arg-type]
    return y


def _is_empty(cache: DynamicCache, index: int) -> bool:
    """Whether a layer's part of the cache is of the plain kind, and has no tokens yet."""
    if index >= len(cache.layers):
        return getattr(cache, "layer_class_to_replicate", None) is DynamicLayer
    layer = cache.layers[index]
    return type(layer) is DynamicLayer and (layer.keys is None or not layer.keys.numel())
