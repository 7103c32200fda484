"""2-, 4- and 8-bit weights on uniform grids.

int2      two's complement, -2, -1, 0, 1
int2_seq  four symmetric levels -1.5, -0.5, 0.5, 1.5: the SEQ grid of ParetoQ (arXiv 2502.02631)
int4      -7 .. 7: symmetric, so that no value is lost by negation
int8      -127 .. 127
"""

from __future__ import annotations

from .scales import Grid
from .weight import WEIGHT_SCHEMES, WeightScheme


@WEIGHT_SCHEMES.register("int2")
class Int2(WeightScheme):
    """Codes -2, -1, 0, 1."""

    grid = Grid(lowest=-2, highest=1)
    bits = 2
    storage_bits = 2
    default_scale = "least_squares"


@WEIGHT_SCHEMES.register("int2_seq")
class Int2Seq(WeightScheme):
    """Codes -2, -1, 0, 1 that stand for -1.5, -0.5, 0.5, 1.5 scales."""

    grid = Grid(lowest=-2, highest=1, zero_point=-0.5)
    bits = 2
    storage_bits = 2
    default_scale = "least_squares"


@WEIGHT_SCHEMES.register("int4")
class Int4(WeightScheme):
    """Codes -7 .. 7."""

    grid = Grid(lowest=-7, highest=7)
    bits = 4
    storage_bits = 4
    default_scale = "absmax"


@WEIGHT_SCHEMES.register("int8")
class Int8(WeightScheme):
    """Codes -127 .. 127."""

    grid = Grid(lowest=-127, highest=127)
    bits = 8
    storage_bits = 8
    default_scale = "absmax"
