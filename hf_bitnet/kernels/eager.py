"""Faster bodies that need nothing but stock torch (oneDNN's int8 product). Own.

Same contracts as `reference.py`; `dispatch.py` says where each may serve.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# float32 holds integers up to 2**24 exactly; an int8 x int8 product is at most 2**14
_EXACT_FLOAT32_TERMS = 2**24 // 2**14


def int_matmul_onednn(a: Tensor, b: Tensor) -> Tensor:
    """Exact int8 (M, K) x int8 (N, K) -> int32 (M, N) through `torch._int_mm`."""
    return torch.ops.aten._int_mm(a, b.t())


def int_matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """Exact int8 (M, K) x int8 (N, K) -> int32 (M, N) in float32, in slices of K short enough for float32 to be exact."""
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):  # autocast would round these products to bfloat16
        for start in range(0, a.shape[1], _EXACT_FLOAT32_TERMS):
            part = slice(start, start + _EXACT_FLOAT32_TERMS)
            out += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return out


def make_int_linear(int_matmul: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`reference.int_linear` over an integer product: exact sums, scales applied outside in float32."""

    def int_linear(
        x_codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, w_codes: Tensor, w_scale: Tensor, w_zero: float
    ) -> Tensor:
        if w_scale.shape[-1] > 1:
            # a scale that changes along K cannot leave the sum: one float32 product over dequantized weights
            x = x_codes.float() if x_zero is None else x_codes.float() - x_zero
            w = (w_codes.float() - w_zero).unflatten(-1, (w_scale.shape[-1], -1)) * w_scale.unsqueeze(-1)
            with torch.autocast(x.device.type, enabled=False):
                return (x @ w.flatten(-2).t()) * x_scale
        y = int_matmul(x_codes, w_codes)
        if x_zero is not None or w_zero:
            y = y.float()
            if x_zero is not None:
                y = y - x_zero * (w_codes.sum(dim=-1, dtype=torch.int32).float() - w_zero * w_codes.shape[-1])
            if w_zero:
                y = y - w_zero * x_codes.sum(dim=-1, keepdim=True, dtype=torch.int32)
        if w_scale.shape[0] == 1:
            return y * (x_scale * w_scale)
        return (y * x_scale) * w_scale.t()

    return int_linear
