"""What an initializer of the graph holds, made piece by piece when it is written. Own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Filled(NamedTuple):
    """A tensor that is going to be made.

    Attributes:
        name: in the model. dtype, shape: as it is stored.
        pieces: makes its numbers in order, in tensors of any shape.
        weights: float weights it stands for, which the progress counts.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]
    weights: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
