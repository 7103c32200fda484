"""Inputs on which every kernel body is compared with `reference.py`. Own.

They hold what breaks kernels: odd and tiny sizes, empty tensors, constant inputs that overflow narrow accumulators,
rows of zeros, non-contiguous views.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SHAPES = ((1, 1, 1), (1, 64, 16), (3, 5, 7), (8, 130, 33), (17, 1031, 9), (64, 256, 48), (0, 8, 4), (4, 2049, 1))


def int_matmul_cases(seed: int = 0) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, a int8 (M, K), b int8 (N, K))."""
    generator = torch.Generator().manual_seed(seed)
    for m, k, n in SHAPES:
        a = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
        b = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
        yield f"random {m}x{k}x{n}", a, b
        yield f"largest {m}x{k}x{n}", torch.full_like(a, -128), torch.full_like(b, -128)
        yield f"opposite {m}x{k}x{n}", torch.full_like(a, 127), torch.full_like(b, -128)
    wide = torch.randint(-128, 128, (6, 80), generator=generator).to(torch.int8)
    yield "strided views", wide[::2, ::2], wide[1::2, ::2]


def row_cases(seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, x float (..., K)) in float32, bfloat16 and float16."""
    generator = torch.Generator().manual_seed(seed)
    for m, k, _ in SHAPES:
        x = torch.randn(m, k, generator=generator)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"random {m}x{k} {dtype}", x.to(dtype)
    yield "zeros", torch.zeros(3, 9)
    yield "outlier", torch.cat([torch.full((2, 7), 1e-3), torch.full((2, 1), 1e4)], dim=1)
    yield "halves", torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    yield "transposed", torch.randn(5, 11, generator=generator).t()
    yield "batched", torch.randn(2, 3, 4, 8, generator=generator)
