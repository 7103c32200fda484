"""`decoder.decode_layer` in one call of the C++ library (`src/decode_layer.cpp`). Own.

The description of a layer is made once and holds addresses; it keeps the tensors they belong to, and says whether they are
still where they were.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..decoder import DecoderLayer, fits
from .common import FLOATS, check
from .library import functions

# hb_decoder_layer of src/hf_bitnet_decode.h
_SIZES = struct.Struct("@6qPPffffffiiiifi")
_WEIGHT = struct.Struct("@PqqPqqPqPq")


class Described:
    """A layer as the library reads it.

    Raises:
        ValueError: the parts do not belong together, or are of a dtype that the library does not know.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        dtype = layer.input_norm.dtype
        if dtype not in FLOATS or not fits(layer, dtype) or any(not tensor.is_cpu for tensor in _tensors(layer)):
            raise ValueError("the parts of this decoder layer do not belong together; every operation by itself says why")
        groups = {scale.shape[1] for _, scale, _ in _weights(layer)}
        if groups != {1}:
            raise ValueError("a decoder layer is decoded in one call only with scales of tensors or channels, not of groups")
        self.layer, self.dtype = layer, dtype
        self.addresses = [tensor.data_ptr() for tensor in _tensors(layer)]
        hidden, ffn = layer.input_norm.shape[0], layer.gate_up[0][0].shape[0]
        self.bytes = _SIZES.pack(
            *(FLOATS[dtype], hidden, layer.heads, layer.kv_heads, layer.head_dim, ffn),
            *(layer.input_norm.data_ptr(), layer.post_norm.data_ptr()),
            *(layer.input_eps, layer.post_eps, layer.scaling, *layer.rows),
            *(layer.layout.bits, 1, layer.layout.lowest, layer.layout.step, layer.layout.zero_point, 0),
        ) + b"".join(_pack(*weight) for weight in _weights(layer))

    def is_current(self) -> bool:
        """Whether every tensor is still at its address."""
        return self.addresses == [tensor.data_ptr() for tensor in _tensors(self.layer)]

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """`decoder.decode_layer`; x, cos and sin without gaps, keys and values of equal strides."""
        batch_stride, head_stride, position_stride, last = keys.stride()
        batch, _, hidden = x.shape
        one = (batch, self.layer.kv_heads, self.layer.head_dim)
        same = x.dtype == cos.dtype == sin.dtype == keys.dtype == values.dtype == self.dtype
        if not same or last != 1 or values.stride() != keys.stride() or keys.shape[2] <= length or values.shape != keys.shape:
            raise ValueError("keys and values need equal strides, the dtype of the layer and a place for the token")
        if hidden != self.layer.input_norm.shape[0] or (keys.shape[0], keys.shape[1], keys.shape[3]) != one:
            raise ValueError(f"x {tuple(x.shape)} and keys {tuple(keys.shape)} are not of this layer")
        if cos.shape != sin.shape or cos.shape[-1] != one[2] or cos.shape[0] not in (1, batch) or cos.shape[-2] != 1:
            raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} are not those of one token")
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        angle_stride = 0 if cos.shape[0] == 1 else one[2]
        check(
            functions().hb_decode_layer(
                *(self.bytes, batch, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), angle_stride),
                *(keys.data_ptr(), values.data_ptr(), batch_stride, head_stride, position_stride, length, out.data_ptr()),
            )
        )
        return out


def _weights(layer: DecoderLayer) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    return [*layer.qkv, layer.attention_out, *layer.gate_up, layer.down]


def _tensors(layer: DecoderLayer) -> list[Tensor]:
    parts = [layer.input_norm, layer.post_norm, *(part for weight in _weights(layer) for part in weight)]
    return [part for part in parts if part is not None]


def _pack(packed: Tensor, scale: Tensor, bias: Tensor | None) -> bytes:
    address, dtype = (0, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype])
    return _WEIGHT.pack(
        packed.data_ptr(), packed.shape[0], packed.stride(0), scale.data_ptr(), *scale.shape, address, dtype, 0, 0
    )
