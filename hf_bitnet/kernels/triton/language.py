"""Device functions that several kernels use. Own.

Rounding is half to even and divisions are exact on every device, so that codes equal those of `reference.py` bit for bit;
kernels that round are launched with `EXACT`, because a product that is fused with the sum after it is rounded once where the
definition rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# launch options of kernels whose roundings count
EXACT = {"enable_fp_fusion": False}
# the interpreter cuts float32 to bfloat16 where GPUs round, and knows no assembly
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
# 1.5 * 2**23: added to a float32 of at most 2**22 it leaves no bits for a fraction
INTEGERS = tl.constexpr(12582912.0)


@triton.jit
def rounded(x):
    """float32, |x| <= 2**22 -> the nearest integer, half to even. libdevice has it too, but not in the interpreter."""
    return (x + INTEGERS) - INTEGERS


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """float32 -> `dtype`, half to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def largest(values):
    """float32 (R, K) -> max|row| (R,), and how many NaN there are (R,): `tl.max` passes them over."""
    return tl.max(tl.abs(values), axis=1), tl.sum((values != values).to(tl.int32), axis=1)


@triton.jit
def inverse_of(top, nans, qmax, eps):
    """What rows of largest magnitude `top` are multiplied with; NaN where there were any, so that it reaches the output."""
    inverse = tl.div_rn(tl.zeros_like(top) + 1.0, tl.maximum(top, eps)) * qmax  # in torch a number / tensor is this too
    return tl.where(nans > 0, float("nan"), inverse)


@triton.jit
def coded(values, low, high):
    """float32 -> int8: clamped to whole numbers, then rounded, which is rounded and then clamped. NaN becomes 0."""
    values = tl.where(values == values, values, 0.0)
    return rounded(tl.minimum(tl.maximum(values, low), high)).to(tl.int8)


@triton.jit
def tile(rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows (ROWS, 1) as int64, columns (1, BLOCK), and which of them exist, in a grid of one dimension."""
    program, across = tl.program_id(0), tl.cdiv(columns, BLOCK)
    row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % across) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < columns)
