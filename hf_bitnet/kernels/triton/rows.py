"""Kernels that go over the rows of activations: quantization, with or without a norm in front, and scaling. Own.

A row that fits into the registers of a program is read once; longer ones, and rows that lie across memory, are read again
from the cache for each pass.
"""

# kernels are another language in Python's clothes: launches take options, and constants are of a type of their own
# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fits import check_gain
from .columns import quantize_columns
from .language import EXACT, coded, inverse_of, largest, narrowed, tile
from .support import as_matrix, on_device_of, power_of_two

# elements of a row that one program keeps
_MOST_KEPT = 1 << 14
_TILE = 1 << 11
LANGUAGE_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float64: tl.float64,
}


class Planes(NamedTuple):
    """Codes of rows in the order in which packed weights are multiplied with them.

    Attributes:
        codes: int8 (M, per, B): element (m, i, b) is the code of input `b * per + i`, 0 beyond the last input. So the inputs
            whose weights lie at one place of the bytes lie side by side.
        scale: float32 (M, 1). sums: int32 (M, 1), of the codes of each row.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    sums_ptr,
    rows,
    columns,
    x_row,
    x_column,
    plane,
    low,
    high,
    eps,
    PER: tl.constexpr,
    SUMS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    exists, padded = (row < rows)[:, None], plane * PER
    x_ptr += row[:, None] * x_row
    codes_ptr += row[:, None] * padded
    sums = tl.zeros((ROWS,), dtype=tl.int32)
    if WHOLE:
        at = column.to(tl.int64)
        values = tl.load(x_ptr + at * x_column, mask=exists & (at < columns), other=0.0).to(tl.float32)
        top, nans = largest(values)
        inverse = inverse_of(top, nans, high, eps)
        codes = coded(values * inverse[:, None], low, high)
        if SUMS:
            sums = tl.sum(codes.to(tl.int32), axis=1)
        tl.store(codes_ptr + (column % PER) * plane + column // PER, codes, mask=exists & (column < padded))
    else:
        top, nans = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.int32)
        for start in range(0, columns, BLOCK):
            at = start + column
            values = tl.load(x_ptr + at.to(tl.int64) * x_column, mask=exists & (at < columns), other=0.0).to(tl.float32)
            part, missing = largest(values)
            top, nans = tl.maximum(top, part), nans + missing
        inverse = inverse_of(top, nans, high, eps)
        for start in range(0, padded, BLOCK):
            at = start + column
            values = tl.load(x_ptr + at.to(tl.int64) * x_column, mask=exists & (at < columns), other=0.0).to(tl.float32)
            codes = coded(values * inverse[:, None], low, high)
            if SUMS:
                sums += tl.sum(codes.to(tl.int32), axis=1)
            tl.store(codes_ptr + (at % PER) * plane + at // PER, codes, mask=exists & (at < padded))
    tl.store(scale_ptr + row, tl.div_rn(tl.zeros_like(inverse) + 1.0, inverse), mask=row < rows)
    if SUMS:
        tl.store(sums_ptr + row, sums, mask=row < rows)


def _quantized(x: Tensor, plane: int, per: int, sums: Tensor | None, low: int, high: int, eps: float) -> tuple[Tensor, Tensor]:
    """x (M, K) -> codes int8 (M, per, plane), scale (M, 1)."""
    (m, k), padded = x.shape, plane * per
    codes = torch.empty(m, per, plane, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    whole = power_of_two(padded) <= _MOST_KEPT
    block = power_of_two(padded) if whole else 4096
    rows = max(1, _TILE // block)
    if m:
        with on_device_of(x):
            _quantize_rows_kernel[(triton.cdiv(m, rows),)](
                *(x, codes, scale, codes if sums is None else sums, m, k, x.stride(0), x.stride(1), plane),
                *(float(low), float(high), eps),
                **{"PER": per, "SUMS": sums is not None, "WHOLE": whole, "ROWS": rows, "BLOCK": block},
                num_warps=8 if rows * block > _TILE else 4,
                **EXACT,
            )
    return codes, scale


def quantize_rows(x: Tensor, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`: x is read once, or, where its rows lie across memory, as often as its columns are."""
    matrix = as_matrix(x)
    if matrix.stride(0) == 1 and matrix.stride(1) > 1 and matrix.shape[1]:
        codes, scale = quantize_columns(matrix.t(), None, qmin, qmax, eps)
    else:
        codes, scale = _quantized(matrix, matrix.shape[1], 1, None, qmin, qmax, eps)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def quantize_planes(x: Tensor, plane: int, per: int, qmin: int, qmax: int, eps: float) -> Planes:
    """`quantize_rows` of x (M, K) in the order of packed weights with `per` codes a byte; plane * per >= K."""
    sums = torch.empty(x.shape[0], 1, dtype=torch.int32, device=x.device)
    return Planes(*_quantized(x, plane, per, sums, qmin, qmax, eps), sums)


@triton.jit
def _norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    codes_ptr,
    scale_ptr,
    columns,
    x_row,
    x_column,
    weight_stride,
    norm_eps,
    low,
    high,
    eps,
    GAINED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    x_ptr += row * x_row
    codes_ptr += row * columns
    squares = tl.zeros((1,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + column
        values = tl.load(x_ptr + at.to(tl.int64) * x_column, mask=at < columns, other=0.0).to(tl.float32)
        squares += tl.sum(values * values, axis=1)
    factor = tl.rsqrt(tl.div_rn(squares, tl.zeros_like(squares) + columns) + norm_eps)[:, None]
    if WHOLE:
        values = _gained(x_ptr, weight_ptr, column, columns, x_column, weight_stride, factor, GAINED)
        top, nans = largest(values)
        inverse = inverse_of(top, nans, high, eps)
        tl.store(codes_ptr + column, coded(values * inverse[:, None], low, high), mask=column < columns)
    else:
        top, nans = tl.zeros((1,), dtype=tl.float32), tl.zeros((1,), dtype=tl.int32)
        for start in range(0, columns, BLOCK):
            values = _gained(x_ptr, weight_ptr, start + column, columns, x_column, weight_stride, factor, GAINED)
            part, missing = largest(values)
            top, nans = tl.maximum(top, part), nans + missing
        inverse = inverse_of(top, nans, high, eps)
        for start in range(0, columns, BLOCK):
            at = start + column
            values = _gained(x_ptr, weight_ptr, at, columns, x_column, weight_stride, factor, GAINED)
            tl.store(codes_ptr + at, coded(values * inverse[:, None], low, high), mask=at < columns)
    tl.store(scale_ptr + row + tl.arange(0, 1), tl.div_rn(tl.zeros_like(inverse) + 1.0, inverse))


@triton.jit
def _gained(x_ptr, weight_ptr, at, columns, x_column, weight_stride, factor, GAINED: tl.constexpr):
    """The normed row, rounded to its own dtype, times the gain, rounded to that of both: float32 (1, BLOCK)."""
    values = tl.load(x_ptr + at.to(tl.int64) * x_column, mask=at < columns, other=0.0)
    normed = narrowed(values.to(tl.float32) * factor, x_ptr.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight_ptr + at * weight_stride, mask=at < columns, other=0.0).to(tl.float32)
    return narrowed(normed * gain, GAINED).to(tl.float32)


def norm_quantize_rows(
    x: Tensor, norm_weight: Tensor, norm_eps: float, qmin: int, qmax: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.norm_quantize_rows`; the sum of squares is added in another order."""
    matrix = as_matrix(x)
    check_gain(norm_weight, matrix.shape[1])
    if matrix.dtype == torch.float64:  # no kernel computes in it
        matrix, norm_weight = matrix.float(), norm_weight.float()
    m, k = matrix.shape
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    block = min(power_of_two(k), _MOST_KEPT)
    if m:
        with on_device_of(x):
            _norm_quantize_kernel[(m,)](
                *(matrix, norm_weight, codes, scale, k, matrix.stride(0), matrix.stride(1), norm_weight.stride(0)),
                *(norm_eps, float(qmin), float(qmax), eps),
                GAINED=LANGUAGE_TYPES[torch.promote_types(matrix.dtype, norm_weight.dtype)],
                WHOLE=block >= k,
                BLOCK=block,
                num_warps=4 if block <= 4096 else 8,
                **EXACT,
            )
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


@triton.jit
def _scale_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    rows,
    columns,
    x_row,
    x_column,
    factor_row,
    factor_column,
    out_row,
    out_column,
    zero,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, exists = tile(rows, columns, ROWS, BLOCK)
    values = tl.load(x_ptr + row * x_row + column.to(tl.int64) * x_column, mask=exists, other=0).to(tl.float32) - zero
    if FACTOR:
        values = values * tl.load(factor_ptr + row * factor_row + column * factor_column, mask=exists, other=0.0)
    out = narrowed(values, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row + column.to(tl.int64) * out_column, out, mask=exists)


def scaled(
    x: Tensor,
    factor: Tensor | None,
    dtype: torch.dtype,
    *,
    by_column: bool = False,
    zero_point: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """`(x - zero_point) * factor`, computed in float32 and rounded once.

    Args:
        x: int8 or float (M, K), any strides. factor: float32 of 1 element, of M, or, `by_column`, of K; None multiplies
            nothing. out: of the shape of x, may be x itself; None makes one that lies in memory as x does.

    Returns:
        (M, K) in `dtype`.
    """
    turned = out is None and x.stride(0) < x.stride(1)
    if turned:  # the same over the transpose, which has no gaps where x has none
        return scaled(x.t(), factor, dtype, by_column=not by_column, zero_point=zero_point).t()
    m, k = x.shape
    result = torch.empty(m, k, dtype=dtype, device=x.device) if out is None else out
    block = min(power_of_two(k), _TILE)
    rows = _TILE // block
    if x.numel():
        flat = None if factor is None else factor.reshape(-1)
        steps = (0, 0) if flat is None or flat.numel() == 1 else (0, flat.stride(0)) if by_column else (flat.stride(0), 0)
        with on_device_of(x):
            _scale_kernel[(triton.cdiv(m, rows) * triton.cdiv(k, block),)](
                *(x, x if flat is None else flat, result, m, k, *x.stride(), *steps, *result.stride(), zero_point),
                **{"FACTOR": flat is not None, "ROWS": rows, "BLOCK": block},
                **EXACT,
            )
    return result


def scale_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.scale_rows` in one pass."""
    if torch.float64 in (x.dtype, dtype):
        return (x * scale).to(dtype)
    return scaled(x, scale, dtype).contiguous()
