"""Bytes of GGUF blocks from integer levels, and back. The layouts are ggml's (ggml-common.h) and bitnet.cpp's; the code is own.

A row of K levels is cut into blocks of B. A block holds its levels and one number d in half precision: value = level * d.

    TQ2_0  256  four levels + 1 a byte: byte 32 h + m holds levels 128 h + 32 n + m, n = 0 .. 3 from the lowest bits; d
    TQ1_0  256  five levels + 1 a byte as a number in base 3, times 256 / 243, rounded up; d
    Q2_0    64  d; four neighbours + 1 a byte
    Q1_0   128  d; eight neighbours a byte, 1 for +d and 0 for -d
    Q4_0    32  d; byte j holds levels j and j + 16, + 8 each
    Q8_0    32  d; one level a byte
    Q2_K   256  16 bytes that hold a step and a lowest level for 16 levels each; level indices laid out as in TQ2_0; d twice
    I2_S   128  byte p holds levels p, 32 + p, 64 + p, 96 + p, + 1 each, the first in the highest bits; no d

Encoders work on int8 and uint8, never on floats. The package `gguf` decodes the others, so only Q2_0, Q1_0 and I2_S are decoded
here. Leaves out: which layout a tensor gets (`kinds.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import kernels


class Steps(NamedTuple):
    """The integer levels that a grid is stored as: lowest, lowest + step, ...; `value = level * scale / factor`.

    Attributes:
        factor: what the grid's values were multiplied with to become whole numbers that the target can hold.
    """

    lowest: int
    step: int
    levels: int
    factor: int

    @property
    def highest(self) -> int:
        return self.lowest + self.step * (self.levels - 1)


# levels int8 (R, K), d float16 (R, K / block), the grid's steps -> uint8 (R, bytes of a row)
Encoder = Callable[[Tensor, Tensor, Steps], Tensor]
# uint8 (R, bytes of a row) -> float32 (R, K)
Decoder = Callable[[Tensor], Tensor]

_TRITS = (81, 27, 9, 3, 1)


def tq2_0(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    out, (packed, end) = _blocks(d, 64, 2)
    _quarters(levels, 1, packed)
    end.copy_(_bytes(d))
    return out


def tq1_0(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    out, (first, second, third, end) = _blocks(d, 32, 16, 4, 2)
    blocks = levels.unflatten(1, (-1, 256))
    _trits(blocks[..., :160], 32, first)
    _trits(blocks[..., 160:240], 16, second)
    _trits(blocks[..., 240:], 4, third)
    end.copy_(_bytes(d))
    return out


def q2_0(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    return _neighbours(levels, d, 2, -1, 1, 16)


def q1_0(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    return _neighbours(levels, d, 1, -1, 2, 16)


def q4_0(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    out, (start, packed) = _blocks(d, 2, 16)
    start.copy_(_bytes(d))
    low, high = levels.unflatten(1, (-1, 2, 16)).unbind(2)
    # 16 (high + 8) + (low + 8), modulo 256
    torch.add(low, high, alpha=16, out=packed.view(torch.int8)).sub_(120)
    return out


def q8_0(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    out, (start, packed) = _blocks(d, 2, 32)
    start.copy_(_bytes(d))
    packed.view(torch.int8).copy_(levels.unflatten(1, (-1, 32)))
    return out


def q2_k(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    # value = d step index - d (-lowest)
    out, (scales, packed, ends) = _blocks(d, 16, 64, 4)
    scales.fill_(steps.step | -steps.lowest << 4)
    if steps.step == 1:
        _quarters(levels, -steps.lowest, packed)
    else:
        _quarters(((levels - steps.lowest) // steps.step), 0, packed)
    ends.copy_(_bytes(d).repeat(1, 1, 2))
    return out


def i2_s(levels: Tensor, d: Tensor, steps: Steps) -> Tensor:
    parts = levels.unflatten(1, (-1, 4, 32)).unbind(2)
    total = torch.add(parts[3], parts[2], alpha=4)
    total.add_(parts[1], alpha=16).add_(parts[0], alpha=64).add_(85)
    return total.flatten(1).view(torch.uint8)


def _blocks(d: Tensor, *parts: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Room for rows of blocks, uint8 (R, bytes), and views (R, blocks, n) of the n bytes of each of its `parts`."""
    out = torch.empty(*d.shape, sum(parts), dtype=torch.uint8, device=d.device)
    return out.flatten(1), out.split(parts, dim=2)


def _bytes(d: Tensor) -> Tensor:
    """float16 (R, blocks) -> uint8 (R, blocks, 2)."""
    return d.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _quarters(levels: Tensor, offset: int, out: Tensor) -> None:
    """Levels + offset, 0 .. 3 each, into two bits: those that lie 32 apart in a half block of 128 share a byte."""
    first, second, third, fourth = levels.unflatten(1, (-1, 2, 4, 32)).unbind(3)
    # int8 arithmetic is modulo 256, as that of the bytes it stands for
    total = torch.add(first, second, alpha=4)
    total.add_(third, alpha=16).add_(fourth, alpha=64)
    torch.add(total, _wrapped(85 * offset), out=out.view(torch.int8).unflatten(2, (2, 32)))


def _wrapped(number: int) -> int:
    return (number + 128) % 256 - 128


def _trits(levels: Tensor, apart: int, out: Tensor) -> None:
    """Levels -1 .. 1 that lie `apart` in (R, blocks, n * apart) as one number in base 3, the first in the highest place."""
    parts = levels.unflatten(2, (-1, apart)).unbind(2)
    number = sum(((part + 1).to(torch.int32) * place for part, place in zip(parts, _TRITS, strict=False)), levels.new_zeros(()))
    # floor((256 number + 242) / 243) by a multiplication, exact for the 243 numbers there are
    out.copy_(((number.to(torch.int32) * 256 + 242) * 17261 >> 22).to(torch.uint8))


def _neighbours(levels: Tensor, d: Tensor, bits: int, lowest: int, step: int, bytes_: int) -> Tensor:
    out, (start, packed) = _blocks(d, 2, bytes_)
    start.copy_(_bytes(d))
    packed.copy_(kernels.pack(levels, bits, lowest, step).unflatten(1, (-1, bytes_)))
    return out


# ---- what the package gguf does not decode ----


def from_q2_0(data: Tensor) -> Tensor:
    return _from_neighbours(data, 2, -1, 1, 64)


def from_q1_0(data: Tensor) -> Tensor:
    return _from_neighbours(data, 1, -1, 2, 128)


def from_i2_s(data: Tensor) -> Tensor:
    """Levels, which the one scale behind the last row has yet to multiply."""
    four = torch.embedding(_levels_in(2, -1, 1), data.unflatten(1, (-1, 32)).int())
    return four.flip(3).transpose(2, 3).flatten(1)


def _from_neighbours(data: Tensor, bits: int, lowest: int, step: int, block: int) -> Tensor:
    blocks = data.unflatten(1, (-1, 2 + block * bits // 8))
    d = blocks[..., :2].contiguous().view(torch.float16).float()
    return (torch.embedding(_levels_in(bits, lowest, step), blocks[..., 2:].int()).flatten(2) * d).flatten(1)


@functools.cache
def _levels_in(bits: int, lowest: int, step: int) -> Tensor:
    """float32 (256, 8 / bits): the levels in a byte, those in the lowest bits first."""
    every = torch.arange(256, device="cpu")
    indices = (every[:, None] >> every[:8:bits]) & (1 << bits) - 1
    return (indices * step + lowest).float()
