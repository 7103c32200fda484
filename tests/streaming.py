"""Watches a format write: no tensor that was made may live when the next one is made."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_bitnet.export.stream import Planned, write_safetensors


class Watched:
    """Stands in for `write_safetensors` in the module of a format.

    Attributes:
        made: names of the tensors that were made, in their order; those of the model itself are not among them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType, model: torch.nn.Module) -> None:
        self.made: list[str] = []
        self._alive: list[weakref.ref[Tensor]] = []
        self._existing = {tensor.data_ptr() for tensor in model.state_dict().values()}
        monkeypatch.setattr(module, "write_safetensors", self._write)

    def _write(self, folder: Path, tensors: list[Planned], **options: Any) -> list[Path]:
        return write_safetensors(
            folder, [each._replace(make=lambda each=each: self._make(each)) for each in tensors], **options
        )

    def _make(self, each: Planned) -> Tensor:
        living = [tuple(found.shape) for ref in self._alive if (found := ref()) is not None]
        assert not living, f"{living} when {each.name} is made"
        tensor = each.tensor()
        if tensor.data_ptr() not in self._existing:
            self.made.append(each.name)
            if not each.name.endswith("weight_scale"):  # of layers whose weights are still to be packed
                self._alive.append(weakref.ref(tensor))
        return tensor
