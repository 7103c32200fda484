"""1-bit weights: the sign around the mean, scaled by the mean magnitude (BitNet, arXiv 2310.11453)."""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from .scales import SMALLEST_SCALE, Grid, _mean
from .weight import WEIGHT_SCHEMES, WeightScheme


@WEIGHT_SCHEMES.register("binary")
class Binary(WeightScheme):
    """Codes -1 and +1; +1 where the weight is at least the mean of its group."""

    grid = Grid(lowest=-1, highest=1, step=2)
    bits = 1
    storage_bits = 1
    default_scale = "absmean"

    @classmethod
    def codes(cls, rows: Tensor, scale: Tensor) -> Tensor:
        return kernels.quantize_sign(rows, _mean(rows))

    @classmethod
    def packed(cls, weight: Tensor, scale: Tensor) -> Tensor:
        return kernels.sign_pack(weight, _mean(cls.rows(weight, scale)).reshape(scale.shape))

    @classmethod
    def position(cls, rows: Tensor, scale: Tensor) -> Tensor:
        return ((rows - _mean(rows)) * scale.reciprocal() + 1) / 2

    @classmethod
    def scale(cls, rows: Tensor, rule: str) -> Tensor:
        if rule in ("least_squares", "learned"):
            # the codes do not depend on the scale, so the best scale is the plain projection on them
            signs = cls.codes(rows, rows)
            return _mean(rows * signs).clamp(min=SMALLEST_SCALE)
        return super().scale(rows, rule)
