"""The header of a GGUF file: its metadata and what its tensors are stored as. Needs no package; no tensor is read. Own.

Layout (llama.cpp's, version 2 and 3, little-endian): "GGUF", uint32 version, uint64 tensors, uint64 pairs; pairs of a string
(uint64 length, UTF-8), a uint32 kind and a value; tensors of a name, uint32 number of dimensions, uint64 each (the inner one
first), uint32 type, uint64 offset; then, aligned, the data. Types that the package gguf does not know (Q2_0, and I2_S of
bitnet.cpp) are named here. Every length is checked against the file's. Leaves out: big-endian files, values of arrays.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# kind of a value -> its letter in the module struct; a string and an array are made of others
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 36: "I2_S", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"},
}
_MOST_DIMENSIONS = 8
_LONGEST_SHOWN = 80


@dataclass(frozen=True)
class GGUFTensor:
    """name, type as ggml calls it, shape with the outer dimension first, bytes with their padding."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """`metadata`: scalars and strings; of an array its length only, as {"length": n}. `str()` is for people."""

    path: str
    version: int
    bytes: int
    metadata: dict[str, Any] = field(repr=False)
    tensors: list[GGUFTensor] = field(repr=False)

    def types(self) -> dict[str, dict[str, int]]:
        """type -> number of tensors and bytes, the most frequent first."""
        counts = Counter(tensor.type for tensor in self.tensors)
        return {
            kind: {"tensors": count, "bytes": sum(tensor.bytes for tensor in self.tensors if tensor.type == kind)}
            for kind, count in counts.most_common()
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        head = {"path": self.path, "version": self.version, "bytes": self.bytes, "types": self.types()}
        return {**head, "metadata": self.metadata, "tensors": [vars(tensor) for tensor in self.tensors]}

    def __str__(self) -> str:
        kinds = ", ".join(f"{each['tensors']} x {kind} ({each['bytes'] / 1e6:.2f} MB)" for kind, each in self.types().items())
        lines = [f"{self.path}: GGUF version {self.version}, {self.bytes / 1e6:.2f} MB", f"tensors: {kinds or 'none'}"]
        return "\n".join([*lines, *(f"  {key} = {_shown(value)}" for key, value in self.metadata.items())])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"[{value['length']:,} values]"
    text = repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Reads the header alone. Raises ValueError when it is not that of a GGUF file, or the file is cut short."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        reader = _Reader(file, os.fspath(path), size)
        if reader.take(4) != _MAGIC:
            raise ValueError(f"{os.fspath(path)!r} is no GGUF file")
        version = reader.scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"{os.fspath(path)!r} is GGUF of version {version} (or big-endian); read are versions 2 and 3")
        tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = reader.string()
            if key in metadata:
                raise reader.wrong(f"the key {key!r} is there twice")
            metadata[key] = reader.value(reader.scalar("I"))
        entries = [reader.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise reader.wrong(f"general.alignment is {alignment!r}")
        data = -(-file.tell() // alignment) * alignment
    return GGUFHeader(os.fspath(path), version, size, metadata, _sized(reader, entries, data))


def _sized(reader: _Reader, entries: list[tuple[str, tuple[int, ...], int, int]], data: int) -> list[GGUFTensor]:
    """A tensor reaches to where the next one begins."""
    starts = sorted(offset for *_, offset in entries)
    ends = dict(pairwise([*starts, reader.size - data]))
    found = []
    for name, shape, kind, offset in entries:
        count = ends[offset] - offset
        if count < 0:
            raise reader.wrong(f"the tensor {name!r} lies behind its end; it was cut short")
        found.append(GGUFTensor(name, _TYPES.get(kind, f"type {kind}"), shape[::-1], count))
    return found


class _Reader:
    def __init__(self, file: BinaryIO, path: str, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path!r} is a broken GGUF file: {what}")

    def take(self, count: int) -> bytes:
        self.check(count)
        return self.file.read(count)

    def check(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self.wrong(f"it ends at byte {self.size:,}, within its header")

    def skip(self, count: int) -> None:
        self.check(count)
        self.file.seek(count, os.SEEK_CUR)

    def scalar(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        raise self.wrong(f"a value of the unknown kind {kind}")

    def array(self) -> dict[str, int]:
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(length):
                self.skip(self.scalar("Q"))
        else:
            raise self.wrong(f"an array of the kind {kind}")
        return {"length": length}

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """name, shape as it is stored, type, offset."""
        name, dimensions = self.string(), self.scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self.wrong(f"the tensor {name!r} has {dimensions} dimensions")
        return name, tuple(self.scalar("Q") for _ in range(dimensions)), self.scalar("I"), self.scalar("Q")
