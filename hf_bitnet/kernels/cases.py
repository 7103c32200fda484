"""Inputs on which every kernel body is compared with `reference.py`. Own.

They hold what breaks kernels: odd and tiny sizes, empty tensors, constant inputs that overflow narrow accumulators,
rows of zeros, views with strange strides. `CASES` has them for every operation of the dispatch table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# (M, K, N)
SHAPES = (
    *((1, 1, 1), (3, 1, 5), (5, 7, 1), (1, 64, 16), (3, 5, 7), (8, 130, 33)),
    *((17, 1031, 9), (64, 256, 48), (0, 8, 4), (4, 2049, 1)),
)
# (bits, lowest code, highest code, step) of every packed layout
LAYOUTS = ((1, -1, 1, 2), (2, -1, 1, 1), (2, -2, 1, 1), (4, -7, 7, 1), (4, -8, 7, 1), (8, -127, 127, 1), (8, -128, 127, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# name, arguments of the operation
Case = tuple[str, tuple[Any, ...]]


def _codes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


def int_matmul_cases(seed: int = 0) -> Iterator[Case]:
    """a int8 (M, K), b int8 (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    for m, k, n in SHAPES:
        a, b = _codes(generator, m, k), _codes(generator, n, k)
        yield f"random {m}x{k}x{n}", (a, b)
        yield f"largest {m}x{k}x{n}", (torch.full_like(a, -128), torch.full_like(b, -128))
        yield f"opposite {m}x{k}x{n}", (torch.full_like(a, 127), torch.full_like(b, -128))
    wide = _codes(generator, 6, 80)
    yield "strided views", (wide[::2, ::2], wide[1::2, ::2])
    yield "transposed", (wide[:, :9].t(), wide[:, 20:40].t())
    yield "expanded", (wide[:1].expand(4, 80), wide[:, :1].expand(6, 80))


def int_linear_cases(seed: int = 0) -> Iterator[Case]:
    """x_codes, x_scale, x_zero, w_codes, w_scale, w_zero, bias, dtype."""
    generator = torch.Generator().manual_seed(seed)
    for m, k, n in SHAPES:
        x, w = _codes(generator, m, k), _codes(generator, n, k)
        x_scale = torch.rand(m, 1, generator=generator) + 0.1
        x_zero = torch.randint(-128, 128, (m, 1), generator=generator).float()
        bias = torch.randn(n, generator=generator)
        groups = next(g for g in (8, 5, 3, 1) if k % g == 0)
        for shape in ((1, 1), (n, 1), (n, groups)):
            w_scale = torch.rand(shape, generator=generator) + 0.1
            name = f"{m}x{k}x{n} scale {shape}"
            yield name, (x, x_scale, None, w, w_scale, 0.0, None, torch.float32)
            yield f"{name} zero points", (x, x_scale, x_zero, w, w_scale, -0.5, bias, torch.float32)
            yield f"{name} bfloat16", (x, x_scale, None, w, w_scale, 0.0, bias.bfloat16(), torch.bfloat16)


def quantize_rows_cases(seed: int = 0) -> Iterator[Case]:
    """x, qmin, qmax, eps."""
    for name, x in row_cases(seed):
        yield f"int8 {name}", (x, -128, 127, 1e-5)
        yield f"int4 {name}", (x, -8, 7, 1e-5)


def row_cases(seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, x float (..., K)) in float32, bfloat16 and float16."""
    generator = torch.Generator().manual_seed(seed)
    for m, k, _ in SHAPES:
        x = torch.randn(m, k, generator=generator)
        for dtype in DTYPES:
            yield f"random {m}x{k} {dtype}", x.to(dtype)
    yield "zeros", torch.zeros(3, 9)
    yield "outlier", torch.cat([torch.full((2, 7), 1e-3), torch.full((2, 1), 1e4)], dim=1)
    yield "halves", torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    yield "transposed", torch.randn(5, 11, generator=generator).t()
    yield "batched", torch.randn(2, 3, 4, 8, generator=generator)


def _flat_rows(seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, rows (R, n), scale (R, 1)): what weights are reshaped to."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, x in row_cases(seed):
        rows = x.reshape(-1, x.shape[-1]) if x.numel() else x
        yield name, rows, torch.rand(rows.shape[0], 1, generator=generator) + 0.05


def quantize_weight_cases(seed: int = 0) -> Iterator[Case]:
    """rows, scale, zero_point, qmin, qmax, dtype."""
    for name, rows, scale in _flat_rows(seed):
        yield f"ternary {name}", (rows, scale, 0.0, -1, 1, torch.int8)
        yield f"shifted {name}", (rows, scale, -0.5, -2, 1, torch.int8)
        yield f"int8 as bfloat16 {name}", (rows, scale, 0.0, -127, 127, torch.bfloat16)


def quantize_sign_cases(seed: int = 0) -> Iterator[Case]:
    """rows, threshold, dtype."""
    for name, rows, _ in _flat_rows(seed):
        yield name, (rows, rows.float().mean(dim=-1, keepdim=True), torch.int8)
        yield f"float {name}", (rows, torch.zeros(()), torch.float32)


def scale_rows_cases(seed: int = 0) -> Iterator[Case]:
    """x, scale, dtype."""
    for name, rows, scale in _flat_rows(seed):
        yield name, (rows, scale, rows.dtype)
        yield f"codes {name}", ((rows * 20).clamp(-128, 127).to(torch.int8), scale, torch.bfloat16)


def scale_all_cases(seed: int = 0) -> Iterator[Case]:
    """x, scale, dtype."""
    for name, rows, _ in _flat_rows(seed):
        for shape in ((), (1,), (1, 1)):
            scale = torch.full(shape, 0.0371)
            yield f"{name}, scale {shape}", (rows, scale, rows.dtype)
            yield f"{name}, scale {shape}, wider", (rows.to(torch.bfloat16), scale, torch.float32)


def pack_cases(seed: int = 0) -> Iterator[Case]:
    """codes, bits, lowest, step."""
    generator = torch.Generator().manual_seed(seed)
    for bits, lowest, highest, step in LAYOUTS:
        for rows, columns in ((1, 1), (3, 5), (4, 7), (2, 8), (5, 33), (64, 130)):
            levels = torch.randint(0, (highest - lowest) // step + 1, (rows, columns), generator=generator)
            yield f"{bits} bits from {lowest}, {rows}x{columns}", ((levels * step + lowest).to(torch.int8), bits, lowest, step)


def unpack_cases(seed: int = 0) -> Iterator[Case]:
    """packed, bits, lowest, step, in_features."""
    generator = torch.Generator().manual_seed(seed)
    for name, (codes, bits, lowest, step) in pack_cases(seed):
        # any byte can be stored; the padding may hold anything
        size = (codes.shape[0], -(-codes.shape[1] * bits // 8))
        packed = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        if bits < 8 or lowest == -128:  # a byte above the highest level would not fit into int8
            yield name, (packed, bits, lowest, step, codes.shape[1])


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "int_matmul": int_matmul_cases,
    "int_linear": int_linear_cases,
    "quantize_rows": quantize_rows_cases,
    "quantize_weight": quantize_weight_cases,
    "quantize_sign": quantize_sign_cases,
    "scale_rows": scale_rows_cases,
    "scale_all": scale_all_cases,
    "pack": pack_cases,
    "unpack": unpack_cases,
}
