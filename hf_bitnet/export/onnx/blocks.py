"""How one quantized matrix lies in the blocks of onnxruntime's operators MatMulNBits and GatherBlockQuantized.

    value = (q - zero) scale        q of 2, 4 or 8 bits, a scale for each block of inputs

from the operators' schema (onnxruntime, docs/ContribOperators.md). Ours is value = (code - zero_point) scale with fewer scales,
so that a scale is repeated over its blocks, and levels of whole numbers become q = level + 2^(bits - 1), the operators' own
zero. Half levels (-1.5 .. 1.5) have a float zero, or are doubled under half the scale, which is exact too. Own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import kernels
from ...quantizers import Grid, Quantized, WeightQuantizer

BITS = (2, 4, 8)
# every onnxruntime has kernels for these; 16 only where groups of that size ask for it
_BLOCKS = (128, 64, 32)
_GROUPED = (*_BLOCKS, 16)


@dataclass(frozen=True)
class Blocks:
    """The layout of a matrix (rows, columns), padded to `count` blocks a row.

    Attributes:
        bits: of q. block: columns that share a scale.
        factor, shift: q = code * factor + shift + 2^(bits - 1), and the scale is divided by `factor`.
        zero: what q means 0 where that is a float; None for 2^(bits - 1), which needs no tensor.
        why: why `bits` are more than the codes have, where nobody asked for it.
    """

    rows: int
    columns: int
    bits: int
    block: int
    factor: int
    shift: int
    zero: float | None
    why: str = ""

    @property
    def count(self) -> int:
        return -(-self.columns // self.block)

    @property
    def kind(self) -> str:
        return f"{self.bits} bits in blocks of {self.block}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the packed matrix: (rows, blocks, bytes of a block)."""
        return self.rows, self.count, self.block * self.bits // 8

    def pack(self, quantized: Quantized) -> Tensor:
        """Rows of the matrix, codes int8 (n, columns) -> uint8 (n, blocks, bytes of a block), the first of a byte lowest."""
        levels = quantized.codes
        if (self.factor, self.shift) != (1, 0):
            levels = levels * self.factor + self.shift
        levels = F.pad(levels, (0, self.count * self.block - self.columns))
        return kernels.pack(levels, self.bits, -(2 ** (self.bits - 1)), 1).view(-1, *self.shape[1:])

    def scales(self, quantized: Quantized, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix, scale (1, 1), (n, 1) or (n, groups) -> (n * blocks,), rounded once to `dtype`.

        Raises ValueError when it cannot hold one.
        """
        scale = (quantized.scale.detach().float() / self.factor).to(dtype)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError(f"a scale is outside of {dtype}; export with dtype='float32'")
        return scale.repeat_interleave(self.count // scale.shape[1], dim=1).expand(len(quantized.codes), -1).reshape(-1)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """(rows * blocks,), only where `zero` is a float."""
        assert self.zero is not None
        return torch.full((self.rows * self.count,), self.zero, dtype=dtype, device="cpu")


def plan(quantizer: WeightQuantizer, rows: int, columns: int, *, min_bits: int, float_zero: bool) -> Blocks:
    """The smallest exact layout for a matrix (rows, columns) of this quantizer.

    Args:
        min_bits: at least so many. float_zero: whether the operator takes one.

    Raises ValueError when there is none.
    """
    grid = quantizer.grid
    smallest = next((bits for bits in BITS if 2**bits >= grid.levels), BITS[-1])
    for bits in BITS:
        how = _fit(grid, bits, float_zero) if bits >= min_bits else None
        if how is not None:
            why = _WHY if bits > max(smallest, min_bits) else ""
            return Blocks(rows, columns, bits, _block(quantizer, rows, columns, bits), *how, why)
    raise ValueError(
        f"its {grid.levels} levels {grid.values[0]:g} .. {grid.values[-1]:g} are no whole or half numbers of {BITS[-1]} bits; "
        "quantize with another weight scheme"
    )


_WHY = "its levels are half numbers, which this operator holds doubled"


def _fit(grid: Grid, bits: int, float_zero: bool) -> tuple[int, int, float | None] | None:
    """factor, shift and zero of the layout that holds this grid in `bits`; None where there is none."""
    half = 2 ** (bits - 1)
    for factor in (1, 2):
        levels = [level * factor for level in grid.values]
        if all(level.is_integer() and -half <= level < half for level in levels):
            return factor, round(-grid.zero_point * factor), None
    # 8 bits take no float zero
    if float_zero and bits < BITS[-1] and grid.highest - grid.lowest < 2**bits:
        return 1, -half - grid.lowest, grid.zero_point - grid.lowest
    return None


def _block(quantizer: WeightQuantizer, rows: int, columns: int, bits: int) -> int:
    groups = quantizer.scale_shape(rows, columns)[1]
    if groups == 1:
        # a scale has 4 bytes: the block that makes the shortest rows, with padding
        return min(_BLOCKS, key=lambda block: -(-columns // block) * (block * bits // 8 + 4))
    size = columns // groups
    legal = [block for block in _GROUPED if size % block == 0]
    if not legal:
        raise ValueError(
            f"its scales are for groups of {size} inputs, the operator's blocks have {', '.join(map(str, _GROUPED[::-1]))}; "
            "quantize with a group_size that one of these divides, for example group_size=64, or granularity='channel'"
        )
    return legal[0]
