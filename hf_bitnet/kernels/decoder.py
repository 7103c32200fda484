"""A whole decoder layer for one new token: what it is, and its definition by the other operations. Own.

The body in C++ (`cpu/decoder.py`) makes one call of it. Between the products of a token, calling thirty operations and as many
modules costs more than computing them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from .reference import Layout, PackedWeight, RowQuantization, packed_linear, packed_linears, rms_norm, rotate


class DecoderLayer(NamedTuple):
    """A pre-norm layer with rotary embedding, grouped attention and a gated SiLU (Llama, Mistral, ...), as packed weights.

    Attributes:
        input_norm, post_norm: weights (hidden,) of the RMS norms, in the dtype of the activations.
        input_eps, post_eps: what the norms add to the mean square.
        qkv, attention_out, gate_up, down: packed weights; all share `layout`, and their inputs are quantized by `rows`.
        heads, kv_heads, head_dim: of the attention. scaling: factor of its scores.
    """

    input_norm: Tensor
    post_norm: Tensor
    input_eps: float
    post_eps: float
    qkv: tuple[PackedWeight, PackedWeight, PackedWeight]
    attention_out: PackedWeight
    gate_up: tuple[PackedWeight, PackedWeight]
    down: PackedWeight
    layout: Layout
    rows: RowQuantization
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float


def decode_layer(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    """The layer for one new token of each sequence.

    Args:
        x: (B, 1, hidden). cos, sin: (B or 1, 1, head_dim). All of one float dtype.
        keys, values: buffers (B, kv_heads, positions, head_dim) that hold `length` past positions; those of the token are
            written to position `length`, which must exist.

    Returns:
        (B, 1, hidden).
    """
    batch, dtype = x.shape[0], x.dtype

    def linear(value: Tensor, weight: PackedWeight) -> Tensor:
        return packed_linear(value.reshape(batch, -1), *weight, layer.layout, layer.rows, dtype).view(batch, 1, -1)

    normed = rms_norm(x, layer.input_norm, layer.input_eps).view(batch, -1)
    heads = (
        y.view(batch, 1, -1, layer.head_dim).transpose(1, 2)
        for y in packed_linears(normed, layer.qkv, layer.layout, layer.rows, dtype)
    )
    q, k, v = heads
    q, k = rotate(q, k, cos, sin)
    keys[:, :, length : length + 1], values[:, :, length : length + 1] = k, v
    present = slice(0, length + 1)
    q = q.reshape(batch, layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim)
    attended = scaled_dot_product_attention(
        q.float(), keys[:, :, present].float(), values[:, :, present].float(), scale=layer.scaling
    )
    x = x + linear(attended.to(dtype), layer.attention_out)
    normed = rms_norm(x, layer.post_norm, layer.post_eps)
    gate, up = (linear(normed, weight) for weight in layer.gate_up)
    return x + linear(silu(gate) * up, layer.down)


def fits(layer: DecoderLayer, dtype: torch.dtype) -> bool:
    """Whether sizes and dtypes of the parts belong together, so that addresses may be handed on."""
    hidden, wide, narrow = layer.input_norm.shape[0], layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    ffn = layer.gate_up[0][0].shape[0]
    shapes = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide), (ffn, hidden), (ffn, hidden), (hidden, ffn)]
    weights = [*layer.qkv, layer.attention_out, *layer.gate_up, layer.down]
    norms = (layer.input_norm, layer.post_norm)
    return (
        all(norm.shape == (hidden,) and norm.dtype == dtype and norm.is_contiguous() for norm in norms)
        and layer.heads % layer.kv_heads == 0
        and layer.head_dim % 2 == 0
        and layer.head_dim <= hidden
        and all(_is_shaped(weight, *shape, layer.layout.bits) for weight, shape in zip(weights, shapes, strict=True))
    )


def _is_shaped(weight: PackedWeight, outputs: int, inputs: int, bits: int) -> bool:
    packed, scale, bias = weight
    return (
        packed.shape == (outputs, -(-inputs * bits // 8))
        and packed.dtype == torch.uint8
        and packed.is_contiguous()
        and scale.dim() == 2
        and scale.shape[0] in (1, outputs)
        and inputs % scale.shape[1] == 0
        and scale.dtype == torch.float32
        and scale.is_contiguous()
        and (bias is None or (bias.shape == (outputs,) and bias.is_floating_point() and bias.is_contiguous()))
    )
