"""Products of gradients with int8 codes through the C++ library: floats in 15-bit fixed point, two exact integer products. Own.

Each row of the float operand is rounded to integers q = rint(a * 32512 / max|row|) = 256 high + low, and the int8 products of
both bytes are exact. The error of an element is at most max|row| / 65024 whatever its size, where bfloat16's is up to 1/512
of each element: smaller for rows whose largest element is below some 150 times their root mean square, and gradients are
such rows. What this costs is two int8 products, half a float32 product or less. AMX multiplies bfloat16 at half the rate of
int8: there a bfloat16 operand is multiplied as it is, codes are exact beside it, and sums are float32.

Leaves out: `products.py` has the products of the forward step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..fits import check_levels
from .common import FLOATS, as_float32, as_rows, check, require_cpu
from .library import functions

# below this many multiplications a float product is over before the operands are laid out
_WORTH_IT = 1 << 18
# rows of codes summed at a time: 2**16 products of two int8 stay within int32
_SUMMED_AT_ONCE = 1 << 16


def fixed_matmul(
    a: Tensor, a_scale: Tensor | None, codes: Tensor, zero_point: float, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.fixed_matmul` with the elements of `a` in fixed point; exact floats for small or float64 operands."""
    (m, k), n = a.shape, codes.shape[1]
    if m * k * n < _WORTH_IT or a.dtype not in FLOATS or dtype not in FLOATS:
        return eager.fixed_matmul(a, a_scale, codes, zero_point, scale, dtype)
    require_cpu(a_scale, codes, scale)
    check_levels(a, a_scale, codes)
    factor = 1.0 if scale is None else scale.item()
    if k <= _SUMMED_AT_ONCE:
        return _call(a, a_scale, codes, zero_point, factor, dtype)
    total = torch.zeros(m, n, dtype=torch.float32, device="cpu")
    for start in range(0, k, _SUMMED_AT_ONCE):
        part = slice(start, start + _SUMMED_AT_ONCE)
        of_part = None if a_scale is None else a_scale.reshape(-1)[part]
        total += _call(a[:, part], of_part, codes[part], zero_point, factor, torch.float32)
    return total.to(dtype)


def _call(a: Tensor, a_scale: Tensor | None, codes: Tensor, zero_point: float, scale: float, dtype: torch.dtype) -> Tensor:
    (m, k), n = a.shape, codes.shape[1]
    rows, scales = as_rows(codes), None if a_scale is None else as_float32(a_scale)
    out = torch.empty(m, n, dtype=dtype, device="cpu")
    left = a.data_ptr(), FLOATS[a.dtype], *a.stride(), 0 if scales is None else scales.data_ptr(), m, k
    right = rows.data_ptr(), rows.stride(0), n, zero_point, scale
    check(functions().hb_fixed_matmul(*left, *right, out.data_ptr(), FLOATS[dtype], n))
    return out
