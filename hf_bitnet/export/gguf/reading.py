"""Reads files back: with the package `gguf` where its release knows all kinds in them, else with a reader of our own. Own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...gguf_file import GGUFFile, Stored
from .kinds import Kind
from .writing import gguf_package

_PLAIN = {"F32": np.float32, "F16": np.float16}


def read_head(path: Path) -> tuple[dict[str, Stored], str]:
    """Tensors of a file by name, and who read it."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except ValueError:  # a kind newer than its release
        return GGUFFile(path).tensors, "own reader"
    found = {}
    for each in reader.tensors:
        shape = tuple(int(size) for size in each.shape[::-1])
        found[each.name] = Stored(each.name, shape, int(each.tensor_type), int(each.data_offset))
    return found, "gguf.GGUFReader"


def decoded_by(kind: Kind) -> str:
    """Whose code `decode` runs for a kind."""
    return "own" if kind.decode is not None else "gguf.quants"


def rows_of(path: Path, stored: Stored, kind: Kind) -> Callable[[int, int], Tensor]:
    """Reads rows start .. end of a tensor: (start, end) -> float32 (end - start, columns). A vector has one column."""
    columns = stored.shape[-1] if len(stored.shape) > 1 else 1
    width = columns // kind.block * kind.bytes
    decoder = _decoder(kind)
    scale = _scale(path, stored, kind)

    def read(start: int, end: int) -> Tensor:
        # not mapped: the pages of the whole file would count as the process's memory
        data = np.fromfile(path, np.uint8, (end - start) * width, offset=stored.start + start * width)
        values = decoder(data.reshape(end - start, width))
        return values if scale is None else values * scale

    return read


def _scale(path: Path, stored: Stored, kind: Kind) -> Tensor | None:
    """float32 (1,) of a kind that has one for the tensor, behind its last row."""
    if not kind.tail:
        return None
    end = stored.start + kind.size(stored.shape) - kind.tail
    return torch.from_numpy(np.fromfile(path, np.float32, 1, offset=end))


def _decoder(kind: Kind) -> Callable[[Any], Tensor]:
    own = kind.decode
    if own is not None:
        return lambda data: own(torch.from_numpy(data))
    gguf = gguf_package()
    of = gguf.GGMLQuantizationType(kind.id)
    return lambda data: torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(_typed(data, kind), of)))


def _typed(data: Any, kind: Kind) -> Any:
    # the package takes floats as such, and everything else as bytes
    return data.view(_PLAIN[kind.name]) if kind.name in _PLAIN else data
