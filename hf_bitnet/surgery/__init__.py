"""Floor 4: the only code that walks a model."""

from .coverage import Coverage, coverage
from .select import choose
from .swap import (
    dequantize_model,
    harden,
    kept_codes,
    make_spec,
    pack_model,
    quantize_model,
    quantized_layers,
    reset_state,
    set_norm_blend,
    set_strength,
    trained_layers,
    unpack_model,
)

__all__ = [
    "Coverage",
    "choose",
    "coverage",
    "dequantize_model",
    "harden",
    "kept_codes",
    "make_spec",
    "pack_model",
    "quantize_model",
    "quantized_layers",
    "reset_state",
    "set_norm_blend",
    "set_strength",
    "trained_layers",
    "unpack_model",
]
