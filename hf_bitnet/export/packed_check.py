"""Reads packed weights as a stranger would: bytes from the file, arithmetic in numpy, nothing of our kernels. Own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..modules import QuantizedEmbedding, QuantizedLayer
from .format import Source
from .report import Check
from .stored import Stored

_TRITS = 5  # of a byte


def compare_codes(layers: Mapping[str, QuantizedLayer | QuantizedEmbedding], folder: Path, in_trits: bool) -> Check:
    """Codes in the file against the layers'. `layers`: name of the weight in the file -> layer."""
    reader, stored = "numpy", Stored(folder)
    for name, layer in layers.items():
        if stored.shape(name) is None:
            return Check(reader, "codes", False, f"{name} is missing")
        grid = layer.quantizer.grid
        trits = in_trits and grid.levels == 3
        table = trits_of_bytes() if trits else codes_of_bytes(layer.quantizer.storage_bits, grid.lowest, grid.step)
        if not holds_codes(stored, name, table, layer):
            return Check(reader, "codes", False, f"{name} has other codes")
    return Check(reader, "codes", True, f"{len(layers)} weights, every code")


def holds_codes(stored: Stored, name: str, table: NDArray[np.int8], layer: QuantizedLayer | QuantizedEmbedding) -> bool:
    """Whether the bytes of a stored tensor (N, B) are the layer's codes. `table`: of `codes_of_bytes`."""
    start = 0
    for block in Source.blocks(layer):
        codes = block.codes.cpu().numpy()
        found = stored.rows(name, start, start + len(codes)).view(torch.uint8).numpy()
        start += len(codes)
        if len(found) != len(codes) or not np.array_equal(_looked_up(found, table)[:, : codes.shape[1]], codes):
            return False
    return (start,) == (stored.shape(name) or ())[:1]


def _looked_up(packed: NDArray[np.uint8], table: NDArray[np.int8]) -> NDArray[np.int8]:
    """(N, B), (256, n) -> (N, B n)."""
    count = table.shape[1]
    if count == _TRITS:
        return table[packed].reshape(len(packed), -1)
    # the codes of a byte are one number of 1 to 8 bytes, and taken as that
    return np.take(table.view(f"u{count}")[:, 0], packed).view(np.int8)


@functools.cache
def codes_of_bytes(bits: int, lowest: int, step: int) -> NDArray[np.int8]:
    """int8 (256, 8 / bits): the codes in each byte, those of the lowest bits first."""
    levels = np.arange(256)[:, None] >> np.arange(0, 8, bits) & 2**bits - 1
    return np.ascontiguousarray((levels * step + lowest).astype(np.int8))


@functools.cache
def trits_of_bytes() -> NDArray[np.int8]:
    """int8 (256, 5): the codes -1, 0 and 1 in each byte, digits to the base of three, the lowest first."""
    return (np.arange(256)[:, None] // 3 ** np.arange(_TRITS) % 3 - 1).astype(np.int8)
