"""Reads files back: with the package `gguf` where its release knows all kinds in them, else with a reader of our own. Own."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from .kinds import Kind
from .writing import gguf_package

_MAGIC = 0x46554747
# bytes of a scalar of each type of value
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. kind: ggml's id. shape: of the values. start: its first byte."""

    kind: int
    shape: tuple[int, ...]
    start: int


def read_head(path: Path) -> tuple[dict[str, Stored], str]:
    """Tensors of a file by name, and who read it."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except ValueError:  # a kind newer than its release
        return _own_head(path), "own reader"
    found = {}
    for each in reader.tensors:
        shape = tuple(int(size) for size in each.shape[::-1])
        found[each.name] = Stored(int(each.tensor_type), shape, int(each.data_offset))
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


def _own_head(path: Path) -> dict[str, Stored]:
    with open(path, "rb") as file:
        magic, version, tensors, values = _unpack(file, "<IIQQ")
        assert (magic, version) == (_MAGIC, 3), "not a GGUF file of version 3"
        alignment = 32
        for _ in range(values):
            key, kind = _string(file), _unpack(file, "<I")[0]
            if key == "general.alignment":
                alignment = _unpack(file, "<I")[0]
            else:
                _skip(file, kind)
        heads = []
        for _ in range(tensors):
            name, dimensions = _string(file), _unpack(file, "<I")[0]
            *shape, kind, offset = _unpack(file, f"<{dimensions}QIQ")
            heads.append((name, tuple(shape[::-1]), kind, offset))
        start = file.tell() + -file.tell() % alignment
    return {name: Stored(kind, shape, start + offset) for name, shape, kind, offset in heads}


def _unpack(file: IO[bytes], layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _string(file: IO[bytes]) -> str:
    return file.read(_unpack(file, "<Q")[0]).decode()


def _skip(file: IO[bytes], kind: int) -> None:
    if kind == _STRING:
        _string(file)
    elif kind == _ARRAY:
        inner, count = _unpack(file, "<IQ")
        if inner in _SCALARS:
            file.seek(_SCALARS[inner] * count, 1)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        file.seek(_SCALARS[kind], 1)
