"""MLX's affine layout: `value = scale * level + bias` for each run of 32, 64 or 128 inputs. Own; the layout is mlx's.

Levels of 1, 2, 4 or 8 bits lie in uint32 words, the first in the lowest bits. Every grid of this library is such levels
exactly; what is rounded is the scale, to the dtype of the file. The level that is stored as 0 is chosen so that the bias is a
power of two times the scale wherever the bits allow it: then it is rounded with the scale, and the code 0 stays 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..modules import QuantizedEmbedding, QuantizedLayer, shape_of
from ..quantizers import Grid
from .format import Source
from .scales import scale_of

GROUP_SIZES = (128, 64, 32)
BITS = (1, 2, 4, 8)
Layer = QuantizedLayer | QuantizedEmbedding


class Affine(NamedTuple):
    """How one weight is stored.

    Attributes:
        bits, group_size: of a level, and inputs that share a scale.
        lowest: the code of level 0.
    """

    bits: int
    group_size: int
    lowest: int


def affine_of(layer: Layer, group_size: int, min_bits: int) -> Affine | None:
    """The layout of a weight, with the largest groups of at most `group_size`; None where no group size fits."""
    rows, columns = shape_of(layer)
    run = columns // layer.quantizer.scale_shape(rows, columns)[1]  # inputs that share a scale here
    fitting = [size for size in GROUP_SIZES if size <= group_size and run % size == 0]
    if not fitting:
        return None
    grid = layer.quantizer.grid
    bits = next(each for each in BITS if each >= min_bits and grid.levels <= 2**each)
    return Affine(bits, fitting[0], _lowest(grid, bits))


def _lowest(grid: Grid, bits: int) -> int:
    first = [grid.lowest, -(2 ** (bits - 1))]
    for lowest in first:
        offset = abs(lowest - grid.zero_point)
        fits = lowest <= grid.lowest and (grid.highest - lowest) // grid.step < 2**bits
        if fits and math.frexp(offset)[0] == 0.5:
            return lowest
    return grid.lowest


def words(layer: Layer, affine: Affine) -> Iterator[Tensor]:
    """Levels of a layer, some rows at a time: uint32 (n, K * bits / 32)."""
    step = layer.quantizer.grid.step
    for block in Source.blocks(layer):
        yield kernels.pack(block.codes.cpu(), affine.bits, affine.lowest, step).view(torch.uint32)


def levels(layer: Layer, affine: Affine) -> Tensor:
    """All of them, unpacked: uint8 (N, K)."""
    return kernels.pack(layer.quantized_weight().codes.cpu(), 8, affine.lowest, layer.quantizer.grid.step)


def scales(layer: Layer, affine: Affine, dtype: torch.dtype) -> Tensor:
    """(N, K / group_size) in `dtype`: the distance between two levels."""
    return _scale(layer, affine, dtype) * layer.quantizer.grid.step


def biases(layer: Layer, affine: Affine, dtype: torch.dtype) -> Tensor:
    """(N, K / group_size) in `dtype`: the value of level 0."""
    offset = affine.lowest - layer.quantizer.grid.zero_point
    return (_scale(layer, affine, dtype).float() * offset).to(dtype)


def values(layer: Layer, affine: Affine, dtype: torch.dtype) -> Tensor:
    """float32 (N, K): what the scales and biases in `dtype` make of the levels."""
    level = levels(layer, affine).float().unflatten(-1, (-1, affine.group_size))
    scale, bias = (each.float().unsqueeze(-1) for each in (scales(layer, affine, dtype), biases(layer, affine, dtype)))
    return (level * scale + bias).flatten(-2)


def _scale(layer: Layer, affine: Affine, dtype: torch.dtype) -> Tensor:
    (rows, columns), scale = shape_of(layer), scale_of(layer).detach().cpu().to(dtype)
    groups = columns // affine.group_size
    return scale.repeat_interleave(groups // scale.shape[1], dim=1).expand(rows, groups).contiguous()
