"""Tensors of a folder of safetensors files, read one at a time by the library of that name. Own."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class Stored:
    """The tensors in `folder`, under the names they have there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        return found

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where the folder has none of that name."""
        if name not in self._files:
            return None
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor, or None where the folder has none of that name."""
        if name not in self._files:
            return None
        with safe_open(self._files[name], "pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """A part of a tensor along its first dimension. Each time anew: what is read of a mapped file counts as memory."""
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_slice(name)[start:end]

    def names(self) -> set[str]:
        return set(self._files)
