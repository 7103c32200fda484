"""Quantization, scaling and packing through the C++ library, with the signatures of `reference.py`; eager CPU tensors. Own.

Each function brings its tensors into a form that the library reads (one of its dtypes, rows without gaps), checks the sizes
that the library cannot see, hands over addresses, and lets torch allocate the result. The arguments live as long as the call,
and nothing is kept. What the library has no form for (float64 results that are not integers, thresholds of any shape, rows of
nothing) is left to the definitions.

Leaves out: `products.py` has the products, `operators.py` tracing by torch.compile and torch.export; gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..fits import check_gain, check_scale
from ..reference import Layout
from .common import DTYPES, FLOATS, as_float, as_float32, as_rows, check, require_cpu
from .library import functions


def quantize_rows(x: Tensor, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`."""
    if not x.numel():
        return reference.quantize_rows(x, qmin, qmax, eps)
    rows = as_rows(as_float(x))
    m, k = rows.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device="cpu")
    given = rows.data_ptr(), FLOATS[rows.dtype], m, k, rows.stride(0)
    check(functions().hb_quantize_rows(*given, qmin, qmax, eps, codes.data_ptr(), scale.data_ptr()))
    return codes, scale


def norm_quantize_rows(
    x: Tensor, norm_weight: Tensor, norm_eps: float, qmin: int, qmax: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.norm_quantize_rows`, but that the mean of squares is summed in float64: a code at a tie may differ by 1."""
    if not x.numel() or x.dtype not in FLOATS or norm_weight.dtype not in FLOATS:
        return reference.norm_quantize_rows(x, norm_weight, norm_eps, qmin, qmax, eps)
    require_cpu(norm_weight)
    rows, gain = as_rows(x), norm_weight.contiguous()
    m, k = rows.shape
    check_gain(gain, k)
    codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device="cpu")
    given = rows.data_ptr(), FLOATS[rows.dtype], m, k, rows.stride(0), gain.data_ptr(), FLOATS[gain.dtype], norm_eps
    check(functions().hb_norm_quantize_rows(*given, qmin, qmax, eps, codes.data_ptr(), scale.data_ptr()))
    return codes, scale


def scale_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.scale_rows`."""
    if x.dtype not in DTYPES or dtype not in FLOATS or x.dim() != 2 or scale.shape != (x.shape[0], 1) or not x.numel():
        return reference.scale_rows(x, scale, dtype)
    require_cpu(scale)
    rows, factors = as_rows(x), as_float32(scale)
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    given = rows.data_ptr(), DTYPES[rows.dtype], *rows.shape, rows.stride(0), factors.data_ptr()
    check(functions().hb_scale_rows(*given, out.data_ptr(), FLOATS[dtype]))
    return out


# ---- weights ----


def mean_magnitudes(rows: Tensor) -> Tensor:
    """`reference.mean_magnitudes`."""
    if rows.dim() != 2 or not rows.numel():
        return reference.mean_magnitudes(rows)
    flat = as_float(rows).contiguous()
    sums = torch.empty(rows.shape[0], 1, dtype=torch.float64, device="cpu")
    check(functions().hb_abs_sums(flat.data_ptr(), FLOATS[flat.dtype], *flat.shape, sums.data_ptr()))
    return sums.div_(rows.shape[1]).float()


def quantize_columns(x: Tensor, factor: Tensor | None, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.quantize_columns`."""
    return quantize_rows((x if factor is None else x.float() * factor).t(), qmin, qmax, eps)


def quantize_weight(
    rows: Tensor, scale: Tensor, zero_point: float, qmin: int, qmax: int, dtype: torch.dtype = torch.int8
) -> Tensor:
    """`reference.quantize_weight`."""
    if rows.dim() != 2 or scale.shape != (rows.shape[0], 1) or not rows.numel():
        return reference.quantize_weight(rows, scale, zero_point, qmin, qmax, dtype)
    require_cpu(scale)
    flat, scales = as_float(rows).contiguous(), as_float32(scale)
    out = torch.empty(rows.shape, dtype=dtype if dtype in DTYPES else torch.float32, device="cpu")
    given = flat.data_ptr(), FLOATS[flat.dtype], *rows.shape, scales.data_ptr(), zero_point, qmin, qmax
    check(functions().hb_quantize_weight(*given, out.data_ptr(), DTYPES[out.dtype]))
    return out.to(dtype)


def quantize_sign(rows: Tensor, threshold: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """`reference.quantize_sign`."""
    single = threshold.numel() == 1 and threshold.dim() <= rows.dim()
    if not rows.numel() or not (single or (rows.dim() == 2 and threshold.shape == (rows.shape[0], 1))):
        return reference.quantize_sign(rows, threshold, dtype)
    require_cpu(threshold)
    flat, limits = as_float(rows).contiguous(), as_float32(threshold)
    out = torch.empty(rows.shape, dtype=dtype if dtype in DTYPES else torch.float32, device="cpu")
    shape = (1, flat.numel()) if single else rows.shape
    given = flat.data_ptr(), FLOATS[flat.dtype], *shape, limits.data_ptr()
    check(functions().hb_quantize_sign(*given, out.data_ptr(), DTYPES[out.dtype]))
    return out.to(dtype)


def _grouped(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) and the scales of its groups as the library reads them. Raises ValueError when they do not fit."""
    require_cpu(scale)
    check_scale(scale, *weight.shape)
    return as_float(weight).contiguous(), as_float32(scale)


def quantize_pack(weight: Tensor, scale: Tensor, qmin: int, qmax: int, layout: Layout) -> Tensor:
    """`reference.quantize_pack`."""
    if not weight.numel():
        return reference.quantize_pack(weight, scale, qmin, qmax, layout)
    rows, scales = _grouped(weight, scale)
    n, k = rows.shape
    packed = torch.empty(n, -(-k * layout.bits // 8), dtype=torch.uint8, device="cpu")
    given = rows.data_ptr(), FLOATS[rows.dtype], n, k, scales.data_ptr(), *scales.shape, layout.zero_point, qmin, qmax
    check(functions().hb_quantize_pack(*given, layout.bits, layout.lowest, layout.step, packed.data_ptr()))
    return packed


def sign_pack(weight: Tensor, threshold: Tensor) -> Tensor:
    """`reference.sign_pack`."""
    if not weight.numel():
        return reference.sign_pack(weight, threshold)
    rows, limits = _grouped(weight, threshold)
    n, k = rows.shape
    packed = torch.empty(n, -(-k // 8), dtype=torch.uint8, device="cpu")
    given = rows.data_ptr(), FLOATS[rows.dtype], n, k, limits.data_ptr(), *limits.shape
    check(functions().hb_sign_pack(*given, packed.data_ptr()))
    return packed


# ---- codes in bytes ----


def pack(codes: Tensor, bits: int, lowest: int, step: int) -> Tensor:
    """`reference.pack`."""
    if codes.dtype != torch.int8 or not codes.numel():
        return reference.pack(codes, bits, lowest, step)
    k = codes.shape[-1]
    packed = torch.empty(*codes.shape[:-1], -(-k * bits // 8), dtype=torch.uint8, device="cpu")
    rows = codes.contiguous()
    check(functions().hb_pack(rows.data_ptr(), rows.numel() // k, k, bits, lowest, step, packed.data_ptr()))
    return packed


def unpack(packed: Tensor, bits: int, lowest: int, step: int, in_features: int) -> Tensor:
    """`reference.unpack`."""
    if packed.shape[-1] != -(-in_features * bits // 8) or not packed.numel():
        return reference.unpack(packed, bits, lowest, step, in_features)
    codes = torch.empty(*packed.shape[:-1], in_features, dtype=torch.int8, device="cpu")
    rows = packed.contiguous()
    n = rows.numel() // rows.shape[-1]
    check(functions().hb_unpack(rows.data_ptr(), n, in_features, bits, lowest, step, codes.data_ptr()))
    return codes


def pack_trits(codes: Tensor) -> Tensor:
    """`reference.pack_trits`."""
    if codes.dtype != torch.int8 or not codes.numel():
        return reference.pack_trits(codes)
    k = codes.shape[-1]
    packed = torch.empty(*codes.shape[:-1], -(-k // reference.TRITS_PER_BYTE), dtype=torch.uint8, device="cpu")
    rows = codes.contiguous()
    check(functions().hb_pack_trits(rows.data_ptr(), rows.numel() // k, k, packed.data_ptr()))
    return packed


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """`reference.unpack_trits`."""
    if packed.shape[-1] != -(-in_features // reference.TRITS_PER_BYTE) or not packed.numel():
        return reference.unpack_trits(packed, in_features)
    codes = torch.empty(*packed.shape[:-1], in_features, dtype=torch.int8, device="cpu")
    rows = packed.contiguous()
    n = rows.numel() // rows.shape[-1]
    check(functions().hb_unpack_trits(rows.data_ptr(), n, in_features, codes.data_ptr()))
    return codes
