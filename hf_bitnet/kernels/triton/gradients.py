"""The products of backward: floating-point gradients with int8 codes. Own.

Codes and scales become operands of the gradient's dtype in one pass each, and the vendor's library multiplies: a kernel that
widens the codes on the way to the matrix units is no match for it at the sizes of training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..fits import check_levels
from .rows import scaled


def fixed_matmul(
    a: Tensor, a_scale: Tensor | None, codes: Tensor, zero_point: float, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.fixed_matmul` in the dtype of `a`. Factors go where the smaller operand is, or, one for all, outside."""
    check_levels(a, a_scale, codes)
    if a.dtype == torch.float64:  # no kernel computes in it
        return eager.fixed_matmul(a, a_scale, codes, zero_point, scale, dtype)
    if scale is not None and a.dtype == torch.float16:  # sums of 8-bit levels overflow float16
        a_scale, scale = scale.reshape(1) if a_scale is None else a_scale.reshape(-1) * scale.reshape(()), None
    to_codes = a_scale is None or (a_scale.numel() == codes.shape[0] and codes.shape[1] <= a.shape[0])
    levels = scaled(codes, a_scale if to_codes else None, a.dtype, zero_point=zero_point)
    if not to_codes:
        a = scaled(a, a_scale, a.dtype, by_column=True)
    with torch.autocast(a.device.type, enabled=False):  # it would round a float32 product to bfloat16
        y = a @ levels
    if scale is None:
        return y.to(dtype)
    return scaled(y, scale, dtype, out=y if y.dtype == dtype else None)
