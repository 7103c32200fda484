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
    """`reference.fixed_matmul` in the dtype of `a`."""
    check_levels(a, a_scale, codes)
    if a.dtype == torch.float64:  # no kernel computes in it
        return eager.fixed_matmul(a, a_scale, codes, zero_point, scale, dtype)
    of_codes, of_a, scale = eager.place_factors(a, a_scale, codes, scale)
    levels = scaled(codes, of_codes, a.dtype, zero_point=zero_point)
    if of_a is not None:
        a = scaled(a, of_a, a.dtype, by_column=True)
    with torch.autocast(a.device.type, enabled=False):  # it would round a float32 product to bfloat16
        y = a @ levels
    if scale is None:
        return y.to(dtype)
    return scaled(y, scale, dtype, out=y if y.dtype == dtype else None)
