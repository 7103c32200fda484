"""Attention relations: the KL divergence between two softmaxes of x_i . x_j, a block of rows at a time.

MiniLMv2 (arXiv 2012.15828) and BitDistill (arXiv 2510.13998) compare, for queries, keys and values, how alike the tokens of a
sequence are to each other. For a head with vectors x (S, d), scores a = x x^T / T:

    R = softmax(a)      loss = sum_i w_i KL(R_teacher,i || R_student,i)      dloss/da = w (R_student - R_teacher)

The scores are symmetric in x, so dloss/dx = (dloss/da) x + (dloss/da)^T x. Forward makes loss and gradient together, block by
block: nothing of the size heads x S x S ever exists, and nothing but the gradient by x is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORTEST = 1e-12


class _Relation(torch.autograd.Function):
    """x of student and teacher (G, S, d), weights of rows (G, S), which keys exist: bool (G, S) or None -> 0-dim sum."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, exists: Tensor | None, temperature: float, chunk: int
    ) -> Tensor:
        total = student.new_zeros(())
        by_student = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for groups, rows in _blocks(student.shape[0], student.shape[1], chunk):
            hidden = None if exists is None else exists[groups].logical_not().unsqueeze(1)
            weight = weights[groups, rows].unsqueeze(2)
            log_p = _log_relation(student[groups], rows, hidden, temperature)
            log_q = _log_relation(teacher[groups], rows, hidden, temperature)
            q = log_q.exp()
            total += (log_q.sub_(log_p).mul_(q) * weight).sum()
            if by_student is None:
                continue
            by_scores = log_p.exp_().sub_(q).mul_(weight / temperature)
            by_student[groups, rows].baddbmm_(by_scores, student[groups])
            by_student[groups].baddbmm_(by_scores.mT, student[groups, rows])
        ctx.gradient = by_student
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = None if ctx.gradient is None else ctx.gradient * grads[0]
        return gradient, None, None, None, None, None


def _blocks(groups: int, rows: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of (group, row) pairs, at most `chunk` of them (at least one row)."""
    together = max(1, chunk // rows)
    step = min(chunk, rows)
    for first in range(0, groups, together):
        for start in range(0, rows, step):
            yield slice(first, min(first + together, groups)), slice(start, min(start + step, rows))


def _log_relation(x: Tensor, rows: slice, hidden: Tensor | None, temperature: float) -> Tensor:
    some = x[:, rows]
    # with `out`, as in place, autocast leaves the operands in float32
    scores = torch.bmm(some, x.mT, out=x.new_empty(*some.shape[:2], x.shape[1])).div_(temperature)
    if hidden is not None:
        # finite, so that differences of two of them are numbers; e to it is exactly 0
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min / 4)
    return torch.log_softmax(scores, dim=-1)


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    heads: int,
    weights: Tensor,
    exists: Tensor | None = None,
    *,
    normalize: bool = True,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
) -> Tensor:
    """Sum over tokens of the mean over heads.

    Args:
        student, teacher: one state of both, float (B, S, F) and (B, S, F'), each divisible by `heads`.
        weights: of the rows (tokens), (B, S); those that do not count have 0.
        exists: bool (B, S), False for padding, which no token is compared with.
        normalize, temperature, chunk_rows: as in `Relations`.

    Returns:
        float32 0-dim (float64 for float64), with gradient by `student`.

    Raises:
        ValueError: a width is not divisible by `heads`.
    """
    for whose, state in (("student", student), ("teacher", teacher)):
        if state.shape[-1] % heads:
            raise ValueError(
                f"relations: the {whose}'s state is {state.shape[-1]} wide, which {heads} heads do not divide; "
                "choose `heads` so that it divides every width, or leave it out"
            )
    x, y = (_split(state, heads, normalize) for state in (student, teacher.detach()))
    each = (weights.to(x.dtype) / heads).repeat_interleave(heads, dim=0)
    keys = None if exists is None else exists.repeat_interleave(heads, dim=0)
    return _Relation.apply(x, y, each, keys, temperature, chunk_rows)


def _split(state: Tensor, heads: int, normalize: bool) -> Tensor:
    """(B, S, heads * d) -> (B * heads, S, d), scaled so that x . x is the score."""
    state = state if state.dtype == torch.float64 else state.float()
    batch, length, width = state.shape
    x = state.reshape(batch, length, heads, width // heads).transpose(1, 2).reshape(batch * heads, length, width // heads)
    if normalize:
        return torch.nn.functional.normalize(x, dim=-1, eps=_SHORTEST)
    return x * (width // heads) ** -0.25
