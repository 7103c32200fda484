"""Floor 3: the layers."""

from .base import QuantizedLayer
from .bit_linear import BitConv1D, BitLinear, LayerSpec, TrainedLayer
from .packed_linear import PackedBitLinear
from .sub_norm import SubNorm

__all__ = ["BitConv1D", "BitLinear", "LayerSpec", "PackedBitLinear", "QuantizedLayer", "SubNorm", "TrainedLayer"]
