"""Distillation loss over chunks of tokens: no full logits tensor of teacher or student is ever alive. Own.

For one token with teacher logits t, student logits s, label y, temperature T (Hinton et al., arXiv 1503.02531):

    loss      = alpha T^2 D(softmax(t / T), softmax(s / T)) + (1 - alpha) CE(s, y)
    dloss/ds  = alpha T D'(s / T) + (1 - alpha) (softmax(s) - onehot(y))

D and D' are in `divergences.py`. The derivative is as cheap as the loss, so forward computes both, chunk by chunk, and carries
the gradient on to the hidden states and the head at once: one pass, nothing recomputed (the idea of Liger's fused losses, arXiv
2410.10989).
Sums over tokens are returned; the caller divides. Leaves out: who the teacher is, which tokens count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import kernels
from .config import DistillationConfig
from .divergences import DIVERGENCES


class TopRows(NamedTuple):
    """The likeliest tokens of a teacher whose logits are on disk, and all others as one outcome.

    ids: int64 (n, k), different in a row. log_probs: float (n, k + 1) at the temperature of the loss, the last for the rest.
    """

    ids: Tensor
    log_probs: Tensor


# slice of tokens -> teacher logits (n, V), or what is known of them
TeacherRows = Callable[[slice], Tensor | TopRows]
MAIN, KL, CE = 0, 1, 2
# log of a probability that is as good as none; its exponential is far from underflow
_NONE = -60.0


def chunk_loss(
    student: Tensor, teacher: Tensor | TopRows | None, labels: Tensor | None, config: DistillationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over n tokens, and the gradient.

    Args:
        student, teacher: logits (n, V), float32 or float64; a teacher may be `TopRows`, and None when alpha is 0.
        labels: int64 (n,), all legal classes; None only when alpha is 1.

    Returns:
        The divergence at the temperature (0-dim, without its weight; 0 when alpha is 0), CE (0-dim; 0 when alpha is 1), and
        the derivative of the loss by the student's logits (n, V).
    """
    alpha, temperature = config.alpha, config.temperature
    kl = ce = student.new_zeros(())
    gradient = p = None
    if alpha > 0.0:
        assert teacher is not None
        log_p = _log_softmax(student, temperature)
        if temperature == 1.0:
            ce = _cross_entropy(log_p, labels, alpha)
        against = _against_top if isinstance(teacher, TopRows) else _against_logits
        kl, p, gradient = against(log_p, teacher, config)  # type: ignore[arg-type]
        gradient.mul_(alpha * temperature)
    if alpha == 1.0:
        assert gradient is not None
        return kl, ce, gradient
    if p is None or temperature != 1.0:
        log_p = torch.log_softmax(student, dim=-1)
        ce = _cross_entropy(log_p, labels, alpha)
        p = log_p.exp_()
    gradient = p.mul_(1.0 - alpha) if gradient is None else gradient.add_(p, alpha=1.0 - alpha)
    assert labels is not None
    gradient.scatter_add_(1, labels.unsqueeze(1), gradient.new_full((labels.shape[0], 1), alpha - 1.0))
    return kl, ce, gradient


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _cross_entropy(log_p: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
    if alpha == 1.0:
        return log_p.new_zeros(())
    assert labels is not None
    return -log_p.gather(1, labels.unsqueeze(1)).sum()


def _against_logits(log_p: Tensor, teacher: Tensor, config: DistillationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence, p and the derivative by the student's logits over T. Overwrites log_p."""
    return DIVERGENCES.get(config.divergence)(log_p, _log_softmax(teacher, config.temperature), config.beta)


def _against_top(log_p: Tensor, teacher: TopRows, config: DistillationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The same over k + 1 outcomes: the derivative by the rest is shared out among its tokens as their probabilities are."""
    top = log_p.gather(1, teacher.ids)
    rest = log_p.scatter(1, teacher.ids, -torch.inf).logsumexp(dim=1, keepdim=True).clamp_min_(_NONE)
    # a teacher that was rounded on disk: its outcomes sum to 1 again
    log_q = torch.log_softmax(teacher.log_probs.to(log_p.dtype).clamp_min(_NONE), dim=-1)
    kl, _, by_outcome = DIVERGENCES.get(config.divergence)(torch.cat((top, rest), dim=1), log_q, config.beta)
    p = log_p.exp_()
    gradient = p * (by_outcome[:, -1:] / rest.exp())
    return kl, p, gradient.scatter_(1, teacher.ids, by_outcome[:, :-1])


def _wide(logits: Tensor) -> Tensor:
    """float64 stays; everything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _Settings:
    """What both functions below take besides tensors that carry gradient."""

    def __init__(self, teacher: TeacherRows | None, labels: Tensor | None, config: DistillationConfig) -> None:
        self.teacher, self.labels, self.config = teacher, labels, config

    def slices(self, tokens: int) -> list[slice]:
        # a teacher's rows of logits stand beside the student's: half as many tokens keep the memory of the labels alone
        alone = self.teacher is None or self.config.alpha == 0.0
        chunk = self.config.chunk_tokens if alone else max(1, self.config.chunk_tokens // 2)
        return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]

    def loss(self, rows: slice, student: Tensor) -> tuple[Tensor, Tensor]:
        """(3,) sums of these tokens, and the gradient by their logits (n, V)."""
        teacher = None if self.teacher is None or self.config.alpha == 0.0 else self.teacher(rows)
        if isinstance(teacher, Tensor):
            if teacher.shape != student.shape:
                raise ValueError(
                    f"the teacher's logits have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}: both need "
                    "the same tokens and the same vocabulary. Choose a teacher with the student's tokenizer, or resize one "
                    f"of the two: student.resize_token_embeddings({teacher.shape[-1]})"
                )
            teacher = _wide(teacher)
        labels = None if self.labels is None else self.labels[rows]
        kl, ce, gradient = chunk_loss(_wide(student), teacher, labels, self.config)
        return self.weigh(kl, ce), gradient

    def weigh(self, kl: Tensor, ce: Tensor) -> Tensor:
        alpha = self.config.alpha
        return torch.stack((alpha * self.config.temperature**2 * kl + (1.0 - alpha) * ce, kl, ce))


class _FromHidden(torch.autograd.Function):
    """hidden (N, H), head weight (V, H), bias (V,) or None -> (3,). Gradients are made in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
        dtype = kernels.autocast_dtype(hidden)
        x, w = hidden.to(dtype), weight.to(dtype)
        needs = ctx.needs_input_grad
        by_hidden = torch.zeros_like(x) if needs[0] else None
        # summed in the weight's own dtype: bfloat16 sums over many chunks would lose small terms
        by_weight = torch.zeros_like(weight) if needs[1] else None
        by_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
        sums = _wide(hidden.new_zeros(3))
        for rows in settings.slices(x.shape[0]):
            part, gradient = settings.loss(
                rows, torch.nn.functional.linear(x[rows], w, None if bias is None else bias.to(dtype))
            )
            sums += part
            gradient = gradient.to(dtype)
            if by_hidden is not None:
                torch.mm(gradient, w, out=by_hidden[rows])
            if by_weight is not None:
                _add_product(by_weight, gradient, x[rows])
            if by_bias is not None:
                by_bias += gradient.sum(dim=0)
        ctx.gradients, ctx.dtype = (by_hidden, by_weight, by_bias), hidden.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_hidden, by_weight, by_bias = _take(ctx, grads[0][MAIN])
        return None if by_hidden is None else by_hidden.to(ctx.dtype), by_weight, by_bias, None


class _FromLogits(torch.autograd.Function):
    """logits (N, V) -> (3,). The gradient takes one tensor of the size of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, settings: _Settings) -> Tensor:
        by_logits = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums = _wide(logits.new_zeros(3))
        for rows in settings.slices(logits.shape[0]):
            part, gradient = settings.loss(rows, logits[rows])
            sums += part
            if by_logits is not None:
                by_logits[rows] = gradient
        ctx.gradients = (by_logits,)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*_take(ctx, grads[0][MAIN]), None)


def _add_product(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """total (V, H) += gradient (n, V)^T x (n, H)."""
    if total.dtype == x.dtype:
        total.addmm_(gradient.t(), x)
    else:
        total += gradient.t() @ x


def _take(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients times `scale`, in place: they are not needed twice, and a copy of the head's would be large."""
    if ctx.gradients is None:
        raise RuntimeError("the distillation loss was already differentiated; call backward() once per forward")
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(None if gradient is None else gradient.mul_(scale) for gradient in gradients)


def distill_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: TeacherRows | None,
    labels: Tensor | None,
    config: DistillationConfig,
) -> Tensor:
    """The loss of a student whose logits are `hidden @ weight.T + bias`, without making them all.

    Args:
        hidden: float (N, H), last hidden states of the tokens that count.
        weight, bias: of the output embeddings, (V, H) and (V,) or None.
        teacher: gives the teacher's logits (n, V), or `TopRows`, of a slice of tokens; None only when alpha is 0.
        labels: int64 (N,); None only when alpha is 1.

    Returns:
        float32 (3,): the weighted loss, the divergence and CE, each summed over tokens. Only the first carries gradient.
    """
    return _FromHidden.apply(hidden, weight, bias, _Settings(teacher, labels, config))


def distill_from_logits(
    logits: Tensor, teacher: TeacherRows | None, labels: Tensor | None, config: DistillationConfig
) -> Tensor:
    """The same loss from logits (N, V) that exist already. Returns float32 (3,), see `distill_from_hidden`."""
    return _FromLogits.apply(logits, _Settings(teacher, labels, config))
