"""Reads the weights of a checkpoint of transformers' own method `bitnet` with transformers' own functions. Own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..modules import QuantizedLayer
from .report import Check
from .stored import Stored

# of the distance between two levels: how far means of the same magnitudes, summed in another order, may put a boundary
_BOUNDARY = 1e-5


def compare_codes(layers: Mapping[str, QuantizedLayer], folder: Path) -> Check:
    """Codes that transformers unpacks, against the layers'. `layers`: name of the weight in the file -> layer."""
    from transformers.integrations.bitnet import unpack_weights

    reader, stored = "transformers' unpack_weights", Stored(folder)
    with torch.compiler.set_stance("force_eager"):
        for name, layer in layers.items():
            if (found := stored.get(name)) is None:
                return Check(reader, "codes", False, f"{name} is missing")
            codes = unpack_weights(found, dtype=torch.int8) if found.dtype == torch.uint8 else found.to(torch.int8)
            if not torch.equal(codes, layer.quantized_weight().codes.cpu()):
                return Check(reader, "codes", False, f"{name} has other codes")
    return Check(reader, "codes", True, f"{len(layers)} layers, every code")


def compare_online_codes(layers: Mapping[str, QuantizedLayer], folder: Path) -> Check:
    """Codes that transformers makes of the float weights, against the layers'.

    The two sum mean|w| in another order, so a weight that lies on a rounding boundary may fall to the other side.
    """
    reader, stored, moved, weights = "transformers' WeightQuant", Stored(folder), 0, 0
    for name, layer in layers.items():
        if (found := stored.get(name)) is None:
            return Check(reader, "codes", False, f"{name} is missing")
        expected = layer.quantized_weight()
        different = _online_codes(found) != expected.codes.cpu()
        distance = (found.float()[different].abs() / expected.scale.cpu() - 0.5).abs()
        if bool((distance > _BOUNDARY).any()):
            return Check(reader, "codes", False, f"{name} has other codes")
        moved, weights = moved + int(different.sum()), weights + found.numel()
    boundary = f", but for {moved} that lie on a rounding boundary" if moved else ""
    return Check(reader, "codes", True, f"{len(layers)} layers, every code of {weights}{boundary}")


def _online_codes(weight: Tensor) -> Tensor:
    from transformers.integrations.bitnet import WeightQuant

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return WeightQuant.apply(weight).sign().to(torch.int8)  # type: ignore[union-attr]
