"""Floor 3: the layers."""

from .base import QuantizedLayer, unwrapped
from .bit_linear import BitConv1D, BitLinear, LayerSpec, TrainedLayer
from .embedding import BitEmbedding, EmbeddingSpec, PackedEmbedding, QuantizedEmbedding, plain_embedding, shape_of
from .experts import BitExperts
from .native import NativeBitLinear, NativeLayer, NativeOfflineLinear, NativeOnlineLinear, NativePackedLinear
from .packed_linear import PackedBitLinear
from .sub_norm import SubNorm

__all__ = [
    "BitConv1D",
    "BitEmbedding",
    "BitExperts",
    "BitLinear",
    "EmbeddingSpec",
    "LayerSpec",
    "NativeBitLinear",
    "NativeLayer",
    "NativeOfflineLinear",
    "NativeOnlineLinear",
    "NativePackedLinear",
    "PackedBitLinear",
    "PackedEmbedding",
    "QuantizedEmbedding",
    "QuantizedLayer",
    "SubNorm",
    "TrainedLayer",
    "plain_embedding",
    "shape_of",
    "unwrapped",
]
