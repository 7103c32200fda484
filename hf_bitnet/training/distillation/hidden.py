"""How far a hidden state is from the teacher's, with its gradient in closed form.

    cosine   1 - cos(s, t)
    mse      mean over features of (s - t)^2
    huber    mean over features of d^2 / 2 where |d| = |s - t| <= delta, else delta (|d| - delta / 2)

Contract, held by tests for every member: the gradient is autograd's in float64; equal states give exactly 0 in both.
The gradient is made in forward, so that of the teacher's states nothing is kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...registry import Registry

# (student (n, H), teacher (n, H), delta) -> loss of each row (n,), its derivative by the student (n, H)
HiddenLoss = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
HIDDEN_LOSSES: Registry[HiddenLoss] = Registry("hidden-state loss")
# below this a vector has no direction
_SHORTEST = 1e-12


@HIDDEN_LOSSES.register("cosine")
def cosine(student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """As half the squared distance of the unit vectors, which is exactly 0 for equal ones."""
    length = student.norm(dim=-1, keepdim=True).clamp_min_(_SHORTEST)
    unit = student / length
    difference = unit - teacher / teacher.norm(dim=-1, keepdim=True).clamp_min_(_SHORTEST)
    loss = 0.5 * difference.square().sum(dim=-1)
    along = (difference * unit).sum(dim=-1, keepdim=True)
    return loss, (difference - along * unit) / length


@HIDDEN_LOSSES.register("mse")
def mse(student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    difference = student - teacher
    return difference.square().mean(dim=-1), difference * (2.0 / student.shape[-1])


@HIDDEN_LOSSES.register("huber")
def huber(student: Tensor, teacher: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    difference = student - teacher
    clipped = difference.clamp(-delta, delta)
    # d c - c^2 / 2 is d^2 / 2 inside and the line outside
    return (clipped * (difference - 0.5 * clipped)).mean(dim=-1), clipped / student.shape[-1]


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, loss: HiddenLoss, delta: float) -> Tensor:
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        rows, gradient = loss(student.to(wide), teacher.to(wide), delta)
        weights = weights.to(wide)
        ctx.gradient = (gradient * weights.unsqueeze(1)).to(student.dtype) if ctx.needs_input_grad[0] else None
        return torch.dot(rows, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = None if ctx.gradient is None else ctx.gradient * grads[0].to(ctx.gradient.dtype)
        return gradient, None, None, None, None


def hidden_loss(student: Tensor, teacher: Tensor, weights: Tensor, loss: str, delta: float = 1.0) -> Tensor:
    """Sum over tokens.

    Args:
        student, teacher: float (..., H), the same shape.
        weights: of the tokens, (...); those that do not count have 0.
        loss: in `HIDDEN_LOSSES`. delta: of "huber".

    Returns:
        float32 0-dim (float64 for float64), with gradient by `student`.

    Raises:
        ValueError: the widths differ.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"the student's hidden states are {student.shape[-1]} wide, the teacher's {teacher.shape[-1]}, and cannot be "
            "compared one by one; leave `hidden` out and use DistillationConfig(relations={}), which compares tokens with each "
            "other and takes any widths"
        )
    member, width = HIDDEN_LOSSES.get(loss), student.shape[-1]
    return _Distance.apply(student.reshape(-1, width), teacher.reshape(-1, width), weights.reshape(-1), member, delta)
