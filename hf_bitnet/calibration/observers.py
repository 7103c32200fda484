"""Observers: the range of a stream of tensors, in fixed memory and without host synchronization. Own.

percentile  the value that `percentile` per cent of all magnitudes lie below, from a histogram over float32's own exponent
            and first 7 mantissa bits: relative width below 1 %, whatever the range, nothing to rescale when it grows
ema         exponential moving average of each batch's largest magnitude (arXiv 1712.05877), corrected for its empty start

A range serves a static activation scheme: what lies outside is clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import Registry

# float32 magnitudes without their lowest 16 bits: 8 exponent and 7 mantissa bits
_DROPPED_BITS = 16
_BINS = 2**15


@dataclass(frozen=True)
class ObserverOptions:
    """What the observers can be told.

    Attributes:
        percentile: share of the magnitudes inside the range, above 0 up to 100; 100 is the largest magnitude.
        momentum: weight of the past in the moving average, 0 (the last batch) up to, not including, 1.
    """

    percentile: float = 99.9
    momentum: float = 0.99

    def __post_init__(self) -> None:
        if not _is_number(self.percentile) or not 0.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile must be above 0 and at most 100, got {self.percentile!r}; try percentile=99.9")
        if not _is_number(self.momentum) or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum!r}; try momentum=0.99")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Observer:
    """Watches one stream of tensors."""

    def __init__(self, options: ObserverOptions) -> None:
        self.options = options

    def update(self, magnitude: Tensor, peak: Tensor) -> None:
        """Takes in the magnitudes |x| of one tensor (float32, any shape, not empty) and their maximum (0-dim)."""
        raise AssertionError("abstract")

    def range(self) -> Tensor:
        """The largest magnitude to represent, 0-dim float32, after at least one `update`."""
        raise AssertionError("abstract")


OBSERVERS: Registry[type[Observer]] = Registry("calibration method")


@OBSERVERS.register("percentile")
class Percentile(Observer):
    """See the top of the file. 256 kB a layer; does not depend on the order of the batches."""

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.counts: Tensor | None = None
        self.total = 0

    def update(self, magnitude: Tensor, peak: Tensor) -> None:
        if self.counts is None:
            self.counts = torch.zeros(_BINS, dtype=torch.int64, device=magnitude.device)
            self.one = torch.ones(1, dtype=torch.int64, device=magnitude.device)
            self.peak = peak
        # magnitudes have no sign bit, so their bit patterns are ordered like the numbers (the mask is for NaN)
        bins = (magnitude.flatten().view(torch.int32) >> _DROPPED_BITS) & (_BINS - 1)
        self.counts.index_add_(0, bins, self.one.expand_as(bins))
        self.peak = torch.maximum(self.peak, peak)
        self.total += magnitude.numel()

    def range(self) -> Tensor:
        assert self.counts is not None
        below = self.counts.cumsum(0)
        target = max(1, math.ceil(self.total * (self.options.percentile / 100.0)))
        place = torch.searchsorted(below, torch.full_like(below[:1], target)).clamp(max=_BINS - 1)
        low, high = ((edge.int() << _DROPPED_BITS).view(torch.float32) for edge in (place, place + 1))
        count = self.counts[place]
        inside = (target - below[place] + count) / count.clamp(min=1)  # 0 .. 1 within the bin
        return torch.minimum((low + inside * (high - low)).squeeze(0), self.peak)


@OBSERVERS.register("ema")
class MovingAverage(Observer):
    """See the top of the file. Without the correction the first batch would outweigh a hundred others."""

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.total: Tensor | None = None
        self.weight = 0.0

    def update(self, magnitude: Tensor, peak: Tensor) -> None:
        momentum = self.options.momentum
        self.total = peak * (1 - momentum) if self.total is None else torch.lerp(peak, self.total, momentum)
        self.weight = momentum * self.weight + (1 - momentum)

    def range(self) -> Tensor:
        assert self.total is not None
        return self.total / self.weight
