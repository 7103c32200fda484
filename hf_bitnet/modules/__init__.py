"""Floor 3: the layers."""

from .base import QuantizedLayer
from .bit_linear import BitConv1D, BitLinear, LayerSpec, TrainedLayer
from .native import NativeBitLinear, NativeLayer, NativeOfflineLinear, NativeOnlineLinear, NativePackedLinear
from .packed_linear import PackedBitLinear
from .sub_norm import SubNorm

__all__ = [
    "BitConv1D",
    "BitLinear",
    "LayerSpec",
    "NativeBitLinear",
    "NativeLayer",
    "NativeOfflineLinear",
    "NativeOnlineLinear",
    "NativePackedLinear",
    "PackedBitLinear",
    "QuantizedLayer",
    "SubNorm",
    "TrainedLayer",
]
