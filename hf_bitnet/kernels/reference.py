"""The definition of every kernel, in plain torch, slow and exact. Own.

A faster body is right when it returns what these functions return: integers equal, floats by RMS ratio.
They know tensors only. All weights are (out_features, in_features), "row" means one output feature.

Leaves out: gradients (the straight-through estimators live above), threads, devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CODES_PER_BYTE = {1: 8, 2: 4, 4: 2, 8: 1}
TRITS_PER_BYTE = 5  # 3**5 = 243 of 256


class Layout(NamedTuple):
    """How a packed weight is stored: the level u stands for `(u * step + lowest - zero_point) * scale`.

    Attributes:
        bits: of a level: 1, 2, 4 or 8. lowest: the code of level 0. step: between codes, 2 for binary weights.
    """

    bits: int
    lowest: int
    step: int = 1
    zero_point: float = 0.0


class RowQuantization(NamedTuple):
    """How the rows of an input become int8 codes; see `quantize_rows`."""

    qmin: int
    qmax: int
    eps: float


# packed uint8 (N, B), scale float32 (1, 1), (N, 1) or (N, G), bias float (N,) or None
PackedWeight = tuple[Tensor, Tensor, Tensor | None]


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product `a @ b.T`.

    Args:
        a: int8 (M, K). b: int8 (N, K).

    Returns:
        int32 (M, N). float64 holds every partial sum exactly (|sum| <= K * 2**14 < 2**53).
    """
    return (a.double() @ b.double().t()).to(torch.int32)


def quantize_rows(x: Tensor, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """Symmetric quantization of each row by its largest magnitude.

    `inverse = qmax / max(|x|, eps)`, `codes = clamp(round_half_even(x * inverse))`, `scale = 1 / inverse`. The product
    with the inverse (not a division by the scale) is the order transformers' bitnet layers use, so codes agree bit for
    bit with theirs.

    Args:
        x: float (..., K).

    Returns:
        codes int8 (..., K), scale float32 (..., 1).
    """
    x = x.float()
    inverse = qmax / x.abs().amax(dim=-1, keepdim=True).clamp(min=eps)
    codes = (x * inverse).round_().clamp_(qmin, qmax).to(torch.int8)
    return codes, inverse.reciprocal()


def quantize_columns(x: Tensor, factor: Tensor | None, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the transpose of `x * factor`, multiplied in float32: gradients, for a sum over tokens.

    Args:
        x: float (M, N), M > 0. factor: float32 (M, 1) or None.

    Returns:
        codes int8 (N, M), scale float32 (N, 1).
    """
    x = x.float()
    return quantize_rows((x if factor is None else x * factor).t(), qmin, qmax, eps)


def quantize_weight(
    rows: Tensor, scale: Tensor, zero_point: float, qmin: int, qmax: int, dtype: torch.dtype = torch.int8
) -> Tensor:
    """`clamp(round_half_even(rows / scale + zero_point))`.

    Args:
        rows: float (R, n), each row with its own scale. scale: float32 (R, 1). dtype: of the result.

    Returns:
        Codes (R, n) in `dtype`; integers, whatever the dtype.
    """
    u = rows.float() * scale.reciprocal()
    if zero_point:
        u = u + zero_point
    return u.round_().clamp_(qmin, qmax).to(dtype)


def quantize_sign(rows: Tensor, threshold: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """+1 where `rows >= threshold`, else -1.

    Args:
        rows: float (R, n). threshold: float32 that broadcasts to it. dtype: of the result.

    Returns:
        (R, n) in `dtype`.
    """
    return (rows.float() >= threshold).to(dtype).mul_(2).sub_(1)


def pack(codes: Tensor, bits: int, lowest: int, step: int) -> Tensor:
    """Pack integer codes along the input dimension, `8 / bits` neighbours a byte, the first in the lowest bits.

    A code is stored as the unsigned level `(code - lowest) / step`. Rows are padded with level 0 to whole bytes.

    Args:
        codes: int8 (N, K).

    Returns:
        uint8 (N, ceil(K * bits / 8)).
    """
    per_byte = CODES_PER_BYTE[bits]
    levels = torch.div(codes.to(torch.int16) - lowest, step, rounding_mode="floor").to(torch.uint8)
    levels = torch.nn.functional.pad(levels, (0, -levels.shape[-1] % per_byte))
    levels = levels.unflatten(-1, (-1, per_byte))
    packed = torch.zeros(levels.shape[:-1], dtype=torch.uint8, device=codes.device)
    for i in range(per_byte):
        packed |= levels[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, lowest: int, step: int, in_features: int) -> Tensor:
    """The inverse of `pack`: uint8 (N, ceil(K * bits / 8)) -> int8 codes (N, K)."""
    per_byte = CODES_PER_BYTE[bits]
    levels = torch.stack([(packed >> (bits * i)) & (2**bits - 1) for i in range(per_byte)], dim=-1)
    levels = levels.flatten(-2)[..., :in_features].to(torch.int16)
    return (levels * step + lowest).to(torch.int8)


def int_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`y[m, n] = sum_k (x_codes - x_zero)[m, k] * x_scale[m] * (w_codes - w_zero)[n, k] * w_scale[n, group(k)] + bias[n]`.

    Args:
        x_codes: int8 (M, K). x_scale, x_zero: float32 (M, 1).
        w_codes: int8 (N, K). w_scale: float32 (1, 1), (N, 1) or (N, G), each of G equal runs of K having its own.
        bias: float (N,) or None.

    Returns:
        (M, N) in `dtype`, computed in float64.
    """
    x = x_codes.double() - (0.0 if x_zero is None else x_zero.double())
    w = (w_codes.double() - w_zero) * w_scale.double().repeat_interleave(w_codes.shape[-1] // w_scale.shape[-1], dim=-1)
    y = (x @ w.t()) * x_scale.double()
    return (y if bias is None else y + bias.double()).to(dtype)


def fixed_matmul(
    a: Tensor, a_scale: Tensor | None, codes: Tensor, zero_point: float, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(a * a_scale) (codes - zero_point) * scale`, for gradients. Bodies may round: at most as bfloat16 operands would be.

    Args:
        a: float (M, K), any strides. a_scale: float32, K elements, or None. codes: int8 (K, N).
        scale: float32, one element, or None.

    Returns:
        (M, N) in `dtype`, computed in float64.
    """
    left = a.double() if a_scale is None else a.double() * a_scale.double().reshape(1, -1)
    y = left @ (codes.double() - zero_point)
    return (y if scale is None else y * scale.double().reshape(())).to(dtype)


def mean_magnitudes(rows: Tensor) -> Tensor:
    """mean|row|, summed in float64 and rounded once, so that it does not depend on the order of the sum.

    Args:
        rows: float (R, n).

    Returns:
        float32 (R, 1).
    """
    return (rows.abs().sum(dim=-1, keepdim=True, dtype=torch.float64) / rows.shape[-1]).float()


def scale_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * scale`, multiplied in float32 and rounded once.

    Args:
        x: int8 or float (M, K). scale: float32 (M, 1).

    Returns:
        (M, K) in `dtype`.
    """
    return (x * scale).to(dtype)


def packed_int_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: Layout,
    dtype: torch.dtype,
) -> Tensor:
    """`int_linear` of a packed weight.

    Args:
        x_codes: int8 (M, K). x_scale, x_zero: float32 (M, 1).
        packed: uint8 (N, ceil(K * bits / 8)). scale: float32 (1, 1), (N, 1) or (N, G). bias: float (N,) or None.

    Returns:
        (M, N) in `dtype`.
    """
    codes = unpack(packed, layout.bits, layout.lowest, layout.step, x_codes.shape[-1])
    return int_linear(x_codes, x_scale, x_zero, codes, scale, layout.zero_point, bias, dtype)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> Tensor:
    """`packed_int_linear` of `quantize_rows(x)`: float (M, K) -> (M, N) in `dtype`."""
    codes, x_scale = quantize_rows(x, *rows)
    return packed_int_linear(codes, x_scale, None, packed, scale, bias, layout, dtype)


def packed_linears(
    x: Tensor, weights: Sequence[PackedWeight], layout: Layout, rows: RowQuantization, dtype: torch.dtype
) -> list[Tensor]:
    """`packed_linear` of several weights that read the same x (query, key and value): list of (M, N_i) in `dtype`."""
    return [packed_linear(x, packed, scale, bias, layout, rows, dtype) for packed, scale, bias in weights]


def packed_experts(
    x: Tensor,
    index: Tensor,
    maps: Sequence[Sequence[PackedWeight]],
    layout: Layout,
    rows: RowQuantization,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`packed_linear` of every row with the weights of the experts that it chose.

    Args:
        x: float (T, K).
        index: int64 (T, k), the experts of each row; numbers below 0 and from E on for none.
        maps: for each of several linear maps (gate and up) one weight for each of E experts, all of equal shapes.

    Returns:
        For each map (T * k, N_i) in `dtype`; row t * k + j is of expert index[t, j], or zeros.
    """
    chosen, places = index.shape[1], index.reshape(-1)
    results = []
    for experts in maps:
        y = x.new_zeros(places.shape[0], experts[0][0].shape[0], dtype=dtype)
        for number, weight in enumerate(experts):
            at = (places == number).nonzero().squeeze(1)
            y[at] = packed_linear(x[at // max(chosen, 1)], *weight, layout, rows, dtype)
        results.append(y)
    return results


def quantize_pack(weight: Tensor, scale: Tensor, qmin: int, qmax: int, layout: Layout) -> Tensor:
    """`quantize_weight` and `pack`.

    Args:
        weight: float (N, K). scale: float32 (1, 1), (N, 1) or (N, G), each of G equal runs of K having its own.

    Returns:
        uint8 (N, ceil(K * bits / 8)).
    """
    rows = weight.unflatten(-1, (scale.shape[-1], -1))
    codes = quantize_weight(rows, scale.unsqueeze(-1), layout.zero_point, qmin, qmax).flatten(-2)
    return pack(codes, layout.bits, layout.lowest, layout.step)


def sign_pack(weight: Tensor, threshold: Tensor) -> Tensor:
    """`quantize_sign` and `pack` to 1 bit: bit 1 where `weight >= threshold`.

    Args:
        weight: float (N, K). threshold: float32 (1, 1), (N, 1) or (N, G), each of G equal runs of K having its own.

    Returns:
        uint8 (N, ceil(K / 8)).
    """
    rows = weight.unflatten(-1, (threshold.shape[-1], -1))
    return pack(quantize_sign(rows, threshold.unsqueeze(-1)).flatten(-2), 1, -1, 2)


def norm_quantize_rows(
    x: Tensor, norm_weight: Tensor, norm_eps: float, qmin: int, qmax: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of an RMS norm as Llama's: normalized in float32, rounded to x's dtype, then times the gain.

    Args:
        x: float (..., K). norm_weight: float (K,).

    Returns:
        codes int8 (..., K), scale float32 (..., 1).
    """
    normalized = x.float()
    normalized = normalized * torch.rsqrt(normalized.pow(2).mean(-1, keepdim=True) + norm_eps)
    return quantize_rows(norm_weight * normalized.to(x.dtype), qmin, qmax, eps)


def pack_trits(codes: Tensor) -> Tensor:
    """Five ternary codes a byte (1.6 bits each): `sum of (code_i + 1) * 3**i`, rows padded with level 0.

    Args:
        codes: int8 (N, K) of -1, 0, 1.

    Returns:
        uint8 (N, ceil(K / 5)).
    """
    levels = torch.nn.functional.pad(codes.to(torch.int16) + 1, (0, -codes.shape[-1] % TRITS_PER_BYTE))
    powers = torch.tensor([3**i for i in range(TRITS_PER_BYTE)], dtype=torch.int16, device=codes.device)
    return (levels.unflatten(-1, (-1, TRITS_PER_BYTE)) * powers).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of `pack_trits`: uint8 (N, ceil(K / 5)) -> int8 codes (N, K)."""
    levels = torch.stack([packed.to(torch.int16) // 3**i % 3 for i in range(TRITS_PER_BYTE)], dim=-1)
    return (levels.flatten(-2)[..., :in_features] - 1).to(torch.int8)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`round(x * rsqrt(mean(x^2) + eps)) * weight` over the last dimension: LlamaRMSNorm, roundings included.

    Args:
        x: float (..., K). weight: (K,) in the dtype of x.

    Returns:
        (..., K) in the dtype of x.
    """
    normed = x.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding (arXiv 2104.09864) in Llama's layout: `x * cos + (-upper half, lower half) * sin`.

    Args:
        q, k: float (B, H, T, D), (B, H', T, D). cos, sin: (B or 1, T, D) in the same dtype.

    Returns:
        Both rotated, every product and sum rounded to the dtype.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x: Tensor) -> Tensor:
        halves = torch.empty_like(x)  # not torch.cat, which autocast treats by rules of its own
        low, high = x.chunk(2, dim=-1)
        halves[..., : low.shape[-1]], halves[..., low.shape[-1] :] = -high, low
        return (x * cos) + (halves * sin)

    return rotated(q), rotated(k)
