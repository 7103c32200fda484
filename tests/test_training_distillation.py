"""The chunked loss against the formula, in values and gradients; zero at equality; memory; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_bitnet import DistillationConfig
from hf_bitnet.training import distill_from_hidden, distill_from_logits
from tests.largest import Largest

TOKENS, HIDDEN, CLASSES = 13, 6, 9


def _case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(CLASSES, HIDDEN, dtype=dtype)
    bias, teacher = torch.randn(CLASSES, dtype=dtype), 2 * torch.randn(TOKENS, CLASSES, dtype=dtype)
    return hidden, weight, bias, teacher, torch.randint(CLASSES, (TOKENS,))


def _config(alpha: float, temperature: float, chunk: int, **more: Any) -> DistillationConfig:
    return DistillationConfig(alpha=alpha, temperature=temperature, chunk_tokens=chunk, **more)


def _formula(
    logits: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, p = (teacher / temperature).softmax(-1), (logits / temperature).softmax(-1)
    kl = (q * (q / p).log()).sum()
    ce = -logits.softmax(-1).log()[torch.arange(len(labels)), labels].sum()
    return alpha * temperature**2 * kl + (1 - alpha) * ce, kl, ce


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_equals_the_formula(alpha: float, temperature: float, chunk: int) -> None:
    hidden, weight, bias, teacher, labels = _case()
    config = _config(alpha, temperature, chunk)
    wanted = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    loss, kl, ce = _formula(F.linear(*wanted), teacher, labels, alpha, temperature)
    (0.7 * loss).backward()

    got = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    sums = distill_from_hidden(*got, teacher.__getitem__, labels, config)
    (0.7 * sums[0]).backward()
    torch.testing.assert_close(sums, torch.stack((loss, kl if alpha > 0 else 0 * kl, ce if alpha < 1 else 0 * ce)))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)

    logits = F.linear(hidden, weight, bias).requires_grad_()
    again = logits.detach().clone().requires_grad_()
    _formula(logits, teacher, labels, alpha, temperature)[0].backward()
    distill_from_logits(again, teacher.__getitem__, labels, config)[0].backward()
    torch.testing.assert_close(again.grad, logits.grad)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_zero_and_no_gradient_at_equality(temperature: float) -> None:
    logits = torch.randn(TOKENS, CLASSES, requires_grad=True)
    sums = distill_from_logits(logits, logits.detach().clone().__getitem__, None, _config(1.0, temperature, 5))
    sums[0].backward()
    assert sums.tolist() == [0.0, 0.0, 0.0]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_no_tokens_give_zero_and_zero_gradients() -> None:
    hidden, weight = torch.randn(0, HIDDEN, requires_grad=True), torch.randn(CLASSES, HIDDEN, requires_grad=True)
    sums = distill_from_hidden(
        hidden, weight, None, torch.zeros(0, CLASSES).__getitem__, torch.zeros(0).long(), _config(0.5, 1.0, 4)
    )
    sums[0].backward()
    assert sums.tolist() == [0.0, 0.0, 0.0]
    assert weight.grad is not None
    assert not weight.grad.any()


def test_bfloat16_autocast_keeps_the_softmax_in_float32() -> None:
    hidden, weight, _, teacher, labels = (tensor.float() if tensor.is_floating_point() else tensor for tensor in _case())
    exact = _formula(F.linear(hidden, weight), teacher, labels, 0.5, 1.0)[0]
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sums = distill_from_hidden(hidden, weight, None, teacher.__getitem__, labels, _config(0.5, 1.0, 4))
    sums[0].backward()
    assert sums.dtype == torch.float32
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(sums[0], exact, rtol=2e-2, atol=0)


def test_memory_holds_one_chunk_of_logits() -> None:
    tokens, hidden, classes, chunk = 64, 4, 50, 8
    x, w = torch.randn(tokens, hidden, requires_grad=True), torch.randn(classes, hidden, requires_grad=True)
    teacher_x, labels = torch.randn(tokens, hidden), torch.randint(classes, (tokens,))
    with Largest() as largest:
        teacher = lambda rows: F.linear(teacher_x[rows], w.detach())  # noqa: E731
        distill_from_hidden(x, w, None, teacher, labels, _config(0.5, 1.0, chunk))[0].backward()
    # the teacher's rows count too; the hidden states were there before
    assert largest.most <= max(chunk // 2 * classes, tokens * hidden) < chunk * classes


def test_second_backward_is_refused() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = distill_from_logits(logits, torch.randn(3, 4).__getitem__, None, _config(1.0, 1.0, 2))[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward"):
        loss.backward()


def test_other_vocabulary_is_refused() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"shape \(1, 5\), the student's \(1, 4\).*resize_token_embeddings\(5\)"):
        distill_from_logits(logits, torch.randn(3, 5).__getitem__, None, _config(1.0, 1.0, 2))
