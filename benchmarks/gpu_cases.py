"""Random inputs for the operations of the dispatch table: what `kernels/cases.py` has by hand, at sizes nobody chose. Own.

Half of the sizes are multiples of 64, where kernels take their fast paths; sizes are drawn by their logarithm, so that small
ones and those of one row come too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_bitnet.kernels import Layout, RowQuantization
from hf_bitnet.kernels.cases import DTYPES, LAYOUTS

_ROWS = RowQuantization(-128, 127, 1e-5)


class Draw:
    """Random numbers, sizes and choices of one case."""

    def __init__(self, seed: int, largest: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.largest = largest
        self.m, self.k, self.n = (self.size() for _ in range(3))
        self.dtype: torch.dtype = self.pick(DTYPES)

    def index(self, count: int) -> int:
        return int(torch.randint(0, count, (), generator=self.generator))

    def pick(self, choices: Any) -> Any:
        return choices[self.index(len(choices))]

    def size(self) -> int:
        size = round(math.exp(float(torch.rand((), generator=self.generator)) * math.log(self.largest)))
        return -(-size // 64) * 64 if self.index(2) else size

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) + 0.1

    def codes(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=self.generator).to(torch.int8)

    def scale(self) -> Tensor:
        """Of one of the granularities: (1, 1), (n, 1) or (n, groups)."""
        groups = self.pick([g for g in range(1, 65) if self.k % g == 0])
        return self.positive(*self.pick([(1, 1), (self.n, 1), (self.n, groups)])) * 1e-3

    def bias(self) -> Tensor | None:
        return self.pick([None, self.normal(self.n)])

    def layout(self) -> tuple[Layout, int, int]:
        """A layout, its lowest and its highest code."""
        bits, lowest, highest, step = self.pick(LAYOUTS)
        return Layout(bits, lowest, step, self.pick([0.0, -0.5])), lowest, highest

    def packed(self) -> tuple[Tensor, Layout]:
        """Bytes of a weight (n, k) whose levels are all legal."""
        layout, lowest, highest = self.layout()
        packed = torch.randint(0, 256, (self.n, -(-self.k * layout.bits // 8)), generator=self.generator, dtype=torch.uint8)
        return packed.clamp(max=highest - lowest) if layout.bits == 8 else packed, layout


def _int_matmul(draw: Draw) -> tuple[Any, ...]:
    return draw.codes(draw.m, draw.k), draw.codes(draw.n, draw.k)


def _x_zero(draw: Draw) -> Tensor | None:
    return draw.pick([None, draw.codes(draw.m, 1).float()])


def _int_linear(draw: Draw) -> tuple[Any, ...]:
    x, w = draw.codes(draw.m, draw.k), draw.codes(draw.n, draw.k)
    zero = draw.pick([0.0, -0.5])
    return x, draw.positive(draw.m, 1) * 0.1, _x_zero(draw), w, draw.scale(), zero, draw.bias(), draw.dtype


def _packed_linear(draw: Draw) -> tuple[Any, ...]:
    packed, layout = draw.packed()
    x = draw.normal(draw.m, draw.k).to(draw.dtype)
    return x, packed, draw.scale(), draw.bias(), layout, _ROWS, draw.pick(DTYPES)


def _packed_linears(draw: Draw) -> tuple[Any, ...]:
    x, packed, scale, bias, layout, rows, dtype = _packed_linear(draw)
    half = max(1, draw.n // 2)
    return x, [(packed, scale, bias), (packed[:half], scale[:half], None)], layout, rows, dtype


def _packed_experts(draw: Draw) -> tuple[Any, ...]:
    packed, layout = draw.packed()
    scale, experts = draw.scale(), draw.pick([1, 3, 16])
    weights = [(packed.flip(0) if i % 2 else packed.clone(), scale * (i + 1), draw.normal(draw.n)) for i in range(experts)]
    chosen = draw.pick([1, 2, 5])
    index = torch.randint(-1, experts + 1, (draw.m, chosen), generator=draw.generator)
    x = draw.normal(draw.m, draw.k).to(draw.dtype)
    return x, index, [weights] * draw.pick([1, 2]), layout, _ROWS, draw.pick(DTYPES)


def _packed_int_linear(draw: Draw) -> tuple[Any, ...]:
    packed, layout = draw.packed()
    x_scale = draw.positive(draw.m, 1) * 0.1
    return draw.codes(draw.m, draw.k), x_scale, _x_zero(draw), packed, draw.scale(), draw.bias(), layout, draw.dtype


def _fixed_matmul(draw: Draw) -> tuple[Any, ...]:
    a = draw.pick([draw.normal(draw.m, draw.k), draw.normal(draw.k, draw.m).t()]).to(draw.dtype)
    scales = draw.pick([(None, draw.positive(1, 1)), (draw.positive(draw.k) * 0.1, None)])
    return a, scales[0], draw.codes(draw.k, draw.n), draw.pick([0.0, -0.5]), scales[1], draw.dtype


def _rows(draw: Draw) -> Tensor:
    return draw.normal(draw.m, draw.k).to(draw.dtype)


def _norm_quantize_rows(draw: Draw) -> tuple[Any, ...]:
    return _rows(draw), draw.positive(draw.k).to(draw.dtype), 1e-6, *_ROWS


def _quantize_weight(draw: Draw) -> tuple[Any, ...]:
    low, high = draw.pick([(-1, 1), (-2, 1), (-7, 7), (-127, 127)])
    return _rows(draw), draw.positive(draw.m, 1), draw.pick([0.0, -0.5]), low, high, torch.int8


def _quantize_pack(draw: Draw) -> tuple[Any, ...]:
    layout, lowest, highest = draw.layout()
    while layout.step != 1:
        layout, lowest, highest = draw.layout()
    return draw.normal(draw.n, draw.k).to(draw.dtype), draw.scale() * 1e3, lowest, highest, layout


def _pack(draw: Draw) -> tuple[Any, ...]:
    bits, lowest, highest, step = draw.pick(LAYOUTS)
    levels = torch.randint(0, (highest - lowest) // step + 1, (draw.n, draw.k), generator=draw.generator)
    return (levels * step + lowest).to(torch.int8), bits, lowest, step


def _unpack(draw: Draw) -> tuple[Any, ...]:
    packed, layout = draw.packed()
    return packed, layout.bits, layout.lowest, layout.step, draw.k


MAKERS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "int_matmul": _int_matmul,
    "int_linear": _int_linear,
    "packed_linear": _packed_linear,
    "packed_linears": _packed_linears,
    "packed_experts": _packed_experts,
    "packed_int_linear": _packed_int_linear,
    "fixed_matmul": _fixed_matmul,
    "quantize_rows": lambda draw: (_rows(draw), *_ROWS),
    "norm_quantize_rows": _norm_quantize_rows,
    "mean_magnitudes": lambda draw: (_rows(draw),),
    "quantize_weight": _quantize_weight,
    "quantize_sign": lambda draw: (_rows(draw), draw.positive(draw.m, 1) - 0.5, torch.int8),
    "scale_rows": lambda draw: (_rows(draw), draw.positive(draw.m, 1), draw.dtype),
    "quantize_pack": _quantize_pack,
    "sign_pack": lambda draw: (draw.normal(draw.n, draw.k), draw.scale() - 0.5e-3),
    "pack": _pack,
    "unpack": _unpack,
}


def random_case(operation: str, seed: int, largest: int) -> tuple[str, tuple[Any, ...]]:
    """(name, arguments) of one random case; sizes up to about `largest`."""
    draw = Draw(seed, largest)
    args = MAKERS[operation](draw)
    return f"random {draw.m}x{draw.k}x{draw.n}, seed {seed}", args
