"""Reads packed weights as a stranger would: bytes from the file, arithmetic in numpy, nothing of our kernels. Own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..modules import QuantizedEmbedding, QuantizedLayer
from ..quantizers import Grid
from .report import Check
from .stored import Stored


def compare_codes(layers: Mapping[str, QuantizedLayer | QuantizedEmbedding], folder: Path, in_trits: bool) -> Check:
    """Codes in the file against the layers'. `layers`: name of the weight in the file -> layer."""
    reader, stored = "numpy", Stored(folder)
    for name, layer in layers.items():
        if (found := stored.get(name)) is None:
            return Check(reader, "codes", False, f"{name} is missing")
        codes = layer.quantized_weight().codes.cpu().numpy()
        bits = layer.quantizer.storage_bits
        levels = (
            trit_levels(found.numpy()) if in_trits and layer.quantizer.grid.levels == 3 else bit_levels(found.numpy(), bits)
        )
        if not np.array_equal(_codes(levels, layer.quantizer.grid)[:, : codes.shape[1]], codes):
            return Check(reader, "codes", False, f"{name} has other codes")
    return Check(reader, "codes", True, f"{len(layers)} weights, every code")


def bit_levels(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """uint8 (N, B) -> uint8 (N, 8 B / bits), the first in the lowest bits."""
    if bits == 1:
        return np.unpackbits(packed, axis=1, bitorder="little")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(packed), -1)


def trit_levels(packed: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 (N, B) -> uint8 (N, 5 B): digits to the base of three, the lowest first."""
    powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8)
    return (packed[:, :, None] // powers % 3).reshape(len(packed), -1)


def _codes(levels: np.ndarray[Any, Any], grid: Grid) -> np.ndarray[Any, Any]:
    return (levels.astype(np.int16) * grid.step + grid.lowest).astype(np.int8)
