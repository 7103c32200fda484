"""Faster bodies that need nothing but stock torch. Own.

Same contracts as `reference.py`; `dispatch.py` says where each may serve. Two things make them fast: oneDNN's int8 product,
and working in blocks of rows, so that the chain of elementwise steps stays in the cache instead of running through memory
once a step. Under torch.compile the blocks would only unroll; there the compiler fuses the plain form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import reference
from .graph import is_traced
from .reference import Layout, PackedWeight, RowQuantization

# float32 holds integers up to 2**24 exactly; an int8 x int8 product is at most 2**14
_EXACT_FLOAT32_TERMS = 2**24 // 2**14
# elements: 512 KB of float32, within the second-level cache of one core
_BLOCK = 1 << 17


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(columns, 1))
    step -= step % 32 if step > 32 else 0  # whole tiles of the matrix product
    return (slice(start, start + step) for start in range(0, rows, step))


def _whole(x: Tensor, elements: int) -> bool:
    """Whether so many elements are computed at once. Blocks serve the CPU's caches; elsewhere they are only more launches."""
    return elements <= _BLOCK or torch.compiler.is_compiling() or not x.is_cpu


def _as_they_are(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which knows no meta device."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def int_matmul_onednn(a: Tensor, b: Tensor) -> Tensor:
    """Exact int8 (M, K) x int8 (N, K) -> int32 (M, N) through `torch._int_mm`."""
    # torch 2.13 misreads operands whose strides are ambiguous (K = 1) or 0 (expanded), and returns uninitialised memory
    if a.shape[1] == 1:
        return a.int() * b.t().int()
    return torch.ops.aten._int_mm(a.contiguous(), b.contiguous().t())


def int_matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """Exact int8 (M, K) x int8 (N, K) -> int32 (M, N) in float32, in slices of K short enough for float32 to be exact."""
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    with _as_they_are(a.device):  # autocast would round these products to bfloat16
        for start in range(0, a.shape[1], _EXACT_FLOAT32_TERMS):
            part = slice(start, start + _EXACT_FLOAT32_TERMS)
            out += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return out


def make_int_linear(int_matmul: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`reference.int_linear` over an integer product: exact sums, scales applied outside in float32."""

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
        if w_scale.shape[-1] > 1:
            return _grouped_linear(x_codes, x_scale, x_zero, w_codes, w_scale, w_zero, bias, dtype)
        # what a zero point of the input takes off: its multiple of each row's sum of levels
        w_sum = torch.zeros((), dtype=torch.float32, device=w_codes.device)
        if x_zero is not None:
            w_sum = w_codes.sum(dim=-1, dtype=torch.int32).float() - w_zero * w_codes.shape[-1]
        w_scale = w_scale.reshape(1, -1)

        def block(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
            y = int_matmul(x, w_codes)
            if w_zero:
                # Python numbers times integers would have the default dtype
                y = y.float() - w_zero * x.sum(dim=-1, keepdim=True, dtype=torch.int32).float()
            if zero is not None:
                y = y - zero * w_sum
            y = y * (scale * w_scale) if w_scale.numel() == 1 else (y * scale).mul_(w_scale)
            return (y if bias is None else y.add_(bias)).to(dtype)

        rows, columns = x_codes.shape[0], w_codes.shape[0]
        if _whole(x_codes, rows * columns):
            return block(x_codes, x_scale, x_zero)
        out = torch.empty(rows, columns, dtype=dtype, device=x_codes.device)
        for part in _row_blocks(rows, columns):
            out[part] = block(x_codes[part], x_scale[part], None if x_zero is None else x_zero[part])
        return out

    return int_linear


def _grouped_linear(
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    w_codes: Tensor,
    w_scale: Tensor,
    w_zero: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """A scale that changes along K cannot leave the sum: one float32 product over dequantized weights."""
    x = x_codes.float() if x_zero is None else x_codes.float() - x_zero
    w = ((w_codes.float() - w_zero).unflatten(-1, (w_scale.shape[-1], -1)) * w_scale.unsqueeze(-1)).flatten(-2)
    with _as_they_are(x.device):
        y = (x @ w.t()) * x_scale
    return (y if bias is None else y + bias).to(dtype)


def quantize_rows(x: Tensor, qmin: int, qmax: int, eps: float) -> tuple[Tensor, Tensor]:
    """Blocked `reference.quantize_rows`."""
    if _whole(x, x.numel()):
        return reference.quantize_rows(x, qmin, qmax, eps)
    flat = x.reshape(-1, x.shape[-1])
    codes = torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(flat.shape[0], 1, dtype=torch.float32, device=x.device)
    for part in _row_blocks(*flat.shape):
        codes[part], scale[part] = reference.quantize_rows(flat[part], qmin, qmax, eps)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def quantize_weight(
    rows: Tensor, scale: Tensor, zero_point: float, qmin: int, qmax: int, dtype: torch.dtype = torch.int8
) -> Tensor:
    """Blocked `reference.quantize_weight`; one long row is cut along its length."""
    if _whole(rows, rows.numel()):
        return reference.quantize_weight(rows, scale, zero_point, qmin, qmax, dtype)
    codes = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    if rows.shape[0] == 1:
        for part in _row_blocks(rows.shape[1], 1):
            codes[:, part] = reference.quantize_weight(rows[:, part], scale, zero_point, qmin, qmax, dtype)
    else:
        for part in _row_blocks(*rows.shape):
            codes[part] = reference.quantize_weight(rows[part], scale[part], zero_point, qmin, qmax, dtype)
    return codes


def scale_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocked `reference.scale_rows`."""
    if _whole(x, x.numel()):
        return reference.scale_rows(x, scale, dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for part in _row_blocks(*x.shape):
        out[part] = x[part] * scale[part]
    return out


def _scale_all(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float (M, N), overwritten, times one float32 number, multiplied in float32 or wider and rounded once to `dtype`."""
    wide = torch.promote_types(x.dtype, dtype)
    if not x.is_cpu:  # other devices may round a 0-dim factor to the dtype of x before they multiply
        wide = torch.promote_types(wide, torch.float32)
    return x.to(wide).mul_(scale.reshape(())).to(dtype)


def place_factors(
    a: Tensor, a_scale: Tensor | None, codes: Tensor, scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Factors of `fixed_matmul`: of rows of the codes or columns of `a`, whichever is smaller, and of the whole product."""
    if scale is not None and a.dtype == torch.float16:  # sums of 8-bit levels overflow float16
        a_scale, scale = scale.reshape(1) if a_scale is None else a_scale * scale.reshape(()), None
    if a_scale is not None and a_scale.numel() == codes.shape[0] and codes.shape[1] <= a.shape[0]:
        return a_scale, None, scale
    return None, a_scale, scale


# multiplications that take ten times as long as compiling a kernel
_LARGE = 1 << 33


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N), with zeros up to few different sizes where new ones are dear.

    oneDNN compiles a kernel for every new shape of bfloat16 on the CPU, which takes milliseconds; the numbers of tokens that
    experts get are never the same. A large product takes longer than that, and multiplies no zeros.
    """
    (m, k), padded = a.shape, [_few_sizes(size) for size in a.shape]
    small = m * k * b.shape[1] < _LARGE
    if not small or a.dtype != torch.bfloat16 or not a.is_cpu or [m, k] == padded or is_traced(a):
        return a @ b
    rows, inner = padded
    a = torch.nn.functional.pad(a, (0, inner - k, 0, rows - m))
    return (a @ (b if inner == k else torch.nn.functional.pad(b, (0, 0, 0, inner - k))))[:m]


def _few_sizes(size: int) -> int:
    """`size` or somewhat more: multiples of 16, from 256 on of an eighth of a power of two, at most 12 % more."""
    unit = max(16, 1 << (size.bit_length() - 4)) if size > 8 else 16
    return -(-size // unit) * unit


def fixed_matmul(
    a: Tensor, a_scale: Tensor | None, codes: Tensor, zero_point: float, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.fixed_matmul` in the dtype of `a`."""
    of_codes, of_a, scale = place_factors(a, a_scale, codes, scale)
    levels = codes if zero_point == 0.0 else codes.to(a.dtype) - zero_point
    if of_codes is not None:
        levels = scale_rows(levels, of_codes.reshape(-1, 1), a.dtype)
    if of_a is not None:
        a = (a * of_a.reshape(1, -1)).to(a.dtype)
    with _as_they_are(a.device):  # autocast would round a float32 product to bfloat16
        y = _product(a, levels.to(a.dtype))
    return y.to(dtype) if scale is None else _scale_all(y, scale, dtype)


def make_packed_int_linear(int_linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`reference.packed_int_linear` over an `int_linear`: the weight is unpacked for each call."""

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
        codes = reference.unpack(packed, layout.bits, layout.lowest, layout.step, x_codes.shape[-1])
        return int_linear(x_codes, x_scale, x_zero, codes, scale, layout.zero_point, bias, dtype)

    return packed_int_linear


def make_packed_linear(int_linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`reference.packed_linear` over an `int_linear`."""
    product = make_packed_int_linear(int_linear)

    def packed_linear(
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        layout: Layout,
        rows: RowQuantization,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, x_scale = quantize_rows(x, *rows)
        return product(codes, x_scale, None, packed, scale, bias, layout, dtype)

    return packed_linear


def make_packed_linears(int_linear: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """`reference.packed_linears` over an `int_linear`: x is quantized once."""
    product = make_packed_int_linear(int_linear)

    def packed_linears(
        x: Tensor, weights: Sequence[PackedWeight], layout: Layout, rows: RowQuantization, dtype: torch.dtype
    ) -> list[Tensor]:
        codes, x_scale = quantize_rows(x, *rows)
        return [product(codes, x_scale, None, packed, scale, bias, layout, dtype) for packed, scale, bias in weights]

    return packed_linears


def quantize_pack(weight: Tensor, scale: Tensor, qmin: int, qmax: int, layout: Layout) -> Tensor:
    """Blocked `reference.quantize_pack`."""
    if _whole(weight, weight.numel()):
        return reference.quantize_pack(weight, scale, qmin, qmax, layout)
    scale = scale.expand(weight.shape[0], -1)
    parts = _row_blocks(*weight.shape)
    return torch.cat([reference.quantize_pack(weight[part], scale[part], qmin, qmax, layout) for part in parts])


def sign_pack(weight: Tensor, threshold: Tensor) -> Tensor:
    """Blocked `reference.sign_pack`."""
    if _whole(weight, weight.numel()):
        return reference.sign_pack(weight, threshold)
    threshold = threshold.expand(weight.shape[0], -1)
    return torch.cat([reference.sign_pack(weight[part], threshold[part]) for part in _row_blocks(*weight.shape)])


def norm_quantize_rows(
    x: Tensor, norm_weight: Tensor, norm_eps: float, qmin: int, qmax: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Blocked `reference.norm_quantize_rows`."""
    if _whole(x, x.numel()):
        return reference.norm_quantize_rows(x, norm_weight, norm_eps, qmin, qmax, eps)
    flat = x.reshape(-1, x.shape[-1])
    codes = torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(flat.shape[0], 1, dtype=torch.float32, device=x.device)
    for part in _row_blocks(*flat.shape):
        codes[part], scale[part] = reference.norm_quantize_rows(flat[part], norm_weight, norm_eps, qmin, qmax, eps)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)
