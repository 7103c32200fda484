"""Room for the next tokens in transformers' cache of keys and values. Own.

They live in buffers with room to grow, of which the cache holds views, instead of being copied for each token.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .. import kernels

_TOKENS = 64  # a buffer grows by so many at least


class Held(NamedTuple):
    """Buffers of a layer of a cache.

    Attributes:
        place: the buffers.
        present: what the cache holds of them; any other tensor there means that somebody else has changed the cache.
    """

    place: kernels.CachePlace
    present: tuple[Tensor, Tensor]


_HELD: weakref.WeakKeyDictionary[DynamicLayer, Held] = weakref.WeakKeyDictionary()


def past_of(cache: DynamicCache, index: int) -> DynamicLayer | None:
    """The part of the cache that belongs to a layer, if it holds past tokens in the plain manner."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is not DynamicLayer or not layer.is_initialized or layer.keys is None or not layer.keys.numel():
        return None
    return layer if layer.keys.is_cpu else None


def held_by(layer: DynamicLayer) -> Held | None:
    """The buffers that the cache shows a view of; None where it shows anything else."""
    held = _HELD.get(layer)
    return held if held is not None and held.present[0] is layer.keys and held.present[1] is layer.values else None


def with_room(layer: DynamicLayer, tokens: int = 1) -> kernels.CachePlace:
    """Buffers that hold the cache's keys and values and have a place for `tokens` more; the cache shows views of them."""
    keys, values = layer.keys, layer.values
    assert keys is not None and values is not None
    length, held = keys.shape[2], held_by(layer)
    if held is not None and held.place.positions >= length + tokens:
        return held.place
    place = buffers(keys, keys.shape[1], keys.shape[3], length + tokens - 1)
    place.keys[:, :, :length], place.values[:, :, :length] = keys, values
    show(layer, place, length)
    return place


def buffers(like: Tensor, heads: int, size: int, tokens: int, *, grows: bool = True) -> kernels.CachePlace:
    """Buffers (B, heads, positions, size) for `tokens`, and more if it `grows`; B, dtype and device are those of `like`."""
    positions = tokens + max(_TOKENS, tokens // 2) if grows else tokens
    keys, values = (like.new_empty(like.shape[0], heads, positions, size) for _ in range(2))
    return kernels.cache_place(keys, values)


def show(layer: DynamicLayer, place: kernels.CachePlace, length: int) -> None:
    """Lets the cache hold the first `length` tokens of the buffers."""
    layer.keys, layer.values = place.keys.narrow(2, 0, length), place.values.narrow(2, 0, length)
    _HELD[layer] = Held(place, (layer.keys, layer.values))
