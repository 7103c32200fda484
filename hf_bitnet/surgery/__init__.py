"""Floor 4: the only code that walks a model."""

from .coverage import Coverage, coverage
from .probing import each_batch, probing, run
from .select import choose
from .swap import (
    check_calibrated,
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
    "check_calibrated",
    "choose",
    "coverage",
    "dequantize_model",
    "each_batch",
    "harden",
    "kept_codes",
    "make_spec",
    "pack_model",
    "probing",
    "quantize_model",
    "quantized_layers",
    "reset_state",
    "run",
    "set_norm_blend",
    "set_strength",
    "trained_layers",
    "unpack_model",
]
