"""The product of int8 codes with int8 codes, scaled as it leaves the registers: no int32 matrix goes through memory. Own.

    y[m, n] = (sum_k x w - w_zero sum_k x - x_zero (sum_k w - K w_zero)) x_scale[m] w_scale[n] + bias[n]

Sums of codes are exact, and scaled in the order of the torch bodies, without a fused multiply-add: the result is theirs bit
for bit. Where a scale serves a group of inputs, the sum of each group is scaled and added in float32.
"""

# constants of kernels are of a type of their own
# pyright: reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fits import check_codes, check_device, check_input, check_weight
from .language import EXACT, narrowed
from .support import bucket, on_device_of
from .tuning import sizes, tuned

_CONFIGS = [
    sizes(128, 256, 128, 8, 3),
    sizes(128, 256, 64, 8, 4),
    sizes(256, 128, 64, 8, 4),
    sizes(128, 128, 128, 8, 3),
    sizes(128, 128, 64, 4, 4),
    sizes(64, 256, 128, 8, 3),
    sizes(64, 128, 128, 4, 4),
    sizes(64, 64, 128, 4, 4),
    sizes(32, 64, 128, 4, 5),
    sizes(16, 64, 256, 4, 4),
]
_KEY = ("bucket", "n", "k", "SCALED", "X_ZERO", "W_ZERO")


@triton.jit
def place(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows (BLOCK_M,) and columns (BLOCK_N,), int64, of this program: neighbours share operands in the cache."""
    program, down, across = tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    band = 8 * across
    first = program // band * 8
    height = tl.minimum(down - first, 8)
    row = first + program % band % height
    column = program % band // height
    rows = row.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows, column.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def scaled(sums, x_scale, w_scale, ONE_SCALE: tl.constexpr):
    """float32 sums times the scales of their rows and columns, in the order of `eager.make_int_linear`."""
    if ONE_SCALE:
        return sums * (x_scale[:, None] * w_scale[None, :])
    return (sums * x_scale[:, None]) * w_scale[None, :]


@triton.jit
def store(
    sums,
    out_ptr,
    x_scale,
    w_scale_ptr,
    w_scale_row,
    bias_ptr,
    row,
    exists,
    column,
    n,
    BIAS: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """float32 sums (BLOCK_M, BLOCK_N), times both scales, or, `GROUPED`, that of x alone, plus the bias, rounded once."""
    if GROUPED:
        y = sums * x_scale[:, None]
    else:
        y = scaled(sums, x_scale, tl.load(w_scale_ptr + column * w_scale_row, mask=column < n, other=0.0), ONE_SCALE)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    inside = exists[:, None] & (column < n)[None, :]
    tl.store(out_ptr + row[:, None] * n + column[None, :], narrowed(y, out_ptr.dtype.element_ty), mask=inside)


@tuned(sizes(32, 32, 64, 4, 1), _CONFIGS, _KEY)
@triton.heuristics({"EVEN": lambda given: given["k"] % given["BLOCK_K"] == 0})
@triton.jit
def _product_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    x_row,
    x_step,
    w_row,
    w_step,
    x_scale_step,
    x_zero_step,
    w_scale_row,
    w_zero,
    bucket,
    SCALED: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = place(m, n, BLOCK_M, BLOCK_N)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    # rows beyond the last read it once more: nothing is stored of them, and loads without a mask are faster
    x_at = x_ptr + (row % m)[:, None] * x_row + depth[None, :] * x_step
    w_at = w_ptr + (column % n)[:, None] * w_row + depth[None, :] * w_step
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    x_sum, w_sum = tl.zeros((BLOCK_M,), dtype=tl.int32), tl.zeros((BLOCK_N,), dtype=tl.int32)
    for start in range(0, k, BLOCK_K):
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = (depth < k - start)[None, :]
            x, w = tl.load(x_at, mask=inside, other=0), tl.load(w_at, mask=inside, other=0)
        sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)
        if W_ZERO:
            x_sum += tl.sum(x.to(tl.int32), axis=1)
        if X_ZERO:
            w_sum += tl.sum(w.to(tl.int32), axis=1)
        x_at += BLOCK_K * x_step
        w_at += BLOCK_K * w_step
    if SCALED:
        y = sums.to(tl.float32)
        if W_ZERO:
            y -= (w_zero * x_sum.to(tl.float32))[:, None]
        if X_ZERO:
            x_zero = tl.load(x_zero_ptr + row * x_zero_step, mask=row < m, other=0.0)
            y -= x_zero[:, None] * (w_sum.to(tl.float32) - w_zero * k)[None, :]
        x_scale = tl.load(x_scale_ptr + row * x_scale_step, mask=row < m, other=0.0)
        store(y, out_ptr, x_scale, w_scale_ptr, w_scale_row, bias_ptr, row, row < m, column, n, BIAS, ONE_SCALE, False)
    else:
        inside = (row < m)[:, None] & (column < n)[None, :]
        tl.store(out_ptr + row[:, None] * n + column[None, :], sums, mask=inside)


@tuned(sizes(32, 32, 32, 4, 1), _CONFIGS[3:], ("bucket", "n", "k", "group", "X_ZERO", "W_ZERO"))
@triton.jit
def _grouped_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    x_row,
    x_step,
    w_row,
    w_step,
    x_scale_step,
    x_zero_step,
    w_scale_row,
    w_scale_step,
    w_zero,
    group,
    bucket,
    BIAS: tl.constexpr,
    X_ZERO: tl.constexpr,
    W_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column = place(m, n, BLOCK_M, BLOCK_N)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    x_at, w_at = x_ptr + (row % m)[:, None] * x_row, w_ptr + (column % n)[:, None] * w_row
    scale_at = w_scale_ptr + (column % n) * w_scale_row
    x_zero = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if X_ZERO:
        x_zero = tl.load(x_zero_ptr + row * x_zero_step, mask=row < m, other=0.0)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, k, group):
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        x_sum, w_sum = tl.zeros((BLOCK_M,), dtype=tl.int32), tl.zeros((BLOCK_N,), dtype=tl.int32)
        for start in range(0, group, BLOCK_K):
            inside = (depth < group - start)[None, :]
            at = (first + start + depth)[None, :]
            x = tl.load(x_at + at * x_step, mask=inside, other=0)
            w = tl.load(w_at + at * w_step, mask=inside, other=0)
            sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)
            if W_ZERO:
                x_sum += tl.sum(x.to(tl.int32), axis=1)
            if X_ZERO:
                w_sum += tl.sum(w.to(tl.int32), axis=1)
        part = sums.to(tl.float32)
        if W_ZERO:
            part -= (w_zero * x_sum.to(tl.float32))[:, None]
        if X_ZERO:
            part -= x_zero[:, None] * (w_sum.to(tl.float32) - w_zero * group)[None, :]
        y += part * tl.load(scale_at + first // group * w_scale_step)[None, :]
    x_scale = tl.load(x_scale_ptr + row * x_scale_step, mask=row < m, other=0.0)
    store(y, out_ptr, x_scale, w_scale_ptr, w_scale_row, bias_ptr, row, row < m, column, n, BIAS, False, True)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, rows, columns, x_row, x_column, BLOCK: tl.constexpr):
    across = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    exists = (row < rows) & (column < columns)
    tl.store(out_ptr + row * columns + column, tl.load(x_ptr + row * x_row + column * x_column, mask=exists), mask=exists)


def laid_out(codes: Tensor) -> Tensor:
    """int8 (R, K) with neighbours along K in memory: the matrix units take 8-bit operands in no other order, and a tile that
    has to be turned on its way to them cannot be loaded ahead of time. A transposed matrix is copied, in square tiles."""
    if codes.stride(1) == 1 or 1 in codes.shape or not codes.numel():
        return codes
    out = torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
    with on_device_of(codes):
        _copy_kernel[(triton.cdiv(codes.shape[0], 64) * triton.cdiv(codes.shape[1], 64),)](
            codes, out, *codes.shape, *codes.stride(), BLOCK=64
        )
    return out


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`reference.int_matmul`."""
    check_codes(a, b)
    check_device(a, b)
    a, b = laid_out(a), laid_out(b)
    (m, k), n = a.shape, b.shape[0]
    if not k:
        return torch.zeros(m, n, dtype=torch.int32, device=a.device)
    out = torch.empty(m, n, dtype=torch.int32, device=a.device)
    if out.numel():
        with on_device_of(a):
            _product_kernel[grid(m, n)](
                *(a, b, out, out, out, out, out, m, n, k, *a.stride(), *b.stride(), 0, 0, 0, 0.0, bucket(m)),
                **{"SCALED": False, "ONE_SCALE": False, "BIAS": False, "X_ZERO": False, "W_ZERO": False},
            )
    return out


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
    """`reference.int_linear`, summed in int32 and scaled in float32."""
    check_codes(x_codes, w_codes)
    check_input(x_codes, x_scale, x_zero)
    check_weight(w_codes, w_scale, bias, x_codes.shape[1], x_codes.shape[1])
    check_device(x_codes, x_scale, x_zero, w_codes, w_scale, bias)
    x_codes, w_codes = laid_out(x_codes), laid_out(w_codes)
    (m, k), n, groups = x_codes.shape, w_codes.shape[0], w_scale.shape[-1]
    out = torch.empty(m, n, dtype=dtype, device=x_codes.device)
    if not out.numel():
        return out
    if not k:
        return out.zero_() if bias is None else out.copy_(bias.expand(m, n))
    zero = x_scale if x_zero is None else x_zero
    held = out if bias is None else bias.contiguous()
    flags = {"BIAS": bias is not None, "X_ZERO": x_zero is not None, "W_ZERO": w_zero != 0.0}
    strides = (*x_codes.stride(), *w_codes.stride(), x_scale.stride(0), zero.stride(0))
    w_scale_row = 0 if w_scale.shape[0] == 1 else w_scale.stride(0)
    with on_device_of(x_codes):
        if groups == 1:
            _product_kernel[grid(m, n)](
                *(x_codes, w_codes, out, x_scale, zero, w_scale, held, m, n, k, *strides, w_scale_row, w_zero, bucket(m)),
                SCALED=True,
                ONE_SCALE=w_scale.shape[0] == 1,
                **flags,
                **EXACT,
            )
        else:
            _grouped_kernel[grid(m, n)](
                *(x_codes, w_codes, out, x_scale, zero, w_scale, held, m, n, k),
                *(*strides, w_scale_row, w_scale.stride(1), w_zero, k // groups, bucket(m)),
                **flags,
            )
    return out


def grid(m: int, n: int):
    return lambda chosen: (triton.cdiv(m, chosen["BLOCK_M"]) * triton.cdiv(n, chosen["BLOCK_N"]),)
