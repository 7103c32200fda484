"""Quantization of the columns of a matrix: gradients by output, over all tokens, turned as they are rounded. Own."""

# kernels are another language in Python's clothes: launches take options, and constants are of a type of their own
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import EXACT, coded, inverse_of, largest
from .support import on_device_of, power_of_two

# rows of which one program finds the largest magnitudes of columns; and the most programs for one column
_PART, _MOST_PARTS = 256, 64


@triton.jit
def _peaks_kernel(
    x_ptr,
    factor_ptr,
    peaks_ptr,
    rows,
    columns,
    x_row,
    x_column,
    factor_row,
    length,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)
    part = tl.program_id(0) // across
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tops = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    nans = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
    for start in range(0, length, ROWS):
        row = part.to(tl.int64) * length + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (start + tl.arange(0, ROWS)[:, None] < length)
        values = _factored(x_ptr, factor_ptr, row, column, inside & (column < columns), x_row, x_column, factor_row, FACTOR)
        tops, nans = tl.maximum(tops, tl.abs(values)), nans + (values != values).to(tl.int32)
    top = tl.where(tl.sum(nans, axis=0) > 0, float("nan"), tl.max(tops, axis=0))[None, :]
    tl.store(peaks_ptr + column * (tl.num_programs(0) // across) + part, top, mask=column < columns)


@triton.jit
def _factored(x_ptr, factor_ptr, row, column, inside, x_row, x_column, factor_row, FACTOR: tl.constexpr):
    """float32 (ROWS, BLOCK) of x, times the factors of its rows."""
    values = tl.load(x_ptr + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    if FACTOR:
        values = values * tl.load(factor_ptr + row * factor_row, mask=inside, other=0.0)
    return values


@triton.jit
def _columns_kernel(
    x_ptr,
    factor_ptr,
    peaks_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    columns,
    parts,
    x_row,
    x_column,
    factor_row,
    low,
    high,
    eps,
    FACTOR: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK)
    down = tl.program_id(0) // across
    row = down.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)[None, :]
    inside = (column < columns)[:, None] & (part < parts)
    top, nans = largest(tl.load(peaks_ptr + column[:, None] * parts + part, mask=inside, other=0.0))
    inverse = inverse_of(top, nans, high, eps)
    if down == 0:
        tl.store(scale_ptr + column, tl.div_rn(tl.zeros_like(inverse) + 1.0, inverse), mask=column < columns)
    exists = (row < rows) & (column < columns)[None, :]
    values = _factored(x_ptr, factor_ptr, row, column[None, :], exists, x_row, x_column, factor_row, FACTOR)
    tl.store(codes_ptr + column[None, :] * rows + row, coded(values * inverse[None, :], low, high), mask=exists)


def quantize_columns(x: Tensor, factor: Tensor | None, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.quantize_columns`: x is read twice, once for the largest magnitudes, once to be turned as it is rounded."""
    m, n = x.shape
    codes = torch.empty(n, m, dtype=torch.int8, device=x.device)
    scale = torch.empty(n, 1, dtype=torch.float32, device=x.device)
    if not n:
        return codes, scale
    parts = min(-(-m // _PART), _MOST_PARTS)
    peaks = torch.empty(n, parts, dtype=torch.float32, device=x.device)
    by_row = x if factor is None else factor.reshape(-1)
    strides = (*x.stride(), 0 if factor is None else by_row.stride(0))
    with on_device_of(x):
        _peaks_kernel[(parts * triton.cdiv(n, 64),)](
            *(x, by_row, peaks, m, n, *strides, -(-m // parts)),
            **{"FACTOR": factor is not None, "ROWS": 32, "BLOCK": 64},
            **EXACT,
        )
        _columns_kernel[(triton.cdiv(m, 64) * triton.cdiv(n, 64),)](
            *(x, by_row, peaks, codes, scale, m, n, parts, *strides, float(qmin), float(qmax), eps),
            **{"FACTOR": factor is not None, "PARTS": power_of_two(parts), "ROWS": 64, "BLOCK": 64},
            **EXACT,
        )
    return codes, scale
