"""1.58-bit weights: round(w / scale) clipped to -1, 0, 1 (BitNet b1.58, arXiv 2402.17764)."""

from __future__ import annotations

from .scales import Grid
from .weight import WEIGHT_SCHEMES, WeightScheme


@WEIGHT_SCHEMES.register("ternary")
class Ternary(WeightScheme):
    """Codes -1, 0, 1. One scale for the tensor by default: what every file format of BitNet models carries."""

    grid = Grid(lowest=-1, highest=1)
    bits = 1.58
    storage_bits = 2
    default_scale = "absmean"
    default_granularity = "tensor"
