"""Which kind of GGUF tensor holds a quantized weight exactly: codes unchanged, the scale rounded to half precision once. Own.

A kind is chosen by the grid of levels, by how many weights share a scale, and by the length of a row; never by the name of a
scheme. Leaves out kinds that would round codes again (Q4_K, Q6_K, IQ...): quantizing twice is what this library is not for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ...quantizers import Grid
from . import blocks
from .blocks import Decoder, Encoder, Steps


@dataclass(frozen=True)
class Kind:
    """One type of tensor.

    Attributes:
        name, id: in ggml. file_type: `general.file_type` of a file that is mostly of this kind.
        block, bytes: weights that share a scale, and what they take.
        values: the levels it holds, for people; `holds`: whether these steps are among them.
        encode: None for plain floats. decode: where the package gguf has no decoder.
        scale_dtype: of the scales. tail: bytes behind the last row.
    """

    name: str
    id: int
    file_type: int
    block: int
    bytes: int
    values: str
    holds: Callable[[Steps], bool]
    encode: Encoder | None = None
    decode: Decoder | None = None
    scale_dtype: torch.dtype = torch.float16
    tail: int = 0

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of that shape."""
        return math.prod(shape) // self.block * self.bytes + self.tail

    @property
    def dtype(self) -> torch.dtype:
        """Of plain floats."""
        return _DTYPES[self.name]


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _within(lowest: int, highest: int) -> Callable[[Steps], bool]:
    return lambda steps: lowest <= steps.lowest and steps.highest <= highest


def _exact_in_half(steps: Steps) -> bool:
    """Whether each level times a half-precision number is one again: only powers of two keep its eleven bits."""
    levels = range(steps.lowest, steps.highest + 1, steps.step)
    return all(abs(level).bit_count() <= 1 for level in levels)


_ALL = (
    Kind("Q1_0", 41, 40, 128, 18, "-1, 1", lambda s: (s.lowest, s.step, s.levels) == (-1, 2, 2), blocks.q1_0, blocks.from_q1_0),
    Kind("TQ2_0", 35, 37, 256, 66, "-1, 0, 1", _within(-1, 1), blocks.tq2_0),
    Kind(
        "Q2_K",
        10,
        10,
        256,
        84,
        "four in equal steps",
        lambda s: s.levels <= 4 and s.step <= 15 and 0 <= -s.lowest <= 15,
        blocks.q2_k,
    ),
    Kind("Q2_0", 42, 41, 64, 18, "-1, 0, 1, 2", _within(-1, 2), blocks.q2_0, blocks.from_q2_0),
    Kind("Q4_0", 2, 2, 32, 18, "-8 .. 7", _within(-8, 7), blocks.q4_0),
    Kind("Q8_0", 8, 7, 32, 34, "-128 .. 127", _within(-128, 127), blocks.q8_0),
    Kind("F16", 1, 1, 1, 2, "powers of two", _exact_in_half),
    Kind("F32", 0, 0, 1, 4, "all", lambda s: True, scale_dtype=torch.float32),
    Kind("TQ1_0", 34, 36, 256, 54, "-1, 0, 1", _within(-1, 1), blocks.tq1_0),
    Kind("BF16", 30, 32, 1, 2, "none", lambda s: False),
    Kind("I2_S", 36, 40, 128, 32, "-1, 0, 1", _within(-1, 1), blocks.i2_s, blocks.from_i2_s, torch.float32, 32),
)
KINDS = {kind.name: kind for kind in _ALL}
# the first that fits is the default: few bits first, among equals what runs fast on most machines and is read by most versions
PREFERENCE = ("Q1_0", "TQ2_0", "Q2_K", "Q2_0", "Q4_0", "Q8_0", "F16", "F32")
# what a user may ask for
LEGAL = (*PREFERENCE[:2], "TQ1_0", *PREFERENCE[2:])
# added to ggml in 2026; older programs refuse the file
RECENT = frozenset({"Q1_0", "Q2_0"})


@dataclass(frozen=True)
class Choice:
    """kind: of the tensor. steps: the levels it stores. why: not the kind that was asked for; empty where it is."""

    kind: Kind
    steps: Steps
    why: str = ""


def choose(
    grid: Grid, shape: tuple[int, int], scale_shape: tuple[int, int], asked: str | None, legal: Sequence[str] = PREFERENCE
) -> Choice:
    """The kind of a weight of that shape (out_features, in_features).

    Args:
        asked: the kind to take if it can hold the weight; None takes the first of `legal` that holds its levels.
        legal: in order of preference; the last one holds everything.
    """
    first = asked or next(name for name in legal if stored_steps(KINDS[name], grid) is not None)
    why = ""
    for name in dict.fromkeys((first, *legal)):
        kind, steps = KINDS[name], stored_steps(KINDS[name], grid)
        problem = _problem(kind, steps, shape, scale_shape)
        if steps is not None and problem is None:
            return Choice(kind, steps, why)
        why = why or problem or ""
    raise AssertionError("F32 holds everything")


def _problem(kind: Kind, steps: Steps | None, shape: tuple[int, int], scale_shape: tuple[int, int]) -> str | None:
    if steps is None:
        return f"{kind.name} holds the levels {kind.values} only"
    columns = shape[1]
    if columns % kind.block:
        return f"{kind.name} has blocks of {kind.block}, which do not divide the {columns} input features"
    if kind.tail:
        return None if scale_shape == (1, 1) else f"{kind.name} has one scale for the tensor, here are {math.prod(scale_shape)}"
    group = columns // scale_shape[1]
    if group % kind.block:
        return f"{kind.name} has one scale for {kind.block} weights, here are groups of {group}"
    return None


def stored_steps(kind: Kind, grid: Grid) -> Steps | None:
    """The whole numbers that a kind stores for a grid, or None where it cannot hold it."""
    # half steps become whole ones by a scale of half the size; a negative scale mirrors the grid
    for factor in (1, 2, -1):
        values = sorted(value * factor for value in grid.values)
        if any(value != int(value) for value in values):
            continue
        lowest, second = int(values[0]), int(values[1])
        steps = Steps(lowest, second - lowest, len(values), factor)
        assert all(high - low == steps.step for low, high in pairwise(values)), "grids are uniform"
        if kind.holds(steps):
            return steps
    return None
