"""Relaxations: exactly the weight at strength 0, exactly the quantized value at 1, differentiable in both."""

from __future__ import annotations

import pytest
import torch

from hf_bitnet.relaxations import RELAXATIONS

each_relaxation = pytest.mark.parametrize("name", RELAXATIONS.names())


@each_relaxation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_at_both_ends(name: str, dtype: torch.dtype) -> None:
    relax = RELAXATIONS.get(name)
    # far apart: value + 1 * (quantized - value) would lose the small one
    value = (torch.randn(64, 33) * torch.logspace(-6, 4, 33)).to(dtype)
    quantized = torch.randn(64, 33).to(dtype)
    for strength, expected in ((0.0, value), (1.0, quantized)):
        mixed = relax(value, quantized, torch.tensor(strength))
        assert torch.equal(mixed, expected) and mixed.dtype == dtype


@each_relaxation
def test_gradients(name: str) -> None:
    relax = RELAXATIONS.get(name)
    value, quantized = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for strength in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert torch.autograd.gradcheck(lambda v, q: relax(v, q, torch.tensor(strength)), (value, quantized))  # noqa: B023


@each_relaxation
def test_between_the_ends_it_lies_between(name: str) -> None:
    relax = RELAXATIONS.get(name)
    value, quantized = torch.zeros(100), torch.ones(100)
    mixes = torch.stack([relax(value, quantized, torch.tensor(strength)) for strength in (0.0, 0.1, 0.5, 0.9, 1.0)])
    assert (mixes.diff(dim=0) >= 0).all()


def test_linear_is_the_straight_mix() -> None:
    value, quantized = torch.randn(2, 50, dtype=torch.float64)
    mixed = RELAXATIONS.get("linear")(value, quantized, torch.tensor(0.25))
    torch.testing.assert_close(mixed, 0.75 * value + 0.25 * quantized)
