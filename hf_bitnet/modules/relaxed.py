"""The weight and the input of a layer below full strength, by a relaxation (`relaxations.py`). Own.

The soft value of a weight w at position v is that of its soft position c(v): (c(v) step + lowest - zero point) scale. Then

    dvalue/dw     = c'(v)
    dvalue/dscale = level of c(v) - (w / scale) c'(v), weighted as LSQ's (a learned scale only; a computed one is a constant)

For backward nothing is kept but the weight itself: positions and slopes are derived again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..quantizers import Quantized
from ..relaxations import Relaxation, Soften, straight
from .functional import FakeQuantizeWeight, Latent


class SoftWeight(torch.autograd.Function):
    """weight (N, K), learned scale or None, strength 0-dim -> the soft value (N, K) in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor | None, strength: Tensor, source: Latent, soften: Soften) -> Tensor:
        ctx.source, ctx.soften = source, soften
        ctx.save_for_backward(weight, scale, strength)
        present = _present_scale(weight, scale, source)
        softened = soften(source.quantizer.position(weight, present), source.quantizer.grid.levels, strength)
        return Quantized(_levels(softened.position, source), present).dequantize(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, scale, strength = ctx.saved_tensors
        source: Latent = ctx.source
        present = _present_scale(weight, scale, source)
        position = source.quantizer.position(weight, present)
        softened = ctx.soften(position, source.quantizer.grid.levels, strength)
        scale_grad = None
        if scale is not None:
            by_scale = _levels(softened.position, source) - _levels(position, source) * softened.slope
            scale_grad = torch.zeros_like(scale) if source.idle_scale else source.scale_gradient(grads[0], by_scale, present)
        return (grads[0].float() * softened.slope).to(grads[0].dtype), scale_grad, None, None, None


def relaxed_weight(
    weight: Tensor,
    scale: Tensor | None,
    temperature: Tensor,
    strength: Tensor,
    source: Latent,
    relaxation: Relaxation,
) -> Tensor:
    """What serves as the weight: (N, K) in its dtype, exactly the weight at strength 0, its quantized value at 1.

    Args:
        weight: float (N, K). scale: learned, else None. temperature, strength: 0-dim.
    """
    return mixed_weight(
        weight, FakeQuantizeWeight.apply(weight, scale, temperature, source), scale, strength, source, relaxation
    )


def mixed_weight(
    weight: Tensor, value: Tensor, scale: Tensor | None, strength: Tensor, source: Latent, relaxation: Relaxation
) -> Tensor:
    """`relaxed_weight` of a weight whose quantized `value` (N, K) is there already."""
    relaxation = relaxation.on(source.quantizer.grid.levels)
    if relaxation.soften is not None:
        value = torch.where(strength < 1, SoftWeight.apply(weight, scale, strength, source, relaxation.soften), value)
    return relaxation.mix(weight, value, strength)


def relaxed_input(x: Tensor, quantized: Tensor, strength: Tensor) -> Tensor:
    """The straight mix of an input (..., K) with its quantized value, whatever the relaxation."""
    return straight(x, quantized, strength)


def _present_scale(weight: Tensor, scale: Tensor | None, source: Latent) -> Tensor:
    if scale is None or source.idle_scale:
        return source.quantizer.compute_scale(weight)
    return source.quantizer.usable_scale(scale)


def _levels(position: Tensor, source: Latent) -> Tensor:
    """Positions -> multiples of the scale, float32 (N, K)."""
    grid = source.quantizer.grid
    return position * grid.step + (grid.lowest - grid.zero_point)
