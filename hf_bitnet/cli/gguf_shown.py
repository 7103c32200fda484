"""What `hf-bitnet info` shows of a GGUF file: its metadata, and what its tensors are stored as. No tensor is read. Own.

Leaves out: values of lists.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..gguf_file import GGUFFile, Length, type_name

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
        return "\n".join([*lines, *(f"  {_name(key)} = {_shown(value)}" for key, value in self.metadata.items())])


def _name(key: str) -> str:
    return key if key.isprintable() else repr(key)  # a terminal obeys what is not


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"[{value['length']:,} values]"
    text = repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"


def read_gguf_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Reads the header alone. Raises ValueError when it is not that of a GGUF file, or the file is cut short."""
    file = GGUFFile(Path(path))
    metadata = {key: {"length": n} if (n := _length(value)) is not None else value for key, value in file.metadata.items()}
    return GGUFHeader(os.fspath(path), file.version, len(file.data), metadata, _sized(file))


def _length(value: Any) -> int | None:
    """Of a list."""
    return len(value) if isinstance(value, list) else int(value) if isinstance(value, Length) else None


def _sized(file: GGUFFile) -> list[GGUFTensor]:
    """A tensor reaches to where the next one begins. Raises ValueError where one lies behind the file's end."""
    tensors = file.tensors.values()
    ends = dict(pairwise([*sorted(each.start for each in tensors), len(file.data)]))
    for each in tensors:
        file.bytes_of(each, 1)
    return [GGUFTensor(each.name, type_name(each.kind), each.shape, ends[each.start] - each.start) for each in tensors]
