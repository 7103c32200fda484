"""A whole decoder layer for new tokens: what it is, and its definition by the other operations. Own.

The body in C++ (`cpu/decoder.py`) makes one call of it. Between the products of a token, calling thirty operations and as many
modules costs more than computing them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu, scaled_dot_product_attention, silu

from .reference import Layout, PackedWeight, RowQuantization, packed_linear, packed_linears, rms_norm, rotate


class Norm(NamedTuple):
    """An RMS norm.

    Attributes:
        weight: (features,) in the dtype of the activations. eps: what it adds to the mean square.
        once: whether it rounds after the weight only, in place of before and after, as transformers' do.
    """

    weight: Tensor
    eps: float
    once: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """float (..., features) -> the same."""
        if not self.once:
            return rms_norm(x, self.weight, self.eps)
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "relu2": lambda x: relu(x).square()}


class DecoderLayer(NamedTuple):
    """A pre-norm layer with rotary embedding, grouped attention and a gated MLP (Llama, Qwen3, BitNet, ...), as packed weights.

    Attributes:
        input_norm, post_norm: in front of attention and MLP.
        qkv, attention_out, gate_up, down: packed weights; all share `layout`, and their inputs are quantized by `rows`.
        heads, kv_heads, head_dim: of the attention. scaling: factor of its scores.
        activation: of the gate, in `ACTIVATIONS`.
        q_norm, k_norm: of each head, before the rotary embedding; None for none.
        out_norm, down_norm: in front of the projections out of attention and MLP; None for none.
    """

    input_norm: Norm
    post_norm: Norm
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
    activation: str = "silu"
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    out_norm: Norm | None = None
    down_norm: Norm | None = None

    @property
    def norms(self) -> dict[str, Norm | None]:
        """All of them, in the order of the library."""
        return {name: getattr(self, name) for name in _NORM_NAMES}


_NORM_NAMES = ("input_norm", "post_norm", "q_norm", "k_norm", "out_norm", "down_norm")


def decode_layer(layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    """The layer for the next tokens of each sequence, each of which sees itself and what is before it.

    Args:
        x: (B, T, hidden). cos, sin: (B or 1, T, head_dim). All of one float dtype.
        keys, values: buffers (B, kv_heads, positions, head_dim) that hold `length` past positions; those of the tokens are
            written to positions `length` .. `length + T - 1`, which must exist.

    Returns:
        (B, T, hidden).
    """
    batch, tokens, hidden = x.shape
    dtype, end = x.dtype, length + tokens

    def linear(value: Tensor, weight: PackedWeight) -> Tensor:
        rows = value.reshape(batch * tokens, -1)
        return packed_linear(rows, *weight, layer.layout, layer.rows, dtype).view(batch, tokens, -1)

    normed = layer.input_norm(x).view(-1, hidden)
    heads = (
        y.view(batch, tokens, -1, layer.head_dim).transpose(1, 2)
        for y in packed_linears(normed, layer.qkv, layer.layout, layer.rows, dtype)
    )
    q, k, v = heads
    q, k = rotate(_normed(layer.q_norm, q), _normed(layer.k_norm, k), cos, sin)
    keys[:, :, length:end], values[:, :, length:end] = k, v
    visible = torch.ones(tokens, end, dtype=torch.bool, device=x.device).tril(length)
    attended = scaled_dot_product_attention(
        q.float(), keys[:, :, :end].float(), values[:, :, :end].float(), visible, scale=layer.scaling, enable_gqa=True
    )
    attended = attended.to(dtype).transpose(1, 2).reshape(batch, tokens, -1)
    x = x + linear(_normed(layer.out_norm, attended), layer.attention_out)
    normed = layer.post_norm(x)
    gate, up = (linear(normed, weight) for weight in layer.gate_up)
    return x + linear(_normed(layer.down_norm, ACTIVATIONS[layer.activation](gate) * up), layer.down)


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def fits(layer: DecoderLayer, dtype: torch.dtype) -> bool:
    """Whether sizes and dtypes of the parts belong together, so that addresses may be handed on."""
    hidden, wide, narrow = layer.input_norm.weight.shape[0], layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    ffn = layer.gate_up[0][0].shape[0]
    shapes = [(wide, hidden), (narrow, hidden), (narrow, hidden), (hidden, wide), (ffn, hidden), (ffn, hidden), (hidden, ffn)]
    weights = [*layer.qkv, layer.attention_out, *layer.gate_up, layer.down]
    features = (hidden, hidden, layer.head_dim, layer.head_dim, wide, ffn)
    norms = [(norm.weight, size) for norm, size in zip(layer.norms.values(), features, strict=True) if norm is not None]
    return (
        all(weight.shape == (size,) and weight.dtype == dtype and weight.is_contiguous() for weight, size in norms)
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
