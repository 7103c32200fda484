"""`decoder.decode_layer` for one layer after another, in one call of the C++ library (`src/decode_layer.cpp`). Own.

The description of a layer is made once and holds addresses; it keeps the tensors they belong to, and says whether they are
still where they were. So does a place, which is where a layer's keys and values go.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoder import ACTIVATIONS, DecoderLayer, Norm, fits
from ..reference import PackedWeight
from .common import FLOATS, check, require_cpu
from .library import functions
from .products import NO_RESULT, describe

# hb_decoder_layer and hb_decode_step of src/hf_bitnet_decode.h
_SIZES = struct.Struct("@6q")
_NORM = struct.Struct("@Pfi")
_NUMBERS = struct.Struct("@ffffiiiifi")
_STEP = struct.Struct("@PPP4qP")


class Place(NamedTuple):
    """Buffers (batch, heads, positions, size) of a layer's keys and values, as the library reads them."""

    keys: Tensor
    values: Tensor
    dtype: torch.dtype
    batch: int
    heads: int
    positions: int
    size: int
    numbers: tuple[int, ...]


def place_of(keys: Tensor, values: Tensor) -> Place:
    """Checks buffers, once for all tokens that fit in. Raises ValueError when they do not belong together."""
    *strides, last = keys.stride()
    alike = values.stride() == keys.stride() and values.shape == keys.shape and values.dtype == keys.dtype
    if not alike or keys.dim() != 4 or last != 1 or not keys.is_cpu or not values.is_cpu:
        raise ValueError("keys and values need equal shapes, dtypes and strides, the last of them 1, on the CPU")
    batch, heads, positions, size = keys.shape
    return Place(keys, values, keys.dtype, batch, heads, positions, size, (keys.data_ptr(), values.data_ptr(), *strides))


class Described:
    """A layer as the library reads it.

    Raises:
        ValueError: the parts do not belong together, or are of a dtype that the library does not know.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        dtype = layer.input_norm.weight.dtype
        known = dtype in FLOATS and layer.activation in ACTIVATIONS
        of_biases = {bias.dtype for _, _, bias in _weights(layer) if bias is not None}
        if not known or not of_biases <= FLOATS.keys() or not fits(layer, dtype):
            raise ValueError("the parts of this decoder layer do not belong together; every operation by itself says why")
        require_cpu(*_tensors(layer))
        groups = {scale.shape[1] for _, scale, _ in _weights(layer)}
        if groups != {1}:
            raise ValueError("a decoder layer is decoded in one call only with scales of tensors or channels, not of groups")
        self.layer, self.dtype = layer, dtype
        self._tensors = tuple(_tensors(layer))
        self._addresses = self._find()
        self.hidden, ffn = layer.input_norm.weight.shape[0], layer.gate_up[0][0].shape[0]
        layout = layer.layout
        self._bytes = b"".join(
            (
                _SIZES.pack(FLOATS[dtype], self.hidden, layer.heads, layer.kv_heads, layer.head_dim, ffn),
                *map(_pack_norm, layer.norms.values()),
                _NUMBERS.pack(
                    *(layer.scaling, *layer.rows, layout.bits, 1, layout.lowest, layout.step, layout.zero_point),
                    list(ACTIVATIONS).index(layer.activation),
                ),
                *(describe(weight) + NO_RESULT for weight in _weights(layer)),
            )
        )
        self.address = ctypes.cast(ctypes.c_char_p(self._bytes), ctypes.c_void_p).value

    def _find(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))

    def is_current(self) -> bool:
        """Whether every tensor is still at its address."""
        return self._addresses == self._find()

    def __reduce__(self) -> Any:
        raise TypeError("the description of a layer holds addresses of this process; describe the copy of the layer instead")

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """`decoder.decode_layer`."""
        return decode_layers([(self, place_of(keys, values), length)], x, cos, sin)[0]


def decode_layers(steps: Sequence[tuple[Described, Place, int]], x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """`decoder.decode_layer` of each layer on the result of the one before it.

    Args:
        steps: layers, where their keys and values go, and how many past positions are there.
        x, cos, sin: of `decode_layer`; all of the layers' dtype.

    Returns:
        Every layer's result, (B, T, hidden) each.

    Raises:
        ValueError: the parts do not belong together, or a buffer is full.
    """
    if x.dim() != 3 or cos.dim() != 3:
        found = f"{tuple(x.shape)} and {tuple(cos.shape)}"
        raise ValueError(f"x and cos are (batch, tokens, hidden) and (batch or 1, tokens, head size), not {found}")
    batch, tokens, hidden = x.shape
    size, dtype = cos.shape[-1], x.dtype
    if cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[-2] != tokens:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} are not those of {tokens} tokens")
    if not dtype == cos.dtype == sin.dtype:
        raise ValueError(f"x, cos and sin need one dtype, not {dtype}, {cos.dtype} and {sin.dtype}")
    if not x.is_cpu or not cos.is_cpu or not sin.is_cpu:
        raise ValueError(f"x, cos and sin need to be on the CPU, not on {x.device}, {cos.device} and {sin.device}")
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    results, packed = [torch.empty_like(x) for _ in steps], []
    for (described, place, length), result in zip(steps, results, strict=True):
        layer = described.layer
        if (hidden, size, dtype) != (described.hidden, layer.head_dim, described.dtype):
            raise ValueError(f"x {tuple(x.shape)} of {dtype} and angles of {size} are not of this layer")
        if (place.batch, place.heads, place.size, place.dtype) != (batch, layer.kv_heads, size, dtype):
            raise ValueError(f"keys {tuple(place.keys.shape)} of {place.dtype} are not of this layer")
        if length + tokens > place.positions:
            raise ValueError(f"keys and values need {length + tokens} places, {tokens} of them new, and have {place.positions}")
        packed.append(_STEP.pack(described.address, *place.numbers, length, result.data_ptr()))
    if not x.numel():
        return results
    angle_stride = 0 if cos.shape[0] == 1 else tokens * size
    given = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), angle_stride
    check(functions().hb_decode_layers(b"".join(packed), len(packed), batch, tokens, *given))
    return results


def _weights(layer: DecoderLayer) -> list[PackedWeight]:
    return [*layer.qkv, layer.attention_out, *layer.gate_up, layer.down]


def _tensors(layer: DecoderLayer) -> list[Tensor]:
    parts = [norm.weight for norm in layer.norms.values() if norm is not None]
    parts += [part for weight in _weights(layer) for part in weight]
    return [part for part in parts if part is not None]


def _pack_norm(norm: Norm | None) -> bytes:
    return _NORM.pack(0, 0.0, 0) if norm is None else _NORM.pack(norm.weight.data_ptr(), norm.eps, norm.once)
