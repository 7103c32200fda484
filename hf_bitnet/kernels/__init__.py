"""Floor 1: operations on plain tensors. `reference` defines them, `dispatch` picks a body."""

from .dispatch import (
    autocast_dtype,
    bodies,
    explain,
    int_linear,
    int_matmul,
    pack,
    quantize_rows,
    quantize_sign,
    quantize_weight,
    scale_all,
    scale_rows,
    unpack,
)

__all__ = [
    "autocast_dtype",
    "bodies",
    "explain",
    "int_linear",
    "int_matmul",
    "pack",
    "quantize_rows",
    "quantize_sign",
    "quantize_weight",
    "scale_all",
    "scale_rows",
    "unpack",
]
