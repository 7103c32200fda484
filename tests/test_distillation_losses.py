"""Every divergence, hidden-state loss and the relation loss: values, gradients, zero at equality, chunks, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_bitnet import DistillationConfig
from hf_bitnet.training import distill_from_logits, hidden_loss, relation_loss
from hf_bitnet.training.distillation.divergences import DIVERGENCES
from hf_bitnet.training.distillation.hidden import HIDDEN_LOSSES
from hf_bitnet.training.distillation.logits import TopRows
from tests.largest import Largest

TOKENS, CLASSES = 11, 9


def _divergence(name: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """The definition, for autograd."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    if name == "jsd":
        mixture = beta * q + (1 - beta) * p
        return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    return kl(q, p) if name == "forward" else kl(p, q)


def _buckets(probabilities: Tensor, ids: Tensor) -> Tensor:
    top = probabilities.gather(1, ids)
    return torch.cat((top, 1 - top.sum(dim=1, keepdim=True)), dim=1)


# ---- outputs ----


@pytest.mark.parametrize("name", DIVERGENCES.names())
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 1.0), (0.6, 2.5)])
def test_divergence_equals_autograd(name: str, beta: float, alpha: float, temperature: float) -> None:
    teacher, labels = 3 * torch.randn(TOKENS, CLASSES, dtype=torch.float64), torch.randint(CLASSES, (TOKENS,))
    logits = (2 * torch.randn(TOKENS, CLASSES, dtype=torch.float64)).requires_grad_()
    again = logits.detach().clone().requires_grad_()
    wanted = _divergence(name, (logits / temperature).softmax(-1), (teacher / temperature).softmax(-1), beta)
    loss = alpha * temperature**2 * wanted + (1 - alpha) * F.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    for chunk in (4, 64):
        again.grad = None
        config = DistillationConfig(alpha=alpha, divergence=name, beta=beta, temperature=temperature, chunk_tokens=chunk)
        sums = distill_from_logits(again, teacher.__getitem__, labels, config)
        sums[0].backward()
        torch.testing.assert_close(sums[:2], torch.stack((loss, wanted)))
        torch.testing.assert_close(again.grad, logits.grad)


@pytest.mark.parametrize("name", DIVERGENCES.names())
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_exactly_zero_at_equality(name: str, temperature: float) -> None:
    logits = (10 * torch.randn(TOKENS, CLASSES)).requires_grad_()
    config = DistillationConfig(alpha=1.0, divergence=name, temperature=temperature, chunk_tokens=3)
    sums = distill_from_logits(logits, logits.detach().clone().__getitem__, None, config)
    sums[0].backward()
    assert sums.abs().tolist() == [0.0, 0.0, 0.0]
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("name", DIVERGENCES.names())
def test_sure_and_opposite_distributions_stay_finite(name: str) -> None:
    student = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0, 200.0], [300.0, 0.0, 0.0]])
    sums = distill_from_logits(student, teacher.__getitem__, None, DistillationConfig(alpha=1.0, divergence=name))
    sums[0].backward()
    assert sums[1] > (0.5 if name == "jsd" else 100.0)
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES.names())
@pytest.mark.parametrize(("alpha", "temperature", "k"), [(1.0, 1.0, 3), (0.4, 2.0, 1), (0.4, 1.0, CLASSES - 1)])
def test_top_k_with_the_rest_equals_autograd(name: str, alpha: float, temperature: float, k: int) -> None:
    teacher, labels = 3 * torch.randn(TOKENS, CLASSES, dtype=torch.float64), torch.randint(CLASSES, (TOKENS,))
    q = (teacher / temperature).softmax(-1)
    ids = q.topk(k).indices
    rows = TopRows(ids, _buckets(q, ids).log())
    logits = (2 * torch.randn(TOKENS, CLASSES, dtype=torch.float64)).requires_grad_()
    again = logits.detach().clone().requires_grad_()
    kl = _divergence(name, _buckets((logits / temperature).softmax(-1), ids), _buckets(q, ids), 0.5)
    (alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(logits, labels, reduction="sum")).backward()
    config = DistillationConfig(alpha=alpha, divergence=name, temperature=temperature, chunk_tokens=4)
    sums = distill_from_logits(again, lambda some: TopRows(rows.ids[some], rows.log_probs[some]), labels, config)
    sums[0].backward()
    torch.testing.assert_close(sums[1], kl)
    torch.testing.assert_close(again.grad, logits.grad)


def test_top_k_of_all_tokens_is_the_whole_divergence() -> None:
    """The rest is then impossible, and its logarithm minus infinity, for both."""
    teacher, logits = torch.randn(TOKENS, CLASSES), torch.randn(TOKENS, CLASSES, requires_grad=True)
    log_q, ids = teacher.log_softmax(-1).sort(descending=True)
    rows = TopRows(ids, torch.cat((log_q, torch.full((TOKENS, 1), -math.inf)), dim=1))
    config = DistillationConfig(alpha=1.0)
    sums = distill_from_logits(logits, lambda some: TopRows(rows.ids[some], rows.log_probs[some]), None, config)
    torch.testing.assert_close(sums[1], distill_from_logits(logits, teacher.__getitem__, None, config)[1])
    sums[0].backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - teacher.softmax(-1))


# ---- hidden states ----


def _plain_hidden(name: str, s: Tensor, t: Tensor, delta: float) -> Tensor:
    if name == "cosine":
        return 1 - F.cosine_similarity(s, t, dim=-1)
    return (F.mse_loss if name == "mse" else lambda *a, **b: F.huber_loss(*a, delta=delta, **b))(s, t, reduction="none").mean(
        -1
    )


@pytest.mark.parametrize("name", HIDDEN_LOSSES.names())
def test_hidden_loss_equals_autograd(name: str) -> None:
    teacher, weights = torch.randn(2, 5, 7, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    student = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    again = student.detach().clone().requires_grad_()
    wanted = (weights * _plain_hidden(name, student, teacher, 0.5)).sum()
    (0.7 * wanted).backward()
    got = hidden_loss(again, teacher, weights, name, 0.5)
    (0.7 * got).backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(again.grad, student.grad)


@pytest.mark.parametrize("name", HIDDEN_LOSSES.names())
def test_hidden_loss_is_exactly_zero_at_equality(name: str) -> None:
    student = torch.randn(2, 5, 7, requires_grad=True)
    loss = hidden_loss(student, student.detach().clone(), torch.ones(2, 5), name)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize("name", HIDDEN_LOSSES.names())
def test_hidden_loss_of_a_zero_vector_is_finite(name: str) -> None:
    student = torch.zeros(1, 2, 4, requires_grad=True)
    hidden_loss(student, torch.zeros(1, 2, 4), torch.ones(1, 2), name).backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"are 4 wide, the teacher's 6.*DistillationConfig\(relations=\{\}\)"):
        hidden_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, 6), torch.ones(1, 2), "mse")


# ---- relations ----


def _relations(
    s: Tensor, t: Tensor, heads: int, weights: Tensor, exists: Tensor | None, normalize: bool, temperature: float
) -> Tensor:
    """The definition, with the whole matrices."""

    def relation(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        x = F.normalize(x, dim=-1) if normalize else x / x.shape[-1] ** 0.25
        scores = x @ x.mT / temperature
        if exists is not None:
            scores = scores.masked_fill(~exists[:, None, None, :], -math.inf)
        return scores.softmax(-1)

    p, q = relation(s), relation(t)
    kl = (q * (q.clamp_min(1e-300) / p.clamp_min(1e-300)).log()).sum(-1)
    return (kl.mean(1) * weights).sum()


@pytest.mark.parametrize(("normalize", "temperature"), [(True, 1.0), (False, 1.0), (True, 0.2)])
@pytest.mark.parametrize("padded", [False, True])
def test_relations_equal_autograd(normalize: bool, temperature: float, padded: bool) -> None:
    batch, length, heads = 3, 7, 2
    teacher, weights = torch.randn(batch, length, 12, dtype=torch.float64), torch.rand(batch, length, dtype=torch.float64)
    exists = torch.ones(batch, length, dtype=torch.bool)
    exists[0, 4:] = exists[1, :2] = False
    weights = weights * exists
    keys = exists if padded else None
    student = torch.randn(batch, length, 8, dtype=torch.float64, requires_grad=True)
    again = student.detach().clone().requires_grad_()
    wanted = _relations(student, teacher, heads, weights, keys, normalize, temperature)
    (0.7 * wanted).backward()
    assert wanted > 1e-3
    for chunk in (1, 3, 7, 10, 14, 1000):
        again.grad = None
        got = relation_loss(
            again, teacher, heads, weights, keys, normalize=normalize, temperature=temperature, chunk_rows=chunk
        )
        (0.7 * got).backward()
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(again.grad, student.grad)


def test_relations_are_exactly_zero_at_equality() -> None:
    student = torch.randn(2, 6, 8, requires_grad=True)
    loss = relation_loss(student, student.detach().clone(), 2, torch.ones(2, 6), chunk_rows=5)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()


def test_relations_under_autocast_stay_float32() -> None:
    student, teacher = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 8)
    exact = relation_loss(student, teacher, 2, torch.ones(2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relation_loss(student, teacher, 2, torch.ones(2, 6)), exact)


def test_relations_never_hold_a_whole_matrix() -> None:
    batch, length, heads, width, chunk = 2, 128, 4, 16, 32
    student, teacher = torch.randn(batch, length, width, requires_grad=True), torch.randn(batch, length, width)
    with Largest() as largest:
        relation_loss(student, teacher, heads, torch.ones(batch, length), chunk_rows=chunk).backward()
    assert largest.most <= max(chunk * length, batch * length * width)
    assert largest.most < length * length  # not even of one head


def test_heads_have_to_divide() -> None:
    with pytest.raises(ValueError, match="the teacher's state is 10 wide, which 4 heads do not divide"):
        relation_loss(torch.zeros(1, 2, 8), torch.zeros(1, 2, 10), 4, torch.ones(1, 2))
