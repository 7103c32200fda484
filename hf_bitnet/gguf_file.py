"""Floor 0: a GGUF file, its metadata and where its tensors are. Own; the format is docs/gguf.md of ggml, versions 2 and 3.

A reader of its own, because others stop at ids of tensor types that they do not know. Nothing in the file is believed: every
count and length is compared with the bytes that are left before anything of that size is made.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
F32, I2_S = 0, 36
# of ours: how the inputs of all quantized layers are quantized, where it is one scheme without ranges
ACTIVATION_KEY = "hf_bitnet.activation"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
# files are padded to it, so a large one is written by nobody and makes a copy without weights huge
_ALIGNMENT, _LARGEST_ALIGNMENT = 32, 2**16
_MOST_DIMENSIONS = 4
# arrays longer than this (vocabularies) are passed over; only their length is kept
_LONGEST_ARRAY = 4096
_TEXT_LENGTH = struct.Struct("<Q")
# the shortest key and value, and the shortest description of a tensor
_LEAST_PAIR, _LEAST_TENSOR = 13, 24
_LARGEST = 2**48


# also those of newer releases than the package gguf's, and of bitnet.cpp
_TYPE_NAMES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 36: "I2_S", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"},
}


def type_name(kind: int) -> str:
    """What ggml calls a type of tensors; "type 99" for one that nobody knows."""
    return _TYPE_NAMES.get(kind, f"type {kind}")


class Length(int):
    """Of a list that is not kept: one of texts, or a long one of numbers; and where its values begin in the file.

    Attributes:
        kind: id of the type of its values. place: of the first one.
    """

    kind: int
    place: int

    def __new__(cls, count: int, kind: int = _STRING, place: int = 0) -> Length:
        made = super().__new__(cls, count)
        made.kind, made.place = kind, place
        return made


class Stored(NamedTuple):
    """name: in the file. shape: rows first. kind: id of its type. start: of its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


class GGUFFile:
    """An open file, mapped.

    Attributes:
        metadata: key -> number, text, list of up to some thousand numbers, or the Length of another list.
        version: of the format.
        tensors: name -> where it is.
        pairs: the bytes of all metadata as they are in the file.

    Raises ValueError where it is no GGUF file of these versions, is cut off, or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise ValueError(f"there is no file {str(path)!r}")
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()!r}")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, _Damaged) as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}); copy or download it again") from None

    def _read(self) -> None:
        cursor = _Cursor(self.data, len(MAGIC))
        self.version: int = cursor.number("I")
        if self.version not in VERSIONS:
            hint = "; it was written for machines of the other byte order" if self.version & 0xFFFF == 0 else ""
            raise ValueError(f"{self.path} is of GGUF version {self.version}; legal: {', '.join(map(str, VERSIONS))}{hint}")
        tensors, pairs = cursor.number("Q"), cursor.number("Q")
        cursor.expect(pairs * _LEAST_PAIR + tensors * _LEAST_TENSOR, f"{pairs} keys and {tensors} tensors")
        start = cursor.place
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text()
            if key in self.metadata:
                raise _Damaged(f"the key {key!r} is there twice")
            self.metadata[key] = cursor.value(cursor.number("I"))
        self.pairs = bytes(self.data[start : cursor.place])
        self._place([_described(cursor) for _ in range(tensors)], cursor.place)

    def _place(self, described: list[Stored], end: int) -> None:
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _Damaged(f"general.alignment is {alignment!r}, which is no power of two")
        if alignment > _LARGEST_ALIGNMENT:
            raise _Damaged(f"general.alignment is {alignment}, legal is up to {_LARGEST_ALIGNMENT}")
        base = -(-end // alignment) * alignment
        self.tensors: dict[str, Stored] = {}
        for each in described:
            if each.name in self.tensors:
                raise _Damaged(f"the tensor {each.name!r} is there twice")
            self.tensors[each.name] = each._replace(start=base + each.start)

    def bytes_of(self, tensor: Stored, count: int) -> memoryview:
        """The first `count` bytes of a tensor. Raises ValueError where the file ends before."""
        end = tensor.start + count
        if end > len(self.data):
            raise ValueError(
                f"{self.path} is incomplete: the tensor {tensor.name} ends at byte {end}, the file at {len(self.data)}; copy "
                "or download it again"
            )
        return memoryview(self.data)[tensor.start : end]

    def values(self, key: str) -> list[Any]:
        """A list of the metadata, whole; empty where there is none. Raises ValueError where it is no list, or is damaged."""
        found = self.metadata.get(key, [])
        if isinstance(found, list):
            return found
        if not isinstance(found, Length):
            raise ValueError(f"{self.path}: {key} is {found!r}, which is no list; copy or download the file again")
        if found.kind != _STRING:
            return list(struct.unpack_from(f"<{found:d}{_NUMBERS[found.kind]}", self.data, found.place))
        try:
            return [self.data[start:end].decode("utf-8") for start, end in _Cursor(self.data, found.place).texts(found)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {key} holds no text ({error}); copy or download the file again") from None

    @property
    def architecture(self) -> str:
        """Raises ValueError where the file does not say it."""
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str):
            raise ValueError(f"{self.path} does not say of which architecture it is (general.architecture)")
        return found

    def without_weights(self) -> bytes:
        """A file with the same metadata and names, whose tensors are single zeros of a type that every reader knows."""
        parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(self.tensors), len(self.metadata)), self.pairs]
        alignment = int(self.metadata.get("general.alignment", _ALIGNMENT))
        step = max(alignment, 4)
        for index, name in enumerate(self.tensors):
            encoded = name.encode()
            parts.append(struct.pack("<Q", len(encoded)) + encoded + struct.pack("<IQIQ", 1, 1, F32, index * step))
        head = b"".join(parts)
        return head + bytes(-len(head) % alignment + step * len(self.tensors))


class _Damaged(Exception):
    """Something in the file cannot be."""


class _Cursor:
    """Reads little-endian values one after the other, and never past the end."""

    def __init__(self, data: mmap.mmap, place: int) -> None:
        self.data, self.place = data, place

    def expect(self, count: int, what: str) -> None:
        left = len(self.data) - self.place
        if count > left:
            raise _Damaged(f"at byte {self.place} it should hold {what}, but only {left} bytes are left")

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.expect(size, f"{size} bytes")
        (value,) = struct.unpack_from("<" + code, self.data, self.place)
        self.place += size
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.expect(length, f"a text of {length} bytes")
        value = bytes(self.data[self.place : self.place + length]).decode("utf-8")
        self.place += length
        return value

    def texts(self, count: int) -> Iterator[tuple[int, int]]:
        """Where each of so many texts begins and ends. Vocabularies have hundreds of thousands."""
        place, last, length_at = self.place, len(self.data), _TEXT_LENGTH.unpack_from
        for _ in range(count):
            if place + _TEXT_LENGTH.size > last:
                raise _Damaged(f"at byte {place} it should hold the length of a text, but only {last - place} bytes are left")
            start = place + _TEXT_LENGTH.size
            place = start + length_at(self.data, place)[0]
            if place > last:
                raise _Damaged(
                    f"at byte {start} it should hold a text of {place - start} bytes, but only {last - start} are left"
                )
            yield start, place

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        if kind not in _NUMBERS:
            raise _Damaged(f"at byte {self.place} is a value of the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self, kind: int, count: int) -> Any:
        if kind == _STRING:
            self.expect(8 * count, f"{count} texts")
            start = self.place
            for _, end in self.texts(count):
                self.place = end
            return Length(count, kind, start)
        if kind not in _NUMBERS:
            raise _Damaged(f"at byte {self.place} is a list of the type {kind}, which no list has")
        code = _NUMBERS[kind]
        size = struct.calcsize("<" + code) * count
        self.expect(size, f"{count} numbers")
        start = self.place
        self.place += size
        if count > _LONGEST_ARRAY:
            return Length(count, kind, start)
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))


def _described(cursor: _Cursor) -> Stored:
    name, dimensions = cursor.text(), cursor.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise _Damaged(f"the tensor {name!r} has {dimensions} dimensions")
    # the fastest moving first
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    if 0 in shape or math.prod(shape) > _LARGEST:
        raise _Damaged(f"the tensor {name!r} has shape {shape}")
    return Stored(name, shape, cursor.number("I"), cursor.number("Q"))
