"""Inputs on which every kernel body is compared with `reference.py`. Own.

They hold what breaks kernels: odd and tiny sizes, empty tensors, constant inputs that overflow narrow accumulators,
rows of zeros, views with strange strides. `CASES` has them for every operation of the dispatch table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .reference import Layout, RowQuantization

# (M, K, N)
SHAPES = (
    *((1, 1, 1), (3, 1, 5), (5, 7, 1), (1, 64, 16), (3, 5, 7), (8, 130, 33)),
    *((17, 1031, 9), (64, 256, 48), (0, 8, 4), (4, 2049, 1)),
)
# (bits, lowest code, highest code, step) of every packed layout
LAYOUTS = ((1, -1, 1, 2), (2, -1, 1, 1), (2, -2, 1, 1), (4, -7, 7, 1), (4, -8, 7, 1), (8, -127, 127, 1), (8, -128, 127, 1))
# zero points that schemes use; of 1.58-bit weights none
ZERO_POINTS = (0.0, -0.5)
# rows of the input of a packed product: none, row-vector forms, matrix forms, with remainders
PACKED_ROWS = (0, 1, 2, 5, 8, 9, 17, 64)
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


def fixed_matmul_cases(seed: int = 0) -> Iterator[Case]:
    """a, a_scale, codes, zero_point, scale, dtype: as rows and as a transposed view, below and above the smallest size."""
    generator = torch.Generator().manual_seed(seed)
    for m, k, n in (*SHAPES, (65, 70, 67), (130, 129, 33), (9, 1100, 40)):
        a, codes = torch.randn(m, k, generator=generator), _codes(generator, k, n)
        a_scale, scale = torch.rand(k, generator=generator) + 0.1, torch.rand(1, 1, generator=generator) + 0.1
        for dtype in DTYPES:
            yield f"{m}x{k}x{n} {dtype}", (a.to(dtype), None, codes, 0.0, scale, dtype)
            yield f"{m}x{k}x{n} {dtype} transposed", (a.t().contiguous().t().to(dtype), a_scale, codes, -0.5, None, dtype)
        yield f"{m}x{k}x{n} zeros", (torch.zeros(m, k), a_scale.view(-1, 1), codes, 0.0, scale, torch.bfloat16)


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
    yield "batched, turned", torch.randn(6, 2, 5, generator=generator).permute(1, 2, 0)
    yield "a batch of one, turned", torch.randn(1, 6, 5, generator=generator).transpose(1, 2)


def quantize_columns_cases(seed: int = 0) -> Iterator[Case]:
    """x, factor, qmin, qmax, eps. Of gradients, which may be small; there is a token at least."""
    for name, rows, factor in _flat_rows(seed):
        if not rows.shape[0]:
            continue
        yield name, (rows, None, -127, 127, 1e-30)
        yield f"times a factor, {name}", (rows * 1e-12 if rows.dtype != torch.float16 else rows, factor, -127, 127, 1e-30)


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


def mean_magnitudes_cases(seed: int = 0) -> Iterator[Case]:
    """rows."""
    for name, x in row_cases(seed):
        yield name, (x,)


def scale_rows_cases(seed: int = 0) -> Iterator[Case]:
    """x, scale, dtype."""
    for name, rows, scale in _flat_rows(seed):
        yield name, (rows, scale, rows.dtype)
        yield f"codes {name}", ((rows * 20).clamp(-128, 127).to(torch.int8), scale, torch.bfloat16)


def pack_cases(seed: int = 0) -> Iterator[Case]:
    """codes, bits, lowest, step."""
    generator = torch.Generator().manual_seed(seed)
    for bits, lowest, highest, step in LAYOUTS:
        for rows, columns in ((1, 1), (3, 5), (4, 7), (2, 8), (5, 33), (64, 130), (0, 9)):
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


def _stored(bits: int, rows: int, columns: int, generator: torch.Generator, level: int | None = None) -> Tensor:
    """Bytes of a packed weight; every level is `level` when it is given."""
    size = (rows, -(-columns * bits // 8))
    if level is None:
        return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return torch.full(size, sum(level << shift for shift in range(0, 8, bits)), dtype=torch.uint8)


def _packed_weights(seed: int) -> Iterator[tuple[str, int, Layout, Tensor, Tensor, Tensor | None]]:
    """(name, M, layout, packed, scale, bias) of products with packed weights; K is a multiple of the groups."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, 1, 1), (7, 5, 1), (64, 16, 4), (130, 33, 5), (515, 21, 1), (384, 34, 6), (1031, 9, 1), (96, 66, 1))
    for i, (bits, lowest, highest, step) in enumerate(LAYOUTS):
        top = min(2**bits - 1, 127 - lowest)
        for j, (k, n, groups) in enumerate(sizes):
            layout = Layout(bits, lowest, step, ZERO_POINTS[(i + j) % 2])
            level = (None, None, 0, top)[(i + j) % 4]
            packed = _stored(bits, n, k, generator, level)
            if bits == 8 and lowest != -128:
                packed = packed.clamp(max=highest - lowest)
            bias = None if j % 3 else torch.randn(n, generator=generator)
            for shape in dict.fromkeys(((1, 1), (n, 1), (n, groups))):
                scale = (torch.rand(shape, generator=generator) + 0.1) * 1e-3  # float16 has to hold the sums
                m = PACKED_ROWS[(i + 3 * j + len(shape) + shape[-1]) % len(PACKED_ROWS)]
                yield f"{layout}, {m}x{k}x{n}, scale {shape}, level {level}", m, layout, packed, scale, bias


def packed_linear_cases(seed: int = 0) -> Iterator[Case]:
    """x, packed, scale, bias, layout, rows, dtype."""
    generator = torch.Generator().manual_seed(seed)
    schemes = (RowQuantization(-128, 127, 1e-5), RowQuantization(-8, 7, 1e-5))
    for i, (name, m, layout, packed, scale, bias) in enumerate(_packed_weights(seed)):
        k = _inputs(packed, layout, name)
        dtype, out = DTYPES[i % 3], DTYPES[i // 3 % 3]
        x = torch.randn(m, k, generator=generator) if i % 4 else torch.full((m, k), -3.0)
        yield f"{name}, {dtype} to {out}", (x.to(dtype), packed, scale, bias, layout, schemes[i % 2], out)
    wide = torch.randn(9, 80, generator=generator)
    packed, scale = _stored(2, 6, 32, generator), torch.rand(1, 1, generator=generator)
    for name, x in (("strided", wide[::2, 8:40]), ("every other", wide[:, ::2][:, :32]), ("float64", wide[:3, :32].double())):
        yield name, (x, packed, scale, None, Layout(2, -1), schemes[0], torch.float32)
    strided = _stored(2, 12, 64, generator)[::2, 4:12]
    yield "weight rows apart", (wide[:1, :32], strided, scale, None, Layout(2, -1), schemes[0], torch.float32)
    for m in (1, 9):
        yield f"no outputs, {m} rows", (wide[:m, :32], packed[:0], scale, None, Layout(2, -1), schemes[0], torch.float32)


def _inputs(packed: Tensor, layout: Layout, name: str) -> int:
    """K, which a case's name has: bytes alone do not tell it."""
    k = int(name.split("x")[1])
    assert packed.shape[1] == -(-k * layout.bits // 8)
    return k


def packed_linears_cases(seed: int = 0) -> Iterator[Case]:
    """x, weights, layout, rows, dtype."""
    for name, (x, packed, scale, bias, layout, rows, dtype) in packed_linear_cases(seed):
        half = packed.shape[0] // 2
        first = (packed[:half], scale[:half] if scale.shape[0] > 1 else scale, None)
        weights = [first, (packed, scale, bias)] if half else [(packed, scale, bias)]
        if scale.shape[1] > 1:
            weights.append((packed, scale[:, :1].contiguous(), None))
        yield name, (x, weights, layout, rows, dtype)


def packed_experts_cases(seed: int = 0) -> Iterator[Case]:
    """x, index, maps, layout, rows, dtype: few and many rows, experts that nobody or everybody chose, none."""
    generator = torch.Generator().manual_seed(seed)
    schemes = (RowQuantization(-128, 127, 1e-5), RowQuantization(-8, 7, 1e-5))
    sizes = ((64, 16, 1, 3, 2), (130, 33, 1, 5, 1), (256, 40, 4, 4, 3), (7, 5, 1, 2, 2), (384, 20, 6, 9, 4))
    tokens = (1, 3, 8, 9, 70, 0, 2, 33)
    for i, (bits, lowest, highest, step) in enumerate(LAYOUTS):
        for j, (k, n, groups, experts, chosen) in enumerate(sizes):
            layout, t = Layout(bits, lowest, step, ZERO_POINTS[(i + j) % 2]), tokens[(3 * i + j) % len(tokens)]
            shape = ((1, 1), (n, 1), (n, groups))[(i + 2 * j) % 3]
            maps = []
            for outputs, columns in ((n, shape[1]), (n + 3, 1))[: 1 + j % 2]:
                weights = []
                for _ in range(experts):
                    packed = _stored(bits, outputs, k, generator)
                    if bits == 8 and lowest != -128:
                        packed = packed.clamp(max=highest - lowest)
                    scale = torch.rand((outputs if shape[0] > 1 else 1, columns), generator=generator) + 0.1
                    weights.append((packed, scale * 1e-3, torch.randn(outputs, generator=generator) if j % 3 == 0 else None))
                maps.append(weights)
            index = torch.randint(0, experts, (t, chosen), generator=generator)
            if j % 2:
                index[t // 2 :] = 0
            elif t > 1:
                index[0, 0], index[1, 0] = experts, -1
            x = torch.randn(t, k, generator=generator).to(DTYPES[i % 3])
            name = f"{layout}, {t} rows, {k} to {n}, {chosen} of {experts} experts, scale {shape}"
            yield name, (x, index, maps, layout, schemes[(i + j) % 2], DTYPES[(i + j) % 3])


def packed_int_linear_cases(seed: int = 0) -> Iterator[Case]:
    """x_codes, x_scale, x_zero, packed, scale, bias, layout, dtype."""
    generator = torch.Generator().manual_seed(seed)
    for i, (name, m, layout, packed, scale, bias) in enumerate(_packed_weights(seed)):
        k = _inputs(packed, layout, name)
        x = torch.full((m, k), -128, dtype=torch.int8) if i % 3 == 0 else _codes(generator, m, k)
        x_scale = (torch.rand(m, 1, generator=generator) + 0.1) * 0.1
        x_zero = torch.randint(-128, 128, (m, 1), generator=generator).float() if i % 2 else None
        yield f"{name}, zero points {i % 2}", (x, x_scale, x_zero, packed, scale, bias, layout, DTYPES[i % 3])


def _grouped_weights(seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight (N, K), scale (1, 1), (N, 1) or (N, G))."""
    generator = torch.Generator().manual_seed(seed)
    for i, (n, k, groups) in enumerate(((1, 1, 1), (3, 7, 7), (5, 130, 10), (64, 96, 3), (33, 1031, 1), (2, 8, 2), (0, 6, 2))):
        weight = torch.randn(n, k, generator=generator).to(DTYPES[i % 3])
        for shape in dict.fromkeys(((1, 1), (n, 1), (n, groups))):
            yield f"{n}x{k}, scale {shape}", weight, torch.rand(shape, generator=generator) + 0.05


def quantize_pack_cases(seed: int = 0) -> Iterator[Case]:
    """weight, scale, qmin, qmax, layout."""
    for name, weight, scale in _grouped_weights(seed):
        for i, (bits, lowest, highest, step) in enumerate(LAYOUTS):
            if step == 1:
                layout = Layout(bits, lowest, step, ZERO_POINTS[i % 2])
                yield f"{name}, {layout}", (weight, scale, lowest, highest, layout)
    columns = torch.randn(40, 9, generator=torch.Generator().manual_seed(seed)).t()
    yield "transposed", (columns, torch.ones(1, 1), -1, 1, Layout(2, -1))


def sign_pack_cases(seed: int = 0) -> Iterator[Case]:
    """weight, threshold."""
    for name, weight, scale in _grouped_weights(seed):
        yield name, (weight, scale - 0.5)
        yield f"{name}, ties", (torch.zeros_like(weight), torch.zeros_like(scale))


def norm_quantize_rows_cases(seed: int = 0) -> Iterator[Case]:
    """x, norm_weight, norm_eps, qmin, qmax, eps. A mean that is summed in another order may move a code at a tie by 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in row_cases(seed):
        gain = torch.rand(x.shape[-1], generator=generator) + 0.5
        yield name, (x, gain.to(x.dtype), 1e-6, -128, 127, 1e-5)
        yield f"{name}, gain float32", (x, gain, 1e-5, -8, 7, 1e-5)


def rms_norm_cases(seed: int = 0) -> Iterator[Case]:
    """x, weight, eps."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in row_cases(seed):
        yield name, (x, torch.randn(x.shape[-1], generator=generator).to(x.dtype), 1e-6)


def rotate_cases(seed: int = 0) -> Iterator[Case]:
    """q, k, cos, sin: as projections lie in memory (heads beside each other), and as a copy."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, 1, 4, 2, 64), (2, 7, 4, 4, 32), (2, 3, 3, 1, 6), (1, 5, 2, 2, 40), (1, 300, 8, 2, 64), (0, 3, 2, 1, 8))
    for batch, tokens, heads, groups, size in sizes:
        q, k = (torch.randn(batch, tokens, n, size, generator=generator).transpose(1, 2) for n in (heads, groups))
        for angles in {batch, 1}:
            cos, sin = (torch.randn(angles, tokens, size, generator=generator) for _ in range(2))
            name = f"{batch}x{tokens}, {heads} and {groups} of {size}, angles {angles}"
            for dtype in DTYPES:
                yield f"{name} {dtype}", (q.to(dtype), k.to(dtype), cos.to(dtype), sin.to(dtype))
            yield f"{name} contiguous", (q.contiguous(), k.contiguous(), cos, sin)
            yield f"{name} no neighbours", (q.mT.contiguous().mT, k.mT.contiguous().mT, cos, sin)


def pack_trits_cases(seed: int = 0) -> Iterator[Case]:
    """codes."""
    generator = torch.Generator().manual_seed(seed)
    for n, k in ((1, 1), (3, 4), (2, 5), (4, 11), (7, 130), (64, 1031), (0, 6)):
        yield f"{n}x{k}", ((torch.randint(0, 3, (n, k), generator=generator) - 1).to(torch.int8),)
        yield f"all 1, {n}x{k}", (torch.ones(n, k, dtype=torch.int8),)


def unpack_trits_cases(seed: int = 0) -> Iterator[Case]:
    """packed, in_features."""
    generator = torch.Generator().manual_seed(seed)
    for name, (codes,) in pack_trits_cases(seed):
        size = (codes.shape[0], -(-codes.shape[1] // 5))
        yield name, (torch.randint(0, 243, size, generator=generator, dtype=torch.uint8), codes.shape[1])


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "int_matmul": int_matmul_cases,
    "int_linear": int_linear_cases,
    "fixed_matmul": fixed_matmul_cases,
    "quantize_rows": quantize_rows_cases,
    "mean_magnitudes": mean_magnitudes_cases,
    "quantize_weight": quantize_weight_cases,
    "quantize_sign": quantize_sign_cases,
    "scale_rows": scale_rows_cases,
    "pack": pack_cases,
    "unpack": unpack_cases,
    "packed_linear": packed_linear_cases,
    "packed_linears": packed_linears_cases,
    "packed_experts": packed_experts_cases,
    "packed_int_linear": packed_int_linear_cases,
    "quantize_pack": quantize_pack_cases,
    "sign_pack": sign_pack_cases,
    "quantize_columns": quantize_columns_cases,
    "norm_quantize_rows": norm_quantize_rows_cases,
    "rms_norm": rms_norm_cases,
    "rotate": rotate_cases,
    "pack_trits": pack_trits_cases,
    "unpack_trits": unpack_trits_cases,
}
