"""Divergences between the teacher's and the student's distribution, with their gradients in closed form.

q = softmax(t), p = softmax(s). Each returns the sum over rows, and its derivative by s:

    forward   KL(q || p)                                   p - q
    reverse   KL(p || q)                                   p (log p/q - KL)
    jsd       b KL(q || m) + (1 - b) KL(p || m)            (1 - b) p (log p/m - sum p log p/m),   m = b q + (1 - b) p

Hinton et al. (arXiv 1503.02531), MiniLLM (arXiv 2306.08543), GKD (arXiv 2306.13649). Contract, held by tests for every
member: the derivative is autograd's in float64; equal distributions give exactly 0 in both.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...registry import Registry

# (log p (n, C), log q (n, C), beta) -> sum (0-dim), p (n, C), derivative by s (n, C); both arguments may be overwritten
Divergence = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
DIVERGENCES: Registry[Divergence] = Registry("divergence")


@DIVERGENCES.register("forward")
def forward(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Covers everything the teacher finds likely."""
    q = log_q.exp()
    # the difference first: equal distributions give exactly 0
    kl = torch.dot(q.view(-1), log_q.sub_(log_p).view(-1))
    p = log_p.exp_()
    return kl, p, torch.sub(p, q, out=log_q)


@DIVERGENCES.register("reverse")
def reverse(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Avoids what the teacher finds unlikely."""
    ratio = log_q.neg_().add_(log_p)
    p = log_p.exp_()
    rows = _row_dot(p, ratio)
    return rows.sum(), p, ratio.sub_(rows).mul_(p)


@DIVERGENCES.register("jsd")
def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Between the two; bounded."""
    q = log_q.exp()
    difference = log_q.sub_(log_p)
    # log m/p = log(b q/p + 1 - b); from the side where the exponential cannot overflow, and exactly 0 where p = q
    small = difference.abs().neg_().expm1_()
    above = torch.log1p(small * (1.0 - beta)).add_(difference)
    to_p = torch.where(difference > 0, above, torch.log1p(small * beta))
    p = log_p.exp_()
    rows = _row_dot(p, to_p)
    value = -(1.0 - beta) * rows.sum() - beta * torch.dot(q.view(-1), (to_p - difference).view(-1))
    return value, p, to_p.neg_().add_(rows).mul_(p).mul_(1.0 - beta)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """(n, C), (n, C) -> (n, 1), without their product."""
    # with `out`, autocast leaves the operands in their dtype
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2), out=a.new_empty(a.shape[0], 1, 1)).squeeze(2)
