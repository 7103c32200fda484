"""What a model IS: plain data, saved in its config.json. Floor 3, beside the modules; the two do not know each other."""

from .layer import LayerConfig
from .native import NativeBitNetConfig
from .quantization import (
    CONFIG_VERSION,
    FOREIGN_LINEAR_CLASS,
    FORMS,
    KEEP,
    NATIVE_LOADING,
    NATIVE_METHOD,
    QUANT_METHOD,
    STORAGES,
    BitNetQuantizationConfig,
)

__all__ = [
    "CONFIG_VERSION",
    "FOREIGN_LINEAR_CLASS",
    "FORMS",
    "KEEP",
    "NATIVE_LOADING",
    "NATIVE_METHOD",
    "QUANT_METHOD",
    "STORAGES",
    "BitNetQuantizationConfig",
    "LayerConfig",
    "NativeBitNetConfig",
]
