"""The operation `packed_experts` by itself: more rows than fit at once, operands that do not belong together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bitnet import kernels
from hf_bitnet.kernels import Layout, RowQuantization
from tests.cpu_kernels import needs_cpu_kernels

pytestmark = needs_cpu_kernels
LAYOUT, ROWS = Layout(2, -1), RowQuantization(-128, 127, 1e-5)


@pytest.mark.parametrize(("tokens", "k", "experts", "chosen"), [(1500, 64, 2, 1), (1300, 32, 3, 2), (4200, 4092, 3, 2)])
@torch.no_grad()
def test_many_rows(tokens: int, k: int, experts: int, chosen: int) -> None:
    """More rows of one expert than are multiplied together, and more than are quantized together."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        (torch.randint(0, 171, (5, -(-k // 4)), dtype=torch.uint8, generator=generator), torch.rand(1, 1) + 0.1, torch.randn(5))
        for _ in range(experts)
    ]
    x, index = torch.randn(tokens, k, generator=generator), torch.randint(0, experts, (tokens, chosen), generator=generator)
    (y,) = kernels.packed_experts(x, index, [weights], LAYOUT, ROWS, torch.float32)
    for number, weight in enumerate(weights):
        at = (index.reshape(-1) == number).nonzero().squeeze(1)
        assert torch.equal(y[at], kernels.packed_linear(x[at // chosen], *weight, LAYOUT, ROWS, torch.float32))


def weight(n: int = 3, k: int = 8) -> tuple[Tensor, Tensor, None]:
    return torch.zeros(n, k // 4, dtype=torch.uint8), torch.ones(1, 1), None


@pytest.mark.parametrize(
    ("x", "index", "maps", "message"),
    [
        (torch.ones(8), torch.zeros(1, 1, dtype=torch.int64), [[weight()]], "a matrix"),
        (torch.ones(2, 8), torch.zeros(1, 1, dtype=torch.int64), [[weight()]], r"int64 \(1, 1\) fits no x \(2, 8\)"),
        (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int32), [[weight()]], "int32"),
        (torch.ones(2, 8), torch.zeros(2, dtype=torch.int64), [[weight()]], "int64 \\(2,\\)"),
        (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), [[weight(), weight()], [weight()]], "every map"),
        (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), [[weight(), weight(4)]], "not alike"),
        (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), [[weight(3, 16)]], r"8 inputs need \(outputs, 2\)"),
        (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int64), [], "every map"),
    ],
)
def test_wrong_operands(x: Tensor, index: Tensor, maps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.packed_experts(x, index, maps, LAYOUT, ROWS, torch.float32)
