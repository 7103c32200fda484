"""Kernels over weights: mean magnitudes, codes, and codes straight to packed bytes. Own.

The mean of a whole tensor is taken in two launches, partial sums and their sum, both in float64 and in an order that depends
on nothing but the shape. It stays on the device: nothing waits for it.
"""

# kernels are another language in Python's clothes: launches take options, and constants are of a type of their own
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fits import check_scale
from ..reference import CODES_PER_BYTE, Layout
from .language import EXACT, coded, narrowed, tile
from .support import as_matrix, on_device_of, power_of_two

_TILE = 1 << 11
# elements of one partial sum; and the most partial sums of a row, which one program adds
_PART, _MOST_PARTS = 1 << 13, 1 << 11


@triton.jit
def _partial_sums_kernel(
    x_ptr, out_ptr, rows, columns, x_row, x_column, parts, length, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    part = program % parts
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
    for start in range(0, length, BLOCK):
        at = part.to(tl.int64) * length + start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (at < columns) & (at < (part + 1).to(tl.int64) * length)
        sums += tl.abs(tl.load(x_ptr + row * x_row + at * x_column, mask=inside, other=0.0).to(tl.float64))
    out = out_ptr + row * parts + part
    tl.store(out, tl.sum(sums, axis=1)[:, None], mask=row < rows)


@triton.jit
def _mean_kernel(sums_ptr, out_ptr, rows, parts, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    part = tl.arange(0, BLOCK)[None, :]
    sums = tl.load(sums_ptr + row * parts + part, mask=(row < rows) & (part < parts), other=0.0)
    sums = tl.sum(sums, axis=1)[:, None]
    # not count.to(float64): a count of 1 is a constant to the compiler, and has no such method
    tl.store(out_ptr + row, (sums / (tl.zeros_like(sums) + count)).to(tl.float32), mask=row < rows)


def mean_magnitudes(rows: Tensor) -> Tensor:
    """`reference.mean_magnitudes`."""
    matrix = as_matrix(rows)
    r, n = matrix.shape
    out = torch.empty(*rows.shape[:-1], 1, dtype=torch.float32, device=rows.device)
    if not r or not n:
        return out.fill_(float("nan"))  # 0 / 0, as the definition
    parts = min(-(-n // _PART), _MOST_PARTS)
    length = -(-n // parts)
    sums = torch.empty(r, parts, dtype=torch.float64, device=rows.device)
    block = min(power_of_two(length), 1024)
    height = max(1, 1024 // block)
    with on_device_of(rows):
        _partial_sums_kernel[(triton.cdiv(r, height) * parts,)](
            matrix, sums, r, n, *matrix.stride(), parts, length, ROWS=height, BLOCK=block
        )
        width = power_of_two(parts)
        height = max(1, 1024 // width)
        _mean_kernel[(triton.cdiv(r, height),)](sums, out, r, parts, n, ROWS=height, BLOCK=width)
    return out


@triton.jit
def _codes_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    x_row,
    x_column,
    scale_row,
    scale_column,
    zero,
    low,
    high,
    SIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, exists = tile(rows, columns, ROWS, BLOCK)
    values = tl.load(x_ptr + row * x_row + column.to(tl.int64) * x_column, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row * scale_row + column * scale_column, mask=exists, other=1.0)
    codes = _codes(values, scale, zero, low, high, SIGN).to(tl.float32)
    if not SIGN and not out_ptr.dtype.element_ty.is_int():
        units = values * tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
        codes = tl.where(units == units, codes, units)  # NaN, which integers cannot say
    tl.store(out_ptr + row * columns + column, narrowed(codes, out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _codes(values, scale, zero, low, high, SIGN: tl.constexpr):
    """float32 values -> int8 codes: by their sign above the threshold `scale`, or rounded in units of it."""
    if SIGN:
        codes = tl.where(values >= scale, 1, -1).to(tl.int8)
    else:
        codes = coded(values * tl.div_rn(tl.zeros_like(scale) + 1.0, scale) + zero, low, high)
    return codes


def _tiles(rows: int, columns: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of an elementwise kernel, and its tile."""
    block = min(power_of_two(columns), _TILE)
    height = _TILE // block
    return (triton.cdiv(rows, height) * triton.cdiv(columns, block),), {"ROWS": height, "BLOCK": block}


def _coded_weight(
    rows: Tensor, scale: Tensor, dtype: torch.dtype, sign: bool, zero: float = 0.0, low: int = -1, high: int = 1
) -> Tensor:
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    if rows.numel():
        scale = scale.float().broadcast_to(*rows.shape[:-1], scale.shape[-1] if scale.dim() else 1)
        scale = scale if scale.shape[-1] == 1 else scale.broadcast_to(rows.shape)
        matrix, steps = as_matrix(rows), as_matrix(scale)
        grid, size = _tiles(*matrix.shape)
        with on_device_of(rows):
            _codes_kernel[grid](
                *(matrix, steps, out, *matrix.shape, *matrix.stride(), steps.stride(0)),
                *(0 if steps.shape[1] == 1 else steps.stride(1), zero, float(low), float(high)),
                SIGN=sign,
                **size,
                **EXACT,
            )
    return out


def quantize_weight(
    rows: Tensor, scale: Tensor, zero_point: float, qmin: int, qmax: int, dtype: torch.dtype = torch.int8
) -> Tensor:
    """`reference.quantize_weight` in one pass."""
    return _coded_weight(rows, scale, dtype, False, zero_point, qmin, qmax)


def quantize_sign(rows: Tensor, threshold: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """`reference.quantize_sign` in one pass."""
    return _coded_weight(rows, threshold, dtype, True)


@triton.jit
def _pack_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    width,
    x_row,
    x_column,
    scale_row,
    scale_column,
    group,
    zero,
    low,
    high,
    lowest,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    SIGN: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, byte, exists = tile(rows, width, ROWS, BLOCK)
    place = tl.arange(0, PER)[None, None, :]
    column = byte[:, :, None] * PER + place  # (1, BLOCK, PER): neighbours in memory, so that loads are wide
    inside = exists[:, :, None] & (column < columns)
    at = row[:, :, None] * x_row + column.to(tl.int64) * x_column
    if CODES:
        codes = tl.load(x_ptr + at, mask=inside, other=0)
    else:
        values = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row[:, :, None] * scale_row + column // group * scale_column, mask=inside, other=1.0)
        codes = _codes(values, scale, zero, low, high, SIGN)
    levels = tl.where(inside, (codes.to(tl.int32) - lowest) // STEP, 0)  # never negative, so // rounds down
    packed = tl.sum(levels << (BITS * place), axis=2)
    tl.store(out_ptr + row * width + byte, packed.to(tl.uint8), mask=exists)


def _packed(x: Tensor, scale: Tensor | None, layout: Layout, sign: bool = False, low: int = -1, high: int = 1) -> Tensor:
    """float (N, K) with scales (or thresholds) (1 or N, G), or int8 codes without -> uint8 (N, ceil(K * bits / 8))."""
    matrix, per = as_matrix(x), CODES_PER_BYTE[layout.bits]
    n, k = matrix.shape
    width = -(-k // per)
    out = torch.empty(*x.shape[:-1], width, dtype=torch.uint8, device=x.device)
    if out.numel():
        steps = matrix[:1, :1] if scale is None else scale.float()  # of codes, nothing is read there
        strides = [0 if size == 1 else stride for size, stride in zip(steps.shape, steps.stride(), strict=True)]
        block = min(power_of_two(width), max(1, _TILE // per))
        height = max(1, _TILE // per // block)
        with on_device_of(x):
            _pack_kernel[(triton.cdiv(n, height) * triton.cdiv(width, block),)](
                *(matrix, steps, out, n, k, width, *matrix.stride(), *strides, max(1, k // steps.shape[1])),
                *(layout.zero_point, float(low), float(high), layout.lowest),
                **{"STEP": layout.step, "BITS": layout.bits, "PER": per, "SIGN": sign, "CODES": scale is None},
                **{"ROWS": height, "BLOCK": block},
                **EXACT,
            )
    return out


def quantize_pack(weight: Tensor, scale: Tensor, qmin: int, qmax: int, layout: Layout) -> Tensor:
    """`reference.quantize_pack` in one pass."""
    check_scale(scale, *weight.shape)
    return _packed(weight, scale, layout, False, qmin, qmax)


def sign_pack(weight: Tensor, threshold: Tensor) -> Tensor:
    """`reference.sign_pack` in one pass."""
    check_scale(threshold, *weight.shape)
    return _packed(weight, threshold, Layout(1, -1, 2), True)


def pack(codes: Tensor, bits: int, lowest: int, step: int) -> Tensor:
    """`reference.pack` in one pass."""
    return _packed(codes, None, Layout(bits, lowest, step))


@triton.jit
def _unpack_kernel(
    x_ptr,
    out_ptr,
    rows,
    columns,
    x_row,
    x_column,
    lowest,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, exists = tile(rows, columns, ROWS, BLOCK)
    byte = tl.load(x_ptr + row * x_row + (column // PER).to(tl.int64) * x_column, mask=exists, other=0).to(tl.int32)
    level = (byte >> (BITS * (column % PER))) & ((1 << BITS) - 1)
    tl.store(out_ptr + row * columns + column, (level * STEP + lowest).to(tl.int8), mask=exists)


def unpack(packed: Tensor, bits: int, lowest: int, step: int, in_features: int) -> Tensor:
    """`reference.unpack` in one pass."""
    if packed.shape[-1] * CODES_PER_BYTE[bits] < in_features:
        raise ValueError(f"{packed.shape[-1]} bytes hold no {in_features} codes of {bits} bits")
    matrix = as_matrix(packed)
    out = torch.empty(*packed.shape[:-1], in_features, dtype=torch.int8, device=packed.device)
    if out.numel():
        grid, size = _tiles(matrix.shape[0], in_features)
        with on_device_of(packed):
            _unpack_kernel[grid](
                *(matrix, out, matrix.shape[0], in_features, *matrix.stride(), lowest),
                **{"STEP": step, "BITS": bits, "PER": CODES_PER_BYTE[bits]},
                **size,
            )
    return out
