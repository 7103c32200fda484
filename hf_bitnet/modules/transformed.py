"""Packed layers under the transforms of torch.func (vmap, grad, vjp, jacrev, ...). Own.

The kernels take memory, and `functional.py` keeps objects for backward that no transform can look into. Here the product is
made of torch operations, the definitions of `kernels/reference.py`: the same codes, float64 sums of them, one rounding.

Leaves out: speed; forward-mode derivatives (`jvp`, `jacfwd`); layers in train form, whose surrogate gradients stay opaque.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import reference
from ..quantizers import ActivationScheme, Quantized

# whether one is at work in this thread; an alias, because every call of a layer asks, and torch.compile knows the original
is_transforming = torch._C._are_functorch_transforms_active


class _StraightThrough(torch.autograd.Function):
    """y of the codes, with the gradients of x W_hat^T + bias; every other argument only brings a value.

    x: float (..., K). bias: (N,) or None. value: W_hat (N, K). y: (..., N).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, value: Tensor, y: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, bias, value, _ = inputs
        ctx.save_for_backward(value)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (value,) = grads, ctx.saved_tensors
        bias_grad = None
        if ctx.bias_dtype is not None:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
        return (grad @ value.to(grad.dtype)).to(ctx.x_dtype), bias_grad, None, None


def transformed_product(
    x: Tensor, w: Quantized, bias: Tensor | None, activation: type[ActivationScheme], act_scale: Tensor | None
) -> Tensor:
    """The product of a packed layer, for the transforms of torch.func.

    Args:
        x: float (..., K). w: codes int8 (N, K) and scale. bias: (N,) or None.
        activation, act_scale: how x is quantized.

    Returns:
        (..., N) in the autocast dtype, else x's own.
    """
    dtype = kernels.autocast_dtype(x)
    value = w.dequantize(torch.float32)
    if not activation.quantizes:
        y = x.to(dtype) @ value.to(dtype).t()
        return (y if bias is None else y + bias).to(dtype)
    with torch.no_grad():
        codes, x_scale, x_zero = activation.quantize(x.detach().reshape(-1, x.shape[-1]), act_scale)
        zero = x_zero if isinstance(x_zero, Tensor) else None
        assert isinstance(w.zero_point, float)
        y = reference.int_linear(codes, x_scale, zero, w.codes, w.scale, w.zero_point, bias, dtype)
    return _StraightThrough.apply(x, bias, value, y.view(*x.shape[:-1], y.shape[-1]))
